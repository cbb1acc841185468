"""The Serve application: a gateway that speaks HTTP in front of restorers that own the model.

serve run serve.app:build_app model=nano
serve deploy serve/app.yaml
serve.run(build_app(ServeConfig(model="models:/faithdiff-nano@champion")))
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI

from serve.form import UpscaleRequest
from serve.gateway import Gateway, GatewayConfig, Unavailable, build_api
from serve.restorer import ModelInfo, RestoredPicture, Restorer, RestorerConfig
from sr_platform import cluster  # noqa: F401 - before ray: it sets the variables that Ray reads at import
from sr_platform.config import StrictConfig, validate
from sr_platform.errors import ConfigError

from ray import serve  # isort: skip
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError  # isort: skip
from ray.serve import Application  # isort: skip
from ray.serve.exceptions import RayServeException  # isort: skip
from ray.serve.handle import DeploymentHandle  # isort: skip

_FORWARDED = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
# Calls beside the pictures in hand, so that readiness is answered while a replica is busy.
_SPARE_CALLS = 16


class ServeConfig(StrictConfig):
    """The application: which model, and how its two deployments are sized."""

    model: str = "nano"
    """A preset, a folder, or models:/name@alias."""
    restorer: RestorerConfig = RestorerConfig()
    """Replicas that own the model."""
    gateway: GatewayConfig = GatewayConfig()
    """Replicas that speak HTTP."""


class RestorerHandle:
    """Restorers of a deployment as a gateway sees them: the same calls, with Ray's errors taken apart."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def restore(self, lq: np.ndarray, request: UpscaleRequest) -> RestoredPicture:
        restored: RestoredPicture = await _result(self._handle.restore.remote(lq, request))
        return restored

    async def describe(self) -> ModelInfo:
        info: ModelInfo = await _result(self._handle.describe.remote())
        return info


class ServedGateway(Gateway):
    """The gateway as a deployment."""

    def __init__(self, cfg: dict[str, Any], handle: DeploymentHandle) -> None:
        super().__init__(GatewayConfig.model_validate(cfg), RestorerHandle(handle))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self)


class ServedRestorer(Restorer):
    """The restorer as a deployment."""

    def __init__(self, model: str, cfg: dict[str, Any]) -> None:
        super().__init__(model, RestorerConfig.model_validate(cfg))


def build_app(cfg: ServeConfig | Mapping[str, Any]) -> Application:
    """The wired application; app.yaml, KubeRay and the tests all start here.

    Raises:
        ConfigError: an unknown name or a wrong value in `cfg`; every problem is named at once.
    """
    settings = cfg if isinstance(cfg, ServeConfig) else _validated(cfg)
    restorer = serve.deployment(
        name="Restorer",
        num_replicas=settings.restorer.num_replicas,
        max_ongoing_requests=1 + settings.restorer.max_waiting + _SPARE_CALLS,
        max_queued_requests=settings.restorer.max_waiting + _SPARE_CALLS,
        ray_actor_options=_actor_options(settings.restorer),
        graceful_shutdown_timeout_s=settings.gateway.request_timeout_s,
    )(ServedRestorer)
    gateway = serve.deployment(
        name="Gateway",
        num_replicas=settings.gateway.num_replicas,
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": 0.5},
    )(serve.ingress()(ServedGateway))
    model = _absolute(settings.model)
    bound = restorer.bind(model, settings.restorer.model_dump(mode="json"))
    application: Application = gateway.bind(settings.gateway.model_dump(mode="json"), bound)
    return application


def _validated(args: Mapping[str, Any]) -> ServeConfig:
    # Ray would validate for us if build_app took only a model, but pydantic's refusal does not say what was meant.
    try:
        return validate(ServeConfig, dict(args), where="serve: args")
    except ConfigError as error:
        # Without the chain, the one line that matters is the last of DEPLOY_FAILED's message.
        raise ConfigError(str(error)) from None


async def _result(response: Any) -> Any:
    """What the replica returned or raised, in its own exception types. Who stops waiting stops the work, too."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except RayTaskError as error:
        if error.cause is None:
            raise
        raise error.cause from error
    except (RayActorError, TaskCancelledError, RayServeException) as error:
        raise Unavailable(f"restorer: {type(error).__name__}; the request may be sent again") from error


def _actor_options(cfg: RestorerConfig) -> dict[str, Any]:
    env_vars = {"OMP_NUM_THREADS": str(max(1, int(cfg.num_cpus)))}
    env_vars.update({name: os.environ[name] for name in _FORWARDED if name in os.environ})
    return {"num_cpus": cfg.num_cpus, "num_gpus": cfg.num_gpus, "runtime_env": {"env_vars": env_vars}}


def _absolute(model: str) -> str:
    """A folder by its full path: replicas run in a folder of Ray's."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model

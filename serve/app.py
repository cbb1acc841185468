"""The Serve application: gateways that speak HTTP, restorers that own the model, a captioner where one is wanted.

serve run serve.app:build_app model=nano
serve deploy serve/app.yaml
serve.run(build_app(ServeConfig(model="models:/faithdiff-nano@champion")))
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve.autoscaling import AutoscalingConfig
from serve.captioner import CaptionerConfig
from serve.deployments import ServedCaptioner, ServedGateway, ServedRestorer
from serve.gateway import GatewayConfig
from serve.replica import RestorerConfig
from sr_platform import cluster  # noqa: F401 - before ray: it sets the variables that Ray reads at import
from sr_platform.config import StrictConfig, validate
from sr_platform.errors import ConfigError

from ray import serve  # isort: skip
from ray.serve import Application  # isort: skip
from ray.serve.config import AutoscalingConfig as ReplicaNumbers  # isort: skip
from ray.serve.config import AutoscalingPolicy  # isort: skip

_FORWARDED = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_PROFILE", "PYTHONPATH")
# Calls beside the pictures in hand: somebody tells that there is a new job.
_SPARE_CALLS = 16
# What Serve itself needs after a replica has handed its jobs over.
_STOP_MARGIN_S = 30.0


class ServeConfig(StrictConfig):
    """The application: which model, and how its deployments are sized."""

    model: str = "nano"
    """A preset, a folder, or models:/name@alias; a new version behind the alias is taken up while jobs go on."""
    restorer: RestorerConfig = RestorerConfig()
    """Replicas that own the model."""
    gateway: GatewayConfig = GatewayConfig()
    """Replicas that speak HTTP."""
    captioner: CaptionerConfig | None = None
    """The model that writes prompts for requests with auto_prompt; none by default."""


def build_app(cfg: ServeConfig | Mapping[str, Any]) -> Application:
    """The wired application; app.yaml, KubeRay and the tests all start here.

    Raises:
        ConfigError: an unknown name or a wrong value in `cfg`; every problem is named at once.
    """
    settings = cfg if isinstance(cfg, ServeConfig) else _validated(cfg)
    gateway, restorer = _wired_gateway(settings), settings.restorer
    captions = None if settings.captioner is None else _captioner(settings.captioner)
    replicas = _restorers(restorer, gateway).bind(
        _absolute(settings.model), restorer.model_dump(mode="json"), gateway.model_dump(mode="json"), captions
    )
    application: Application = _gateways(gateway).bind(gateway.model_dump(mode="json"), replicas)
    return application


# Every request has a line of the gateway's own, with its ids.
_LOGGING = {"enable_access_log": False}


def _restorers(cfg: RestorerConfig, gateway: GatewayConfig) -> Any:
    most = cfg.engine.max_entries + _SPARE_CALLS
    return serve.deployment(
        name="Restorer",
        **_numbers(cfg.num_replicas, lambda: _restorer_numbers(cfg.autoscaling, cfg, gateway.store_url)),
        max_ongoing_requests=most,
        max_queued_requests=most,
        ray_actor_options=_actor_options(cfg.num_cpus, cfg.num_gpus),
        graceful_shutdown_timeout_s=cfg.drain_s + _STOP_MARGIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        health_check_timeout_s=60,
        logging_config=_LOGGING,
    )(ServedRestorer)


def _gateways(cfg: GatewayConfig) -> Any:
    return serve.deployment(
        name="Gateway",
        **_numbers(cfg.num_replicas, lambda: _gateway_numbers(cfg)),
        max_ongoing_requests=200,
        ray_actor_options=_actor_options(0.5, 0.0),
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=_LOGGING,
    )(serve.ingress()(ServedGateway))


def _captioner(cfg: CaptionerConfig) -> Any:
    deployment = serve.deployment(
        name="Captioner",
        num_replicas=cfg.num_replicas,
        max_ongoing_requests=16,
        ray_actor_options=_actor_options(cfg.num_cpus, cfg.num_gpus),
    )(ServedCaptioner)
    return deployment.bind(cfg.model_copy(update={"model": _absolute(cfg.model)}).model_dump(mode="json"))


def _numbers(num_replicas: int | None, scaled: Any) -> dict[str, Any]:
    return {"autoscaling_config": scaled()} if num_replicas is None else {"num_replicas": num_replicas}


def _restorer_numbers(scaling: AutoscalingConfig, cfg: RestorerConfig, store_url: str) -> ReplicaNumbers:
    return ReplicaNumbers(
        min_replicas=scaling.min_replicas,
        max_replicas=scaling.max_replicas,
        upscale_delay_s=scaling.upscale_delay_s,
        downscale_delay_s=scaling.downscale_delay_s,
        downscale_to_zero_delay_s=scaling.downscale_to_zero_delay_s,
        policy=AutoscalingPolicy(
            policy_function="serve.autoscaling:QueuedWork",
            policy_kwargs={
                "store_url": store_url,
                "drain_s": scaling.drain_s,
                "megapixel_steps_per_s": scaling.megapixel_steps_per_s,
                "megapixels_of_one": cfg.spread.above_megapixels,
            },
        ),
    )


def _gateway_numbers(cfg: GatewayConfig) -> ReplicaNumbers:
    return ReplicaNumbers(
        min_replicas=1, max_replicas=cfg.max_replicas, target_ongoing_requests=cfg.requests_per_replica
    )


def _wired_gateway(cfg: ServeConfig) -> GatewayConfig:
    """With what the application knows of itself, and with full paths: replicas run in a folder of Ray's."""
    gateway = cfg.gateway
    is_scaled = cfg.restorer.num_replicas is None
    return gateway.model_copy(
        update={
            "store_url": _absolute_database(gateway.store_url),
            "storage_uri": gateway.storage_uri if "://" in gateway.storage_uri else _full(gateway.storage_uri),
            "starts_from_zero": is_scaled and cfg.restorer.autoscaling.min_replicas == 0,
            "intake": gateway.intake.model_copy(update={"has_captioner": cfg.captioner is not None}),
        }
    )


def _validated(args: Mapping[str, Any]) -> ServeConfig:
    # Ray would validate for us if build_app took only a model, but pydantic's refusal does not say what was meant.
    try:
        return validate(ServeConfig, dict(args), where="serve: args")
    except ConfigError as error:
        # Without the chain, the one line that matters is the last of DEPLOY_FAILED's message.
        raise ConfigError(str(error)) from None


def _actor_options(num_cpus: float, num_gpus: float) -> dict[str, Any]:
    env_vars = {"OMP_NUM_THREADS": str(max(1, int(num_cpus)))}
    env_vars.update({name: os.environ[name] for name in _FORWARDED if name in os.environ})
    return {"num_cpus": num_cpus, "num_gpus": num_gpus, "runtime_env": {"env_vars": env_vars}}


def _absolute(model: str) -> str:
    return _full(model) if Path(model).is_dir() else model


def _absolute_database(url: str) -> str:
    scheme, _, path = url.partition(":///")
    return f"{scheme}:///{_full(path)}" if scheme.startswith("sqlite") and path else url


def _full(path: str) -> str:
    return str(Path(path).expanduser().resolve())

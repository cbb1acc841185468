"""Gateway, restorer and captioner as deployments of Ray Serve, and their handles as the service sees them."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import numpy as np
from fastapi import FastAPI

from serve.captioner import Captioner, CaptionerConfig
from serve.exposure import check_exposure
from serve.form import UpscaleRequest
from serve.gateway import Gateway, GatewayConfig, Unavailable, build_api
from serve.job_run import Captioning, Unreachable
from serve.jobs import JobStore
from serve.metrics import states_of_deployment
from serve.replica import Replica, RestorerConfig
from serve.restorer import RestoredPicture
from serve.tracing import Trace, current
from serve.visibility import make_visible
from sr_platform import cluster  # noqa: F401 - before ray: it sets the variables that Ray reads at import
from sr_platform.storage import open_storage

from ray import serve  # isort: skip
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError  # isort: skip
from ray.serve.context import _get_global_client  # isort: skip
from ray.serve.exceptions import RayServeException  # isort: skip
from ray.serve.handle import DeploymentHandle  # isort: skip
from ray.util import get_node_ip_address  # isort: skip

logger = logging.getLogger(__name__)

# A replica that dies takes the pictures of open connections with it; each is made again on another one.
_TRIES = 3
_PAUSE_S = 0.5


class RestorerHandle:
    """Restorers of a deployment as a gateway sees them: the same calls, with Ray's errors taken apart."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def restore(self, lq: np.ndarray, request: UpscaleRequest) -> RestoredPicture:
        for tries_left in reversed(range(_TRIES)):
            try:
                restored: RestoredPicture = await _result(self._handle.restore.remote(lq, request, current()))
            except Unavailable as error:
                if not tries_left:
                    raise
                logger.warning("restorer: %s; the picture is sent to another replica", error)
                await asyncio.sleep(_PAUSE_S)
            else:
                return restored
        raise AssertionError("unreachable")


class ServedGateway(Gateway):
    """The gateway as a deployment."""

    def __init__(self, cfg: dict[str, Any], handle: DeploymentHandle) -> None:
        settings = GatewayConfig.model_validate(cfg)
        self._process = make_visible(settings.logs)
        if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
            _check_exposure(settings)
        store, storage = JobStore(settings.store_url), open_storage(settings.storage_uri)
        super().__init__(settings, RestorerHandle(handle), store, storage)

    def __serve_build_asgi_app__(self) -> FastAPI:
        application = serve.get_replica_context().app_name
        return build_api(
            self, process=self._process, replica_states=lambda: states_of_deployment(application, "Restorer")
        )


class ServedRestorer:
    """The restorer as a deployment; Serve awaits its constructor and its end."""

    async def __init__(  # type: ignore[misc]
        self, model: str, cfg: dict[str, Any], gateway: dict[str, Any], captioner: DeploymentHandle | None
    ) -> None:
        settings, around = RestorerConfig.model_validate(cfg), GatewayConfig.model_validate(gateway)
        name = make_visible(around.logs)
        store, storage = JobStore(around.store_url), open_storage(around.storage_uri)
        caption = None if captioner is None else captioning(captioner)
        # Loading takes its time, and Serve asks meanwhile whether this process is alive.
        self._replica = await asyncio.to_thread(
            Replica, name, model, settings, store, storage, caption=caption, mailbox=True
        )
        await self._replica.start()

    async def restore(self, lq: np.ndarray, request: UpscaleRequest, trace: Trace | None) -> RestoredPicture:
        return await self._replica.restore(lq, request, trace)

    async def check_health(self) -> None:
        """Serve starts a new process where this raises."""
        self._replica.check()

    async def __del__(self) -> None:
        """Serve awaits it before it ends the process."""
        await self._replica.stop()


class ServedCaptioner(Captioner):
    """The captioner as a deployment."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__(CaptionerConfig.model_validate(cfg))


def _check_exposure(cfg: GatewayConfig) -> None:
    # What Serve was started with is told by no public call.
    http_host = _get_global_client().http_config.host
    check_exposure(cfg, http_host=http_host or "0.0.0.0", node_address=get_node_ip_address())  # noqa: S104


def captioning(handle: DeploymentHandle) -> Captioning:
    """Captions by a deployment; Unreachable while it has no replica."""

    async def caption(rgb: np.ndarray) -> str:
        try:
            text: str = await _result(handle.caption.remote(rgb))
        except Unavailable as error:
            raise Unreachable(f"captioner: {error}") from error
        return text

    return caption


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
        raise Unavailable(f"{type(error).__name__}; the request may be sent again") from error

"""HTTP: reads the upload, hands the picture to a restorer, answers with a PNG or a problem. Holds no model.

    POST /v1/upscale   GET /v1/models   GET /healthz   GET /readyz   GET /docs   GET /openapi.json

A plain class: `build_api(Gateway(GatewayConfig(), restorer))` is an ASGI application that works without Ray.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
from fastapi import FastAPI, Request, Response
from pydantic import PositiveFloat, PositiveInt

from faithdiff.errors import InputError
from serve.form import UpscaleRequest, form_schema, read_form
from serve.images import PictureLimits, check_output, decode_picture, encode_png
from serve.problems import MEDIA_TYPE, Problem, install_handlers
from serve.restorer import Busy, ModelInfo, RestoredPicture
from sr_platform.config import StrictConfig

_RETRY_AFTER_S = 5
_PROBLEM: dict[str, Any] = {"content": {MEDIA_TYPE: {}}}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The multipart body is broken", **_PROBLEM},
    413: {"description": "Too many bytes or pixels", **_PROBLEM},
    415: {"description": "Not multipart, or not a picture of a known format", **_PROBLEM},
    422: {"description": "A field is wrong, or the picture is damaged", **_PROBLEM},
    503: {"description": "No replica is free; Retry-After says when to come again", **_PROBLEM},
    504: {"description": "The restoration took too long", **_PROBLEM},
}
_PNG: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The restored picture, exactly scale x the size",
        "content": {"image/png": {}},
        "headers": {name: {"schema": {"type": "string"}} for name in ("X-Model-Version", "X-Manifest-Digest")},
    }
}


class GatewayConfig(StrictConfig):
    """The HTTP side: how many gateways, and what they let in."""

    num_replicas: PositiveInt = 1
    """Gateways."""
    limits: PictureLimits = PictureLimits()
    """Sizes of pictures."""
    request_timeout_s: PositiveFloat = 600.0
    """Longest wait for a restored picture, queueing included; then 504, and the work ends."""
    ready_timeout_s: PositiveFloat = 5.0
    """Longest wait for a restorer's sign of life in /readyz and /v1/models."""


class Unavailable(RuntimeError):  # noqa: N818 - the caller may come again
    """No restorer could take the request, or the one that had it died."""


class RestorerClient(Protocol):
    """What a gateway needs of restorers: one `Restorer`, or a deployment of them."""

    async def restore(self, lq: np.ndarray, request: UpscaleRequest) -> RestoredPicture: ...

    async def describe(self) -> ModelInfo: ...


class Gateway:
    """The endpoints, as methods."""

    def __init__(self, cfg: GatewayConfig, restorer: RestorerClient) -> None:
        self._cfg, self._restorer = cfg, restorer

    async def upscale(self, request: Request) -> Response:
        """One picture up, the restored one down. Decoding and encoding leave the event loop free."""
        data, wanted = await read_form(request, max_upload_bytes=self._cfg.limits.max_upload_bytes)
        if len(data) > self._cfg.limits.max_upload_bytes:
            raise Problem(413, "upload-too-large", f"picture: {len(data):,} bytes; send a smaller file")
        lq = await asyncio.to_thread(decode_picture, data, self._cfg.limits)
        check_output(lq, wanted.scale, self._cfg.limits)
        restored = await self._restore(lq, wanted)
        png = await asyncio.to_thread(encode_png, restored.image)
        return Response(png, media_type="image/png", headers=_lineage(restored.model))

    async def models(self) -> dict[str, Any]:
        """The models that are served."""
        return {"models": [asdict(await self._model())]}

    async def healthz(self) -> dict[str, str]:
        """The gateway is alive, whatever the restorers do."""
        return {"status": "ok"}

    async def readyz(self) -> dict[str, str]:
        """A restorer with a loaded model answers."""
        return {"status": "ready", "model_version": (await self._model()).version}

    async def _restore(self, lq: np.ndarray, wanted: UpscaleRequest) -> RestoredPicture:
        try:
            async with asyncio.timeout(self._cfg.request_timeout_s):
                return await self._restorer.restore(lq, wanted)
        except TimeoutError as error:
            detail = f"request: no result within {self._cfg.request_timeout_s:g} s; ask for fewer steps or pixels"
            raise Problem(504, "timed-out", detail) from error
        except InputError as error:
            raise Problem(422, "refused-by-model", str(error)) from error
        except (Busy, Unavailable) as error:
            raise Problem(503, "no-replica-free", str(error), retry_after_s=_RETRY_AFTER_S) from error

    async def _model(self) -> ModelInfo:
        try:
            async with asyncio.timeout(self._cfg.ready_timeout_s):
                return await self._restorer.describe()
        except (TimeoutError, Busy, Unavailable) as error:
            detail = f"restorer: no replica answers ({str(error) or 'too slow'})"
            raise Problem(503, "not-ready", detail, retry_after_s=_RETRY_AFTER_S) from error


def build_api(gateway: Gateway) -> FastAPI:
    """The ASGI application of a gateway, errors and documentation included."""
    api = FastAPI(title="FaithDiff", description="Faithful restoration and enlargement of pictures.")
    install_handlers(api)
    body = {"required": True, "content": {"multipart/form-data": {"schema": form_schema()}}}
    api.post(
        "/v1/upscale",
        response_class=Response,
        responses={**_PNG, **_PROBLEMS},
        openapi_extra={"requestBody": body},
    )(gateway.upscale)
    api.get("/v1/models", responses={503: _PROBLEMS[503]})(gateway.models)
    api.get("/healthz")(gateway.healthz)
    api.get("/readyz", responses={503: _PROBLEMS[503]})(gateway.readyz)
    return api


def _lineage(model: ModelInfo) -> dict[str, str]:
    """Response headers from which one finds the model, and the data it was trained on."""
    values = {"X-Model-Version": model.version, "X-Manifest-Digest": model.manifest_digest or "none"}
    return {name: value.encode("ascii", "backslashreplace").decode() for name, value in values.items()}

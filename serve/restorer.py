"""A restorer: one served model, which may be replaced by another while pictures come and go.

A plain class: `await Restorer("nano", ModelConfig()).restore(lq, UpscaleRequest())` works without Ray.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.engine import Busy
from serve.form import UpscaleRequest
from serve.served_model import ModelConfig, ModelInfo, ParkedModel, ServedModel, load_model, park_model, serve_model
from serve.tracing import Trace

__all__ = ["Busy", "ModelInfo", "RestoredPicture", "Restorer"]

logger = logging.getLogger(__name__)

# Somebody waits on the connection.
_PRIORITY = 7


@dataclass(frozen=True)
class RestoredPicture:
    """`image` uint8 or uint16 RGB [H, W, 3], the pipeline's report, and the model that made it."""

    image: np.ndarray
    report: dict[str, Any]
    model: ModelInfo


class Restorer:
    """The model is loaded when the object is made. Every method but `model` belongs to one event loop."""

    def __init__(self, model: str, cfg: ModelConfig) -> None:
        self._cfg, self._uri = cfg, model
        self._served: ServedModel | None = load_model(model, cfg)
        self._info = self._served.info
        self._numbers = itertools.count(1)

    @property
    def uri(self) -> str:
        """What the model was asked for as."""
        return self._uri

    @property
    def info(self) -> ModelInfo:
        """Of the model that is served, or was until a moment ago."""
        return self._info

    def model(self) -> ServedModel | None:
        """None while one model makes room for the next."""
        return self._served

    def check(self) -> None:
        """Raises RuntimeError when the device fails, and the process must be started again."""
        if self._served is not None and (failure := self._served.engine.load().failure):
            raise RuntimeError(f"restorer: {failure}")

    async def restore(self, lq: np.ndarray, request: UpscaleRequest, trace: Trace | None = None) -> RestoredPicture:
        """The restored picture of RGB [H, W, 3]. When the caller gives up, the work ends after the current step.

        Raises:
            Busy: too many pictures are in hand.
            serve.engine.TooLarge: the picture would not fit even alone.
            faithdiff.errors.InputError: the pipeline refuses the picture or a setting.
        """
        if (served := self._served) is None:
            raise Busy("restorer: it is changing to another version of the model; come again later")
        name = f"request {next(self._numbers)}"
        ticket = served.submit(lq, request, name=name, priority=_PRIORITY, trace=trace)
        result = await asyncio.wrap_future(ticket.future)
        return RestoredPicture(result.array, result.report, served.info)

    async def park_new_version(self) -> ParkedModel | None:
        """The version that the URI stands for now, loaded beside the one that is served; None when it is that one."""
        from sr_platform.model_registry import find_version

        version = await asyncio.to_thread(find_version, self._uri)
        if version == self._info.version:
            return None
        return await asyncio.to_thread(park_model, self._uri, self._cfg)

    async def change_to(self, parked: ParkedModel, drain: Callable[[], Awaitable[None]]) -> None:
        """Serves another version: whatever is in hand is finished by the old one first. `drain` waits for jobs."""
        logger.info("restorer: from %s to %s", self._info.version, parked.info.version)
        old, self._served = self._served, None
        assert old is not None, "one change at a time"
        await drain()
        while old.engine.load().entries:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(old.engine.close)
        await asyncio.to_thread(old.pipeline.to, "cpu")
        try:
            served = await asyncio.to_thread(serve_model, parked, self._cfg)
        except Exception:
            # Better the old version than none; who called decides when to try again.
            self._served = await asyncio.to_thread(serve_model, ParkedModel(old.info, old.pipeline), self._cfg)
            raise
        self._served, self._info = served, served.info

    def close(self) -> None:
        """Cancels what is in hand."""
        if self._served is not None:
            self._served.engine.close()

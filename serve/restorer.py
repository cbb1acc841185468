"""A replica that restores pictures: owns one pipeline, loaded once, and runs one picture at a time on its own thread.

A plain class: `await Restorer("nano", RestorerConfig()).restore(lq, UpscaleRequest())` works without Ray.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from serve.form import UpscaleRequest
from sr_platform.config import StrictConfig

if TYPE_CHECKING:
    from faithdiff import FaithDiffPipeline

logger = logging.getLogger(__name__)


class RestorerConfig(StrictConfig):
    """Replicas that own a model, and what each of them may use."""

    num_replicas: PositiveInt = 1
    """Replicas, each with a model of its own."""
    num_cpus: PositiveFloat = 1.0
    """CPUs of a replica; on CPU also its threads."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs of a replica; above 0 the model runs on cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network."""
    tile_px: int = Field(default=1024, ge=64, multiple_of=8)
    """Side of the tiles in which large pictures are restored."""
    max_waiting: NonNegativeInt = 8
    """Pictures that may wait in a replica behind the one that runs; more are refused with 503."""
    cache_path: Path | None = None
    """Where registered models are downloaded to; by default a folder under ~/.cache."""


@dataclass(frozen=True)
class ModelInfo:
    """The model of a replica, where it comes from, and what it took to load it."""

    model: str
    version: str
    manifest_digest: str | None
    device: str
    dtype: str
    fetch_s: float
    load_s: float


@dataclass(frozen=True)
class RestoredPicture:
    """`image` uint8 RGB [H, W, 3], the pipeline's report, and the model that made it."""

    image: np.ndarray
    report: dict[str, Any]
    model: ModelInfo


class Busy(RuntimeError):  # noqa: N818 - the caller may come again
    """As many pictures wait in this replica as may."""


class Restorer:
    """One pipeline; requests queue up to `max_waiting` and run one after the other, off the event loop."""

    def __init__(self, model: str, cfg: RestorerConfig) -> None:
        self._cfg = cfg
        self._pipeline, self._info = load_model(model, cfg)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="restorer")
        self._num_requests = 0
        logger.info("restorer: %s", self._info)

    async def describe(self) -> ModelInfo:
        """The loaded model; answers while pictures are being restored."""
        return self._info

    async def restore(self, lq: np.ndarray, request: UpscaleRequest) -> RestoredPicture:
        """The restored picture of uint8 RGB [H, W, 3]. When the caller gives up, the work ends after the current step.

        Raises:
            Busy: too many pictures are waiting.
            faithdiff.errors.InputError: the pipeline refuses the picture or a setting.
        """
        if self._num_requests > self._cfg.max_waiting:
            raise Busy(f"restorer: {self._num_requests} pictures are in hand already; come again later")
        given_up = threading.Event()
        self._num_requests += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._worker, self._restore, lq, request, given_up)
        finally:
            given_up.set()
            self._num_requests -= 1

    def _restore(self, lq: np.ndarray, request: UpscaleRequest, given_up: threading.Event) -> RestoredPicture:
        from faithdiff.denoiser import advance
        from faithdiff.errors import Cancelled
        from faithdiff.pipeline import timed
        from faithdiff.request import RestorationRequest

        settings = RestorationRequest(**request.model_dump(), tile_px=self._cfg.tile_px)
        pipeline = self._pipeline
        # Ray hands arrays over read-only.
        restoration = pipeline.prepare(np.array(lq), settings)
        with timed(restoration.seconds, "denoise"):
            while not restoration.canvas.is_done:
                if given_up.is_set():
                    raise Cancelled(f"restorer: given up by the caller at step {restoration.canvas.step}")
                advance(pipeline.unet, [restoration.canvas], tiles_per_batch=pipeline.tiles_per_batch)
        result = pipeline.finish(restoration)
        return RestoredPicture(np.asarray(result.image), result.report, self._info)


def load_model(model: str, cfg: RestorerConfig) -> tuple[FaithDiffPipeline, ModelInfo]:
    """The pipeline of a preset, a folder or `models:/name@alias`, on the device of `cfg`.

    Raises:
        sr_platform.errors.RequestError, faithdiff.errors.InputError: there is no such model, or it is incomplete.
    """
    import torch

    from faithdiff import FaithDiffPipeline
    from sr_platform.model_registry import resolve_model

    start_s = time.perf_counter()
    source = resolve_model(model, cfg.cache_path)
    fetched_s = time.perf_counter()
    device = "cuda" if cfg.num_gpus > 0 else "cpu"
    pipeline = FaithDiffPipeline.from_pretrained(
        source.path, dtype=getattr(torch, cfg.dtype), device=device, model_version=source.version
    )
    info = ModelInfo(
        model=model,
        version=source.version,
        manifest_digest=source.manifest_digest,
        device=device,
        dtype=cfg.dtype,
        fetch_s=round(fetched_s - start_s, 3),
        load_s=round(time.perf_counter() - fetched_s, 3),
    )
    return pipeline, info

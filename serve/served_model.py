"""A model on its way from a URI to a device: fetched, loaded, made ready, and then restoring pictures.

Each part is timed, since together they are how long a new replica takes to be of use.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat

from serve.engine import Engine, EngineConfig
from serve.form import UpscaleRequest
from serve.measurements import set_cold_start, set_model
from serve.team import Peer, SharedPicture, Team
from serve.tickets import Ticket
from serve.tracing import Trace
from sr_platform.config import StrictConfig

if TYPE_CHECKING:
    from faithdiff import FaithDiffPipeline
    from faithdiff.canvas_state import CanvasState
    from faithdiff.request import RestorationRequest

logger = logging.getLogger(__name__)

_WARM_UP_PX = 64


class ModelConfig(StrictConfig):
    """How a replica holds its model."""

    num_cpus: PositiveFloat = 1.0
    """CPUs of a replica; on CPU also its threads, and its share of the machine's memory."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs of a replica; above 0 the model runs on cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network."""
    compile: bool = False
    """Compile the network's repeated blocks: minutes at the start, faster steps afterwards."""
    tile_px: int = Field(default=1024, ge=64, multiple_of=8)
    """Side of the tiles in which large pictures are restored."""
    vae_tile_px: int = Field(default=1024, ge=64, multiple_of=64)
    """Pictures with longer sides are encoded and decoded in bands of so many pixels squared. Others wait for one band
    of a picture, and for all of a picture that is smaller: a smaller side takes less memory and more time."""
    cache_path: Path | None = None
    """Where registered models are downloaded to; by default a folder under ~/.cache."""
    engine: EngineConfig = EngineConfig()
    """How much is taken in hand at once."""


@dataclass(frozen=True)
class ModelInfo:
    """The model of a replica, where it comes from, and what it took to get it ready."""

    model: str
    version: str
    manifest_digest: str | None
    device: str
    dtype: str
    download_s: float
    load_s: float
    compile_s: float = 0.0


@dataclass(frozen=True)
class ParkedModel:
    """A model in the machine's memory, not yet on the device."""

    info: ModelInfo
    pipeline: FaithDiffPipeline


@dataclass(frozen=True)
class ServedModel:
    """A model that restores pictures; `engine` has them in hand."""

    info: ModelInfo
    pipeline: FaithDiffPipeline
    engine: Engine
    tile_px: int
    vae_tile_px: int

    def submit(
        self,
        lq: np.ndarray,
        wanted: UpscaleRequest,
        *,
        name: str,
        priority: int = 5,
        resume: CanvasState | None = None,
        peers: Sequence[Peer] = (),
        trace: Trace | None = None,
    ) -> Ticket:
        """Takes RGB [H, W, 3] in hand, with `peers` that step some of its tiles. Raises as `Engine.submit`."""
        request = self.request(wanted)
        team = None
        if peers:
            team = Team(SharedPicture(name, lq, request, self.pipeline.model_version, priority), peers)
        return self.engine.submit(lq, request, name=name, priority=priority, resume=resume, team=team, trace=trace)

    def request(self, wanted: UpscaleRequest) -> RestorationRequest:
        """What is asked of the pipeline. Raises InputError."""
        from faithdiff.request import RestorationRequest

        return RestorationRequest(**wanted.restoration_fields(), tile_px=self.tile_px, vae_tile_px=self.vae_tile_px)


def park_model(model: str, cfg: ModelConfig) -> ParkedModel:
    """Fetches and loads the model of a preset, a folder or `models:/name@alias`.

    Raises:
        sr_platform.errors.RequestError, faithdiff.errors.InputError: there is no such model, or it is incomplete.
    """
    import torch

    from faithdiff import FaithDiffPipeline
    from sr_platform.model_registry import resolve_model

    start_s = time.perf_counter()
    source = resolve_model(model, cfg.cache_path)
    fetched_s = time.perf_counter()
    pipeline = FaithDiffPipeline.from_pretrained(
        source.path, dtype=getattr(torch, cfg.dtype), model_version=source.version
    )
    info = ModelInfo(
        model=model,
        version=source.version,
        manifest_digest=source.manifest_digest,
        device="cuda" if cfg.num_gpus > 0 else "cpu",
        dtype=cfg.dtype,
        download_s=round(fetched_s - start_s, 3),
        load_s=round(time.perf_counter() - fetched_s, 3),
    )
    return ParkedModel(info, pipeline)


def serve_model(parked: ParkedModel, cfg: ModelConfig) -> ServedModel:
    """Puts the model on its device and lets it take its first step, compiled if so configured."""
    import torch

    start_s = time.perf_counter()
    pipeline = parked.pipeline.to(parked.info.device)
    moved_s = time.perf_counter()
    if cfg.compile:
        pipeline.unet.compile_repeated_blocks()
    # Compiled code is made for the shape of a whole tile, and so are the kernels a GPU chooses.
    side_px = cfg.tile_px if cfg.compile or parked.info.device == "cuda" else _WARM_UP_PX
    warm_up = np.zeros((side_px, side_px, 3), np.uint8)
    pipeline(warm_up, scale=1, num_inference_steps=1, tile_px=cfg.tile_px, color_fix="none")
    if parked.info.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    info = replace(
        parked.info,
        load_s=round(parked.info.load_s + moved_s - start_s, 3),
        compile_s=round(time.perf_counter() - moved_s, 3),
    )
    engine = Engine(pipeline, cfg.engine, memory_share=_memory_share(cfg))
    set_cold_start(download_s=info.download_s, load_s=info.load_s, compile_s=info.compile_s)
    set_model(info.model, info.version)
    logger.info("model: ready: %s", info)
    return ServedModel(info, pipeline, engine, cfg.tile_px, cfg.vae_tile_px)


def load_model(model: str, cfg: ModelConfig) -> ServedModel:
    """`park_model` and `serve_model`, one after the other."""
    return serve_model(park_model(model, cfg), cfg)


def _memory_share(cfg: ModelConfig) -> float:
    """Of what is free: replicas that share a machine or a GPU must not all count on the whole of it."""
    if cfg.num_gpus > 0:
        return min(1.0, cfg.num_gpus)
    return min(1.0, cfg.num_cpus / (os.cpu_count() or 1))

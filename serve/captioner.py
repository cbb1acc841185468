"""A replica that describes pictures in words: one LLaVA model, one picture after the other.

A plain class: `await Captioner(CaptionerConfig(model="folder")).caption(rgb)` works without Ray.
"""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from faithdiff.caption_text import clean_caption
from sr_platform.config import StrictConfig


class CaptionerConfig(StrictConfig):
    """The model that writes prompts where a request asks for it."""

    model: str
    """A LLaVA folder written by save_pretrained, or a model id."""
    num_replicas: PositiveInt = 1
    """Replicas, each with a model of its own."""
    num_cpus: PositiveFloat = 1.0
    """CPUs of a replica; on CPU also its threads."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs of a replica; above 0 the model runs on cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model."""
    timeout_s: PositiveFloat = 120.0
    """Longest wait for a caption; a job is tried again then."""


class Captioner:
    """The model is loaded when the object is made."""

    def __init__(self, cfg: CaptionerConfig) -> None:
        import torch

        from faithdiff.captions import LlavaCaptioner

        device = "cuda" if cfg.num_gpus > 0 else "cpu"
        self._model = LlavaCaptioner.from_pretrained(cfg.model, dtype=getattr(torch, cfg.dtype), device=device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="captioner")

    async def caption(self, rgb: np.ndarray) -> str:
        """What is in RGB [H, W, 3] of 8 or 16 bits, as a prompt; the same picture gives the same words."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._caption, rgb)

    def _caption(self, rgb: np.ndarray) -> str:
        from faithdiff.image_modes import to_eight_bits

        picture = np.array(to_eight_bits(rgb))
        key = hashlib.sha256(picture.tobytes()).hexdigest()
        (text,) = self._model([picture], keys=[key], seed=0)
        return clean_caption(text)

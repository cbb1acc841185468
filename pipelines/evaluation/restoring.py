"""First stage of evaluate.py: each picture is read, degraded if the protocol says so, and restored.  [restore] > score

In : a row per picture: {"number": int, "picture": JSON of an EvaluationPicture}.
Out: the same rows with "restored": JSON of a `Restored`, empty without a model.

What was restored before with the same weights, picture and settings is found in the cache and not restored again.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

from faithdiff.seams import Borders, tile_borders
from pipelines.evaluation.pictures import EvaluationPicture, Loaded, load, pixels_digest
from pipelines.evaluation.protocol import EvaluateConfig, RestorationConfig
from pipelines.evaluation.score_table import INPUT, REFERENCE
from sr_platform.shards import json_digest
from sr_platform.storage import Storage, open_storage

if TYPE_CHECKING:
    from faithdiff.pipeline import FaithDiffPipeline, Restoration

Picture = NDArray[np.uint8]
RESTORED_FORMAT = 1
"""Raised whenever the same request would give another picture."""


@dataclass(frozen=True)
class Restored:
    """What is known of a restoration; the picture itself is `restored/<key>.png` of the cache."""

    key: str
    borders: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    seconds: dict[str, float] = field(default_factory=dict)
    problem: str = ""
    """Why there is no picture."""

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def parse(cls, text: str) -> Restored:
        values = json.loads(text)
        rows, columns = values.pop("borders")
        return cls(**values, borders=(tuple(rows), tuple(columns)))

    @property
    def tile_borders(self) -> Borders:
        return Borders(*self.borders)


class Restore:
    """One process with the model; it is loaded when the first picture is not in the cache."""

    def __init__(self, cfg: Mapping[str, Any], *, model: str, model_digest: str, report: str, cache: str) -> None:
        self.cfg = EvaluateConfig.model_validate(cfg)
        self.model, self.model_digest = model, model_digest
        self.report, self.cache = open_storage(report), open_storage(cache)
        self.is_warm = "diffusion_seconds" not in {metric.name for metric in self.cfg.metrics}

    def __call__(self, table: pa.Table) -> pa.Table:
        restored = []
        for row in table.to_pylist():
            loaded = load(EvaluationPicture.parse(row["picture"]), self.cfg)
            publish_picture(self.report, INPUT, loaded.name, loaded.lq)
            if loaded.hq is not None:
                publish_picture(self.report, REFERENCE, loaded.name, loaded.hq)
            restored.append(self.restored(loaded).dump() if self.model else "")
        return table.append_column("restored", pa.array(restored, pa.string()))

    def restored(self, loaded: Loaded) -> Restored:
        """From the cache, or now. The picture is written before the record that says it is there."""
        key = restoration_key(self.cfg.restoration, self.model_digest, loaded)
        name = f"restored/{key}.json"
        if self.cache.exists(name):
            return Restored.parse(self.cache.read_bytes(name).decode())
        seed = picture_seed(self.cfg.restoration.seed, loaded.name)
        try:
            pixels, restored = self.restore(loaded, seed, key)
        except FloatingPointError as error:
            return Restored(key, problem=f"the restoration failed: {' '.join(str(error).split())}")
        self.cache.write_bytes_atomic(f"restored/{key}.png", png(pixels))
        self.cache.write_bytes_atomic(name, restored.dump().encode())
        return restored

    def restore(self, loaded: Loaded, seed: int, key: str) -> tuple[Picture, Restored]:
        request = self.cfg.restoration.request(prompt=loaded.caption, seed=seed)
        if not self.is_warm:  # the first one also pays for kernels and caches
            self._denoised(self.pipeline.prepare(loaded.lq, request))
            self.is_warm = True
        restoration = self.pipeline.prepare(loaded.lq, request)
        diffusion_s = self._denoised(restoration)
        borders = tile_borders(restoration.canvas.plan)
        result = self.pipeline.finish(restoration)
        seconds = {**result.report["seconds"], "diffusion": diffusion_s}
        return np.asarray(result.image), Restored(key, (borders.rows, borders.columns), seconds)

    @cached_property
    def pipeline(self) -> FaithDiffPipeline:
        return load_pipeline(self.cfg, self.model)

    def _denoised(self, restoration: Restoration) -> float:
        """All steps; returns their seconds, with the device idle before and after."""
        from faithdiff.denoiser import advance

        self._wait_for_device()
        start = time.perf_counter()
        while not restoration.canvas.is_done:
            advance(self.pipeline.unet, [restoration.canvas], tiles_per_batch=self.pipeline.tiles_per_batch)
        self._wait_for_device()
        return time.perf_counter() - start

    def _wait_for_device(self) -> None:
        if self.pipeline.device.type == "cuda":
            torch.cuda.synchronize(self.pipeline.device)


def load_pipeline(cfg: EvaluateConfig, model: str) -> FaithDiffPipeline:
    """`model` at the protocol's precision, on the restorers' device."""
    # diffusers takes seconds to import; whoever only scores pictures, or asks for help, never pays for it.
    from faithdiff.pipeline import FaithDiffPipeline
    from pipelines.training.start_model import DTYPES, local_model

    device = "cuda" if cfg.workers.restorer_num_gpus else "cpu"
    dtype = DTYPES[cfg.restoration.precision]
    return FaithDiffPipeline.from_pretrained(local_model(model), dtype=dtype, device=device)


def restoration_key(restoration: RestorationConfig, model_digest: str, loaded: Loaded) -> str:
    """Of everything that a restored picture depends on."""
    about = [RESTORED_FORMAT, model_digest, loaded.name, pixels_digest(loaded.lq), loaded.caption]
    return json_digest([*about, restoration.model_dump(mode="json")])


def picture_seed(seed: int, name: str) -> int:
    """Of one picture's noise."""
    return zlib.crc32(f"{seed} {name}".encode())


def publish_picture(report: Storage, method: str, name: str, pixels: Picture) -> None:
    """`pictures/<method>/<name>.png` of the report; where it is already there, a killed run has written it."""
    data = png(pixels)
    file = picture_name(method, name)
    if not (report.exists(file) and report.size(file) == len(data)):
        report.write_bytes_atomic(file, data)


def picture_name(method: str, name: str) -> str:
    return f"pictures/{method}/{name}.png"


def png(pixels: Picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def restored_pixels(cache: Storage, restored: Restored) -> Picture:
    """The picture of a record of the cache."""
    with Image.open(io.BytesIO(cache.read_bytes(f"restored/{restored.key}.png"))) as image:
        return np.asarray(image.convert("RGB"))

"""Stage 3: pictures -> tiles.  ingest > filter > [crop] > caption > degrade > write

In : pictures as files.
Out: one row per crop: uint8 RGB [size, size, 3], where it was cut, and its key. Crops do not overlap.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import PurePosixPath
from typing import Annotated

import numpy as np
import pyarrow as pa
import pydantic
import ray.data

from pipelines.stages.decode import decode_picture
from pipelines.stages.filter import gray_deviation
from pipelines.stages.sample import Sample, WorkersConfig, map_shards, read_table, sample_rng, to_table
from sr_platform.config import StrictConfig


class CropConfig(StrictConfig):
    """How pictures are cut."""

    size_px: Annotated[int, pydantic.Field(gt=0, multiple_of=32)] = 512
    """Side of the square hq crop; its lq is a quarter of it."""
    max_per_picture: pydantic.PositiveInt = 8
    """Crops of one picture; which of the possible ones follows from the seed."""
    min_deviation: pydantic.NonNegativeFloat = 2.0
    """Standard deviation of the gray levels (0..255) below which a crop is too flat."""


class Crop:
    """Cuts the tiles of a centred grid out of each picture."""

    def __init__(self, cfg: CropConfig, *, seed: int, max_pixels: int) -> None:
        self.cfg, self.seed, self.max_pixels = cfg, seed, max_pixels

    def __call__(self, table: pa.Table) -> pa.Table:
        crops: list[Sample] = []
        for sample in read_table(table):
            crops += [sample] if sample.problem else self.cut(sample)
        return to_table(crops)

    def cut(self, sample: Sample) -> list[Sample]:
        """The crops of one picture; a crop that is too flat carries its problem."""
        picture = decode_picture(sample.data, max_pixels=self.max_pixels)
        size = self.cfg.size_px
        crops = []
        for index, (top, left) in enumerate(self._places(sample)):
            pixels = picture[top : top + size, left : left + size]
            crop = dataclasses.replace(
                sample,
                data=b"",
                key=sample_key(sample.source, index),
                top_px=top,
                left_px=left,
                height_px=size,
                width_px=size,
                hq=pixels.tobytes(),
            )
            deviation = gray_deviation(pixels)
            if deviation < self.cfg.min_deviation:
                detail = f"gray levels deviate by {deviation:.1f}, less than {self.cfg.min_deviation}"
                crop = crop.rejected("crop too flat", detail)
            crops.append(crop)
        return crops

    def _places(self, sample: Sample) -> list[tuple[int, int]]:
        """Top left corners, row by row."""
        tops = grid(sample.source_height_px, self.cfg.size_px)
        lefts = grid(sample.source_width_px, self.cfg.size_px)
        places = [(top, left) for top in tops for left in lefts]
        if len(places) <= self.cfg.max_per_picture:
            return places
        rng = sample_rng(self.seed, sample.source)
        chosen = np.sort(rng.choice(len(places), self.cfg.max_per_picture, replace=False))
        return [places[int(index)] for index in chosen]


def grid(side_px: int, size_px: int) -> list[int]:
    """Starts of as many tiles as fit side by side, centred."""
    count = side_px // size_px
    margin = (side_px - count * size_px) // 2
    return [margin + index * size_px for index in range(count)]


def sample_key(source: str, index: int) -> str:
    """A readable key, unique by the name of the picture and the number of the crop, the same in every dataset."""
    stem = re.sub(r"[^A-Za-z0-9]+", "_", PurePosixPath(source).stem).strip("_").lower()[:40]
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    return f"{stem or 'picture'}-{digest}-{index:03d}"


def crop_stage(
    ds: ray.data.Dataset, cfg: CropConfig, workers: WorkersConfig, *, seed: int, max_pixels: int
) -> ray.data.Dataset:
    return map_shards(ds, Crop(cfg, seed=seed, max_pixels=max_pixels).__call__, num_cpus=workers.num_cpus)

"""Stage 3: pictures -> hq crops.  ingest > filter > [crop] > caption > degrade > encode > write

In : pictures as files.
Out: one row per crop: uint8 RGB [height, width, 3], where it was cut, and its key. Tiles do not overlap.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated

import cv2
import numpy as np
import pyarrow as pa
import pydantic
import ray.data
from numpy.typing import NDArray
from PIL import Image

from faithdiff.degradation.recipe import SCALE
from pipelines.sources import SourceConfig, source_of
from pipelines.stages.decode import decode_picture
from pipelines.stages.filter import gray_deviation
from pipelines.stages.sample import Sample, map_shards, read_table, sample_rng, to_table
from pipelines.stages.workers import WorkersConfig
from sr_platform.config import StrictConfig

Place = tuple[int, int]


class CropConfig(StrictConfig):
    """How pictures are cut; a source whose `cut` is "whole" gives whole pictures instead of tiles."""

    size_px: Annotated[int, pydantic.Field(gt=0, multiple_of=32)] = 512
    """Side of the square hq crop; its lq is a quarter of it."""
    max_per_picture: pydantic.PositiveInt = 8
    """Crops of one picture; which of the possible ones follows from the seed."""
    min_deviation: pydantic.NonNegativeFloat = 2.0
    """Standard deviation of the gray levels (0..255) below which a crop is too flat."""


class Crop:
    """Cuts each picture as its source wants it."""

    def __init__(self, cfg: CropConfig, sources: Mapping[str, SourceConfig], *, seed: int, max_pixels: int) -> None:
        self.cfg, self.sources, self.seed, self.max_pixels = cfg, dict(sources), seed, max_pixels

    def __call__(self, table: pa.Table) -> pa.Table:
        cv2.setNumThreads(1)
        crops: list[Sample] = []
        for sample in read_table(table):
            crops += [sample] if sample.problem else self.cut(sample)
        return to_table(crops)

    def cut(self, sample: Sample) -> list[Sample]:
        """The crops of one picture; a crop that is too flat carries its problem."""
        picture = decode_picture(sample.data, max_pixels=self.max_pixels)
        sample = dataclasses.replace(
            sample, data=b"", source_height_px=picture.shape[0], source_width_px=picture.shape[1]
        )
        source = self.sources[source_of(sample.source)]
        if source.resize_px:
            picture = resized_picture(picture, drawn_side_px(source.resize_px, self.seed, sample.source))
        size = self.cfg.size_px
        if source.cut == "whole":
            height, width = (side - side % SCALE for side in picture.shape[:2])
            return [self._crop(sample, 0, (0, 0), picture[:height, :width])]
        places = tile_places(picture.shape[0], picture.shape[1], self.cfg, self.seed, sample.source)
        return [
            self._crop(sample, number, (top, left), picture[top : top + size, left : left + size])
            for number, (top, left) in enumerate(places)
        ]

    def _crop(self, sample: Sample, number: int, place: Place, pixels: NDArray[np.uint8]) -> Sample:
        pixels = np.ascontiguousarray(pixels)
        crop = dataclasses.replace(
            sample,
            key=sample_key(sample.source, number),
            top_px=place[0],
            left_px=place[1],
            height_px=pixels.shape[0],
            width_px=pixels.shape[1],
            hq=pixels.tobytes(),
        )
        deviation = gray_deviation(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))
        if deviation >= self.cfg.min_deviation:
            return crop
        return crop.rejected(
            "crop too flat", f"gray levels deviate by {deviation:.1f}, less than {self.cfg.min_deviation}"
        )


def tile_places(height_px: int, width_px: int, cfg: CropConfig, seed: int, name: str) -> list[Place]:
    """Top left corners of the tiles of a picture, row by row."""
    places = [(top, left) for top in grid(height_px, cfg.size_px) for left in grid(width_px, cfg.size_px)]
    if len(places) <= cfg.max_per_picture:
        return places
    chosen = sample_rng(seed, name, "tiles").choice(len(places), cfg.max_per_picture, replace=False)
    return [places[int(index)] for index in np.sort(chosen)]


def num_crops(height_px: int, width_px: int, cfg: CropConfig, source: SourceConfig) -> int:
    """How many crops a picture of this size gives, before flat ones are left out."""
    if source.cut == "whole":
        return 1
    if source.resize_px:
        height_px = width_px = source.resize_px[0]
    return min(cfg.max_per_picture, (height_px // cfg.size_px) * (width_px // cfg.size_px))


def grid(side_px: int, size_px: int) -> list[int]:
    """Starts of as many tiles as fit side by side, centred."""
    count = side_px // size_px
    margin = (side_px - count * size_px) // 2
    return [margin + index * size_px for index in range(count)]


def drawn_side_px(bounds_px: tuple[int, int], seed: int, name: str) -> int:
    """The side that a picture is resized to: uniform over the multiples of 4 within the bounds, both included."""
    low, high = bounds_px
    return SCALE * int(sample_rng(seed, name, "side").integers(low // SCALE, high // SCALE + 1))


def resized_picture(picture: NDArray[np.uint8], side_px: int) -> NDArray[np.uint8]:
    """The picture with its shorter side at `side_px`, both sides multiples of 4, by PIL's bicubic filter as released.

    Source: Realesrgan_offline_dataset.py:168-178 @ f11af6c, where it happens anew whenever a face is read.
    """
    height, width = picture.shape[:2]
    factor = side_px / min(height, width)
    new_height, new_width = (SCALE * max(1, round(side * factor / SCALE)) for side in (height, width))
    resized = Image.fromarray(picture).resize((new_width, new_height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def sample_key(source: str, number: int) -> str:
    """A readable key, unique by the name of the picture and the number of the crop, the same in every dataset."""
    stem = re.sub(r"[^A-Za-z0-9]+", "_", PurePosixPath(source).stem).strip("_").lower()[:40]
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    return f"{stem or 'picture'}-{digest}-{number:03d}"


def crop_stage(
    ds: ray.data.Dataset,
    cfg: CropConfig,
    workers: WorkersConfig,
    *,
    sources: list[SourceConfig],
    seed: int,
    max_pixels: int,
) -> ray.data.Dataset:
    stage = Crop(cfg, {source.name: source for source in sources}, seed=seed, max_pixels=max_pixels)
    return map_shards(ds, stage.__call__, num_cpus=workers.num_cpus, name="crop")

"""Stage 2: leaves out pictures that cannot be used.  ingest > [filter] > crop > caption > degrade > write

In : pictures as files.
Out: the same rows; those that do not decode, are too small or too flat carry their problem.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pydantic
import ray.data
from numpy.typing import NDArray

from pipelines.stages.decode import UnreadablePictureError, decode_picture
from pipelines.stages.sample import Sample, WorkersConfig, map_shards, read_table, to_table
from sr_platform.config import StrictConfig


class FilterConfig(StrictConfig):
    """Which pictures are worth training on."""

    min_side_px: pydantic.PositiveInt = 512
    """Shorter side of the smallest picture; at least the crop size."""
    max_pixels: pydantic.PositiveInt = 200_000_000
    """Height times width of the largest picture that is decoded at all."""
    min_deviation: pydantic.NonNegativeFloat = 5.0
    """Standard deviation of the gray levels (0..255) below which a picture is too flat."""


class Filter:
    """Decodes each picture once and judges it."""

    def __init__(self, cfg: FilterConfig) -> None:
        self.cfg = cfg

    def __call__(self, table: pa.Table) -> pa.Table:
        return to_table([sample if sample.problem else self.judge(sample) for sample in read_table(table)])

    def judge(self, sample: Sample) -> Sample:
        """The sample with the size of its picture, or with its problem."""
        try:
            picture = decode_picture(sample.data, max_pixels=self.cfg.max_pixels)
        except UnreadablePictureError as error:
            return sample.rejected("unreadable", str(error))
        height_px, width_px = picture.shape[:2]
        if min(height_px, width_px) < self.cfg.min_side_px:
            return sample.rejected("too small", f"{width_px}x{height_px} px, less than {self.cfg.min_side_px} px")
        deviation = gray_deviation(picture)
        if deviation < self.cfg.min_deviation:
            return sample.rejected(
                "too flat", f"gray levels deviate by {deviation:.1f}, less than {self.cfg.min_deviation}"
            )
        return dataclasses.replace(sample, source_height_px=height_px, source_width_px=width_px)


def gray_deviation(picture: NDArray[np.uint8]) -> float:
    """Standard deviation of the gray levels, 0..128."""
    return float(picture.mean(axis=2, dtype=np.float32).std(dtype=np.float64))


def filter_stage(ds: ray.data.Dataset, cfg: FilterConfig, workers: WorkersConfig) -> ray.data.Dataset:
    return map_shards(ds, Filter(cfg).__call__, num_cpus=workers.num_cpus)

"""Stage 5: hq crops -> (hq, lq) pairs.  ingest > filter > crop > caption > [degrade] > write

In : crops, hq uint8 RGB [H, W, 3], H and W divisible by 4.
Out: the same rows plus lq uint8 RGB [H/4, W/4, 3]; each depends on (seed, key) alone.
"""

from __future__ import annotations

import dataclasses

import cv2
import pyarrow as pa
import pydantic
import ray.data

from faithdiff.degradation import degrade, find_recipe
from pipelines.stages.sample import Sample, WorkersConfig, map_shards, read_table, to_table
from sr_platform.config import StrictConfig


class DegradeConfig(StrictConfig):
    """How hq becomes lq."""

    recipe: str = "pasd"
    """pasd for training; level_I, level_II or level_III for validation."""

    @pydantic.field_validator("recipe")
    @classmethod
    def _exists(cls, name: str) -> str:
        return find_recipe(name).name


class Degrade:
    """Degrades the crops of one shard."""

    def __init__(self, cfg: DegradeConfig, *, seed: int) -> None:
        self.recipe, self.seed = find_recipe(cfg.recipe), seed
        # One actor is one CPU's worth of work; Ray decides how many there are.
        cv2.setNumThreads(1)

    def __call__(self, table: pa.Table) -> pa.Table:
        return to_table([sample if sample.problem else self.degrade(sample) for sample in read_table(table)])

    def degrade(self, sample: Sample) -> Sample:
        """The sample with its lq."""
        lq = degrade(sample.hq_pixels(), self.recipe, key=sample.key, seed=self.seed)
        return dataclasses.replace(sample, lq=lq.tobytes())


def degrade_stage(ds: ray.data.Dataset, cfg: DegradeConfig, workers: WorkersConfig, *, seed: int) -> ray.data.Dataset:
    return map_shards(
        ds,
        Degrade,
        num_cpus=workers.num_cpus,
        fn_constructor_kwargs={"cfg": cfg, "seed": seed},
        compute=ray.data.ActorPoolStrategy(size=workers.degrade_actors),
    )

"""Stage 5: hq crops -> (hq, lq) pairs.  ingest > filter > crop > caption > [degrade] > encode > write

In : crops, hq uint8 RGB [H, W, 3], H and W divisible by 4.
Out: the same rows plus lq uint8 RGB [variants, H/4, W/4, 3], and in `trace` what was drawn, if it is kept; each variant
     depends on (seed, key, variant) alone, so `faithdiff.degradation.degrade` makes any of them again.
"""

from __future__ import annotations

import dataclasses
import json

import cv2
import pyarrow as pa
import pydantic
import ray.data

from faithdiff.degradation import apply_steps, draw_parameters, dump_steps, find_recipe
from pipelines.stages.sample import Sample, map_shards, read_table, to_table
from pipelines.stages.workers import WorkersConfig
from sr_platform.config import StrictConfig


class DegradeConfig(StrictConfig):
    """How hq becomes lq."""

    recipe: str = "pasd"
    """pasd for training; level_I, level_II or level_III for validation; or the path of a YAML file of the same form."""
    variants: pydantic.PositiveInt = 1
    """Differently degraded lq pictures for each crop."""
    keep_parameters: bool = False
    """Write the drawn parameters of every variant beside it, for audit."""

    @pydantic.field_validator("recipe")
    @classmethod
    def _exists(cls, name: str) -> str:
        find_recipe(name)
        return name


class Degrade:
    """Degrades the crops of one shard: a function of the table, light enough to travel with every task.

    A recipe file is read here, on the driver: the workers need not see it.
    """

    def __init__(self, cfg: DegradeConfig, *, seed: int) -> None:
        self.cfg, self.recipe, self.seed = cfg, find_recipe(cfg.recipe), seed

    def __call__(self, table: pa.Table) -> pa.Table:
        # One task is one CPU's worth of work; Ray decides how many run at once.
        cv2.setNumThreads(1)
        return to_table([sample if sample.problem else self.degrade(sample) for sample in read_table(table)])

    def degrade(self, sample: Sample) -> Sample:
        """The sample with every variant of its lq."""
        hq = sample.hq_pixels()
        drawn = [
            draw_parameters(self.recipe, key=sample.key, seed=self.seed, variant=variant)
            for variant in range(self.cfg.variants)
        ]
        lq = b"".join(apply_steps(hq, steps).tobytes() for steps in drawn)
        trace = json.dumps([dump_steps(steps) for steps in drawn]) if self.cfg.keep_parameters else ""
        return dataclasses.replace(sample, lq=lq, trace=trace)


def degrade_stage(ds: ray.data.Dataset, cfg: DegradeConfig, workers: WorkersConfig, *, seed: int) -> ray.data.Dataset:
    # The bound method, as Ray takes an instance for an actor's class.
    return map_shards(ds, Degrade(cfg, seed=seed).__call__, num_cpus=workers.num_cpus, name="degrade")

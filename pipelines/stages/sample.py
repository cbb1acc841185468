"""What flows through the stages: samples, as rows of an Arrow table; one table is one shard.

Until `crop` a row is a picture, from then on a crop of one. A row with a `problem` passes the remaining stages
untouched and ends in quarantine, so that every picture is in the output once or in quarantine once.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pydantic
import ray.data
from numpy.typing import NDArray

from sr_platform.config import StrictConfig


@dataclass(frozen=True)
class Sample:
    """One row. Bytes that a later stage no longer needs are emptied."""

    shard: int
    num_pictures: int
    """Of the whole shard: the writer checks that none got lost."""
    source: str
    """The picture's name below the input."""
    sidecar: str = ""
    """The name of the file beside it that holds its caption, if there is one."""
    data: bytes = b""
    """The picture as a file, from ingest to crop."""
    source_sha256: str = ""
    source_height_px: int = 0
    source_width_px: int = 0
    key: str = ""
    top_px: int = 0
    left_px: int = 0
    height_px: int = 0
    width_px: int = 0
    hq: bytes = b""
    """uint8 RGB [height_px, width_px, 3]."""
    caption: str = ""
    lq: bytes = b""
    """uint8 RGB [height_px / 4, width_px / 4, 3]."""
    problem: str = ""
    """Why the sample is left out, as "reason: detail"; empty while it is fine."""

    def hq_pixels(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.hq, np.uint8).reshape(self.height_px, self.width_px, 3)

    def lq_pixels(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.lq, np.uint8).reshape(self.height_px // 4, self.width_px // 4, 3)

    def rejected(self, reason: str, detail: str) -> Sample:
        """The sample on its way to quarantine, without its pixels."""
        return dataclasses.replace(self, problem=f"{reason}: {detail}", data=b"", hq=b"", lq=b"")


# Fixed, because a type inferred from the rows would differ between an empty shard and a full one.
_ARROW_TYPES = {"int": pa.int64(), "str": pa.string(), "bytes": pa.large_binary()}
SCHEMA = pa.schema([(field.name, _ARROW_TYPES[str(field.type)]) for field in dataclasses.fields(Sample)])


def to_table(samples: Iterable[Sample]) -> pa.Table:
    return pa.Table.from_pylist([vars(sample) for sample in samples], schema=SCHEMA)


def read_table(table: pa.Table) -> list[Sample]:
    return [Sample(**row) for row in table.to_pylist()]


def sample_rng(seed: int, key: str) -> np.random.Generator:
    """A generator for one sample, independent of every other sample and of the degradation's draws."""
    digest = hashlib.sha256(f"sample {key}".encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, "<u4").tolist()])


class WorkersConfig(StrictConfig):
    """Resources; nothing here changes a byte of the output."""

    num_cpus: Annotated[float, pydantic.Field(gt=0)] = 0.5
    """Logical CPUs of each task and actor."""
    degrade_actors: pydantic.PositiveInt = 2
    """Processes that degrade."""
    caption_actors: pydantic.PositiveInt = 1
    """Processes that hold the captioning model."""
    caption_num_gpus: pydantic.NonNegativeFloat = 0.0
    """GPUs, or a fraction of one, for each captioning process."""
    caption_batch_size: pydantic.PositiveInt = 8
    """Pictures per call of the captioning model."""

    def for_shards(self, num_shards: int) -> WorkersConfig:
        """With no more actors than there are shards to work on."""
        degrade, caption = min(self.degrade_actors, num_shards), min(self.caption_actors, num_shards)
        return self.model_copy(update={"degrade_actors": degrade, "caption_actors": caption})


TableStage = Callable[[pa.Table], pa.Table]


def map_shards(ds: ray.data.Dataset, stage: Any, *, num_cpus: float, **kwargs: Any) -> ray.data.Dataset:
    """`stage` over whole shards: `batch_size=None` keeps one shard one block, whatever its number of rows."""
    return ds.map_batches(stage, batch_size=None, batch_format="pyarrow", num_cpus=num_cpus, **kwargs)

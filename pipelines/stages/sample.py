"""What flows through the stages: samples, as rows of an Arrow table; one table is one shard.

Until `crop` a row is a picture, from then on a crop of one. A row with a `problem` passes the remaining stages
untouched and ends in quarantine, so that every picture is in the output once or in quarantine once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray

from faithdiff.degradation.recipe import SCALE
from pipelines.preparation.progress import Counted, current_tally


@dataclass(frozen=True)
class Sample:
    """One row. Bytes that a later stage no longer needs are emptied."""

    shard: int
    num_pictures: int
    """Of the whole shard: the writer checks that none got lost."""
    source: str
    """The picture's name in the whole run, printable and unique: "<source>/<path below the source's URI>"."""
    place: str = ""
    """Where its bytes lie, as JSON that `ingest` writes and reads."""
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
    meta: str = ""
    """What else the file beside the picture says, as a JSON object; empty when it says nothing else."""
    lq: bytes = b""
    """uint8 RGB [variants, height_px / 4, width_px / 4, 3]."""
    trace: str = ""
    """The drawn degradation of every variant, as JSON, when the recipe wants it kept."""
    latents: bytes = b""
    """A safetensors file of the encode stage; empty without it."""
    problem: str = ""
    """Why the sample is left out, as "reason: detail"; empty while it is fine."""

    def hq_pixels(self) -> NDArray[np.uint8]:
        """[height_px, width_px, 3]."""
        return np.frombuffer(self.hq, np.uint8).reshape(self.height_px, self.width_px, 3)

    def lq_pixels(self) -> NDArray[np.uint8]:
        """[variants, height_px / 4, width_px / 4, 3]."""
        return np.frombuffer(self.lq, np.uint8).reshape(-1, self.height_px // SCALE, self.width_px // SCALE, 3)

    def rejected(self, reason: str, detail: str) -> Sample:
        """The sample on its way to quarantine, without its pixels."""
        return dataclasses.replace(self, problem=f"{reason}: {detail}", data=b"", hq=b"", lq=b"", latents=b"")


# Fixed, because a type inferred from the rows would differ between an empty shard and a full one.
_ARROW_TYPES = {"int": pa.int64(), "str": pa.string(), "bytes": pa.large_binary()}
SCHEMA = pa.schema([(field.name, _ARROW_TYPES[str(field.type)]) for field in dataclasses.fields(Sample)])


def to_table(samples: Iterable[Sample]) -> pa.Table:
    return pa.Table.from_pylist([vars(sample) for sample in samples], schema=SCHEMA)


def read_table(table: pa.Table) -> list[Sample]:
    return [Sample(**row) for row in table.to_pylist()]


def sample_rng(seed: int, key: str, purpose: str) -> np.random.Generator:
    """A generator for one thing that is drawn about one sample, independent of everything else that is drawn."""
    digest = hashlib.sha256(f"{purpose} {key}".encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, "<u4").tolist()])


def map_shards(ds: ray.data.Dataset, stage: Any, *, num_cpus: float, name: str = "", **kwargs: Any) -> ray.data.Dataset:
    """`stage` over whole shards: `batch_size=None` keeps one shard one block, whatever its number of rows.

    A stage is a function of a table, or a class whose instances are; a class needs `compute=ActorPoolStrategy(...)`.
    Functions that follow each other with equal resources run fused, in one task per shard. A stage with a `name`
    reports its progress.
    """
    if isinstance(stage, type):
        # Resources that differ, if only by a byte, keep Ray from fusing the stages before it into the model's actor.
        kwargs.setdefault("memory", 1)
    if name and (tally := current_tally()) is not None:
        if isinstance(stage, type):
            make = functools.partial(stage, **kwargs.pop("fn_constructor_kwargs", {}))
            kwargs["fn_constructor_kwargs"] = {"make": make, "name": name, "tally": tally}
            stage = Counted
        else:
            stage = Counted(functools.partial(_itself, stage), name, tally).__call__
    return ds.map_batches(stage, batch_size=None, batch_format="pyarrow", num_cpus=num_cpus, **kwargs)


def _itself(stage: Any) -> Any:
    return stage

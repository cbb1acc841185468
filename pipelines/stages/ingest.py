"""Stage 1: reads pictures.  [ingest] > filter > crop > caption > degrade > write

In : one row per shard: its number and the names of its pictures (the plan, made by the driver).
Out: one row per picture: its bytes, their sha256, and the caption that lies beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import ray.data

from pipelines.stages.decode import SUFFIXES
from pipelines.stages.sample import Sample, WorkersConfig, map_shards, to_table
from sr_platform.config import StrictConfig
from sr_platform.errors import InputDataError
from sr_platform.storage import Storage, open_storage

_SIDECAR_SUFFIXES = (".txt", ".json")


class IngestConfig(StrictConfig):
    """Where the pictures come from."""

    name: str = "pictures"
    """What the manifest calls this source."""
    licence: str = "unknown"
    """Licence of the pictures; it travels into the manifest."""


@dataclass(frozen=True)
class Picture:
    """One picture of the input, found by listing."""

    name: str
    size_bytes: int
    sidecar: str


def find_pictures(storage: Storage) -> list[Picture]:
    """Every picture file below the storage, sorted by name.

    Raises:
        InputDataError: the folder does not exist or holds no picture.
    """
    sizes = storage.sizes()
    pictures = [
        Picture(name, size, _sidecar_of(name, sizes))
        for name, size in sorted(sizes.items())
        if name.lower().endswith(SUFFIXES)
    ]
    if not pictures:
        held = f"{len(sizes)} files, none of them a picture" if sizes else "nothing, or does not exist"
        raise InputDataError(
            f"prepare: --input {storage.uri} holds {held}; give a folder with {', '.join(SUFFIXES)} files"
        )
    return pictures


def plan_row(shard: int, pictures: list[Picture]) -> dict[str, object]:
    """What the first stage needs to know of one shard."""
    return {"shard": shard, "pictures": json.dumps([[p.name, p.sidecar] for p in pictures])}


class Ingest:
    """Reads the pictures of one shard; a file that is gone is that picture's problem, broken storage is the job's."""

    def __init__(self, input_uri: str) -> None:
        self.storage = open_storage(input_uri)

    def __call__(self, plan: pa.Table) -> pa.Table:
        samples = []
        for row in plan.to_pylist():
            pictures = json.loads(row["pictures"])
            samples += [self._read(row["shard"], len(pictures), name, sidecar) for name, sidecar in pictures]
        return to_table(samples)

    def _read(self, shard: int, num_pictures: int, name: str, sidecar: str) -> Sample:
        sample = Sample(shard=shard, num_pictures=num_pictures, source=name, sidecar=sidecar)
        try:
            data = self.storage.read_bytes(name)
            caption = _caption_in(self.storage.read_bytes(sidecar), sidecar) if sidecar else ""
        except InputDataError as error:
            return sample.rejected("unreadable", str(error))
        except ValueError as error:
            return sample.rejected("unreadable caption", f"{sidecar}: {' '.join(str(error).split())}")
        digest = hashlib.sha256(data).hexdigest()
        return Sample(shard, num_pictures, name, sidecar, data=data, source_sha256=digest, caption=caption)


def ingest_stage(ds: ray.data.Dataset, input_uri: str, workers: WorkersConfig) -> ray.data.Dataset:
    return map_shards(ds, Ingest(input_uri).__call__, num_cpus=workers.num_cpus)


def _sidecar_of(name: str, names: Mapping[str, int]) -> str:
    """`a/b.txt` or `a/b.json` beside `a/b.png`, if it exists."""
    beside = [str(PurePosixPath(name).with_suffix(suffix)) for suffix in _SIDECAR_SUFFIXES]
    return next((sidecar for sidecar in beside if sidecar in names), "")


def _caption_in(data: bytes, sidecar: str) -> str:
    """The text of a .txt, or the "caption" of a .json. Raises ValueError when there is none to be read."""
    text = data.decode("utf-8")
    if sidecar.endswith(".json"):
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("caption"), str):
            raise ValueError('there is no "caption" in it')
        text = content["caption"]
    return " ".join(text.split())

"""Stage 1: reads pictures.  [ingest] > filter > crop > caption > degrade > encode > write

In : one row per shard: {"shard": int, "pictures": JSON of [[name, place, sha256 or ""], ...]} (the plan of the driver).
Out: one row per picture: its bytes, their sha256, and what the files beside it say.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import ray.data

from pipelines.sources import SourceConfig
from pipelines.stages.decode import SUFFIXES
from pipelines.stages.sample import Sample, map_shards, to_table
from pipelines.stages.workers import WorkersConfig
from sr_platform.errors import InputDataError
from sr_platform.storage import Storage, open_storage

_SIDECAR_SUFFIXES = (".txt", ".json")


@dataclass(frozen=True)
class Picture:
    """One picture of the input, found by listing."""

    name: str
    """"<source>/<path below its URI>", with archives as folders; printable, and unique in a run."""
    place: str
    """Where its bytes and what lies beside it are, as ASCII JSON that `Ingest` reads."""
    size_bytes: int
    fingerprint: str
    """Changes when the bytes, or those of the files beside it, may have changed."""
    problem: str = ""
    """Why it is not to be read at all, as "reason: detail"."""


def list_pictures(sources: Sequence[SourceConfig], cache: Storage) -> list[Picture]:
    """Every picture of every source, in the order of the sources and then of the names.

    Raises:
        InputDataError: a source does not exist, or holds no picture.
    """
    return [picture for source in sources for picture in _pictures_of(source)]


class Ingest:
    """Reads the pictures of a shard; a file that is gone is that picture's problem, broken storage is the job's."""

    def __init__(self, sources: Sequence[SourceConfig], cache_uri: str) -> None:
        self.storages = {source.name: open_storage(source.uri) for source in sources}
        self.cache = open_storage(cache_uri)

    def __call__(self, plan: pa.Table) -> pa.Table:
        samples = []
        for row in plan.to_pylist():
            pictures = json.loads(row["pictures"])
            samples += [
                self._read(Sample(row["shard"], len(pictures), name, place), sha) for name, place, sha in pictures
            ]
        return to_table(samples)

    def _read(self, sample: Sample, expected_sha256: str) -> Sample:
        place = json.loads(sample.place)
        storage, sidecar = self.storages[place["source"]], place["sidecar"]
        try:
            data = storage.read_bytes(place["file"])
            caption = _caption_in(storage.read_bytes(sidecar), sidecar) if sidecar else ""
        except InputDataError as error:
            return sample.rejected("unreadable", str(error))
        except ValueError as error:
            return sample.rejected("unreadable caption", f"{sidecar}: {' '.join(str(error).split())}")
        digest = hashlib.sha256(data).hexdigest()
        if expected_sha256 and digest != expected_sha256:
            raise InputDataError(f"ingest: {sample.source} changed while the dataset was being made; run it again")
        return dataclasses.replace(sample, data=data, source_sha256=digest, caption=caption)


def ingest_stage(
    ds: ray.data.Dataset, sources: Sequence[SourceConfig], cache_uri: str, workers: WorkersConfig
) -> ray.data.Dataset:
    return map_shards(ds, Ingest(sources, cache_uri).__call__, num_cpus=workers.num_cpus)


def _pictures_of(source: SourceConfig) -> list[Picture]:
    storage = open_storage(source.uri)
    sizes = storage.sizes()
    pictures = []
    for name, size in sorted(sizes.items()):
        if name.lower().endswith(SUFFIXES) and source.takes(name):
            beside = [str(PurePosixPath(name).with_suffix(suffix)) for suffix in _SIDECAR_SUFFIXES]
            sidecar = next((sidecar for sidecar in beside if sidecar in sizes), "")
            place = json.dumps({"source": source.name, "file": name, "sidecar": sidecar})
            pictures.append(Picture(f"{source.name}/{name}", place, size, str(size)))
    if not pictures:
        held = f"{len(sizes)} files, none of them a picture" if sizes else "nothing, or does not exist"
        raise InputDataError(
            f"prepare: source {source.name}: {storage.uri} holds {held}; give a folder with {', '.join(SUFFIXES)} files"
        )
    return pictures


def _caption_in(data: bytes, sidecar: str) -> str:
    """The text of a .txt, or the "caption" of a .json. Raises ValueError when there is none to be read."""
    text = data.decode("utf-8")
    if sidecar.endswith(".json"):
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("caption"), str):
            raise ValueError('there is no "caption" in it')
        text = content["caption"]
    return " ".join(text.split())

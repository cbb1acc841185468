"""Stage 1: reads pictures.  [ingest] > filter > crop > caption > degrade > encode > write

In : one row per shard: {"shard": int, "pictures": JSON of [[name, place, sha256 or ""], ...]} (the plan of the driver).
Out: one row per picture: its bytes, their sha256, and what the files beside it say.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import pyarrow as pa
import ray.data

from pipelines.listing import Picture, list_pictures, storage_of
from pipelines.sources import SourceConfig
from pipelines.stages.sample import Sample, map_shards, to_table
from pipelines.stages.workers import WorkersConfig
from sr_platform.archives import read_place
from sr_platform.errors import InputDataError
from sr_platform.storage import open_storage

__all__ = ["Ingest", "Picture", "ingest_stage", "list_pictures"]

_READERS = 8


class UnreadableSidecarError(ValueError):
    """A file beside a picture that says nothing that can be understood."""


class Ingest:
    """Reads the pictures of a shard; a file that is gone is that picture's problem, broken storage is the job's."""

    def __init__(self, sources: Sequence[SourceConfig], cache_uri: str) -> None:
        self.storages = {source.name: storage_of(source) for source in sources}
        self.cache = open_storage(cache_uri)

    def __call__(self, plan: pa.Table) -> pa.Table:
        samples: list[Sample] = []
        # Several at once: from S3, most of the time of a read is waiting.
        with ThreadPoolExecutor(_READERS) as pool:
            for row in plan.to_pylist():
                pictures = json.loads(row["pictures"])
                plans = [(Sample(row["shard"], len(pictures), name, place), sha) for name, place, sha in pictures]
                samples += pool.map(lambda planned: self._read(*planned), plans)
        return to_table(samples)

    def _read(self, sample: Sample, expected_sha256: str) -> Sample:
        """Raises InputDataError when the picture is not the one that was measured."""
        place = json.loads(sample.place)
        storage = self.storages[place["source"]]
        try:
            data = read_place(storage, place["at"], self.cache)
        except InputDataError as error:
            return sample.rejected("unreadable", str(error))
        digest = hashlib.sha256(data).hexdigest()
        if expected_sha256 and digest != expected_sha256:
            raise InputDataError(f"ingest: {sample.source} changed while the dataset was being made; run it again")
        caption, meta = "", ""
        for name, where in place["beside"]:
            try:
                text, fields = parse_sidecar(name, read_place(storage, where, self.cache))
            except (InputDataError, UnreadableSidecarError) as error:
                return sample.rejected("unreadable caption", f"{name}: {error}")
            caption, meta = caption or text, meta or fields
        return dataclasses.replace(sample, data=data, source_sha256=digest, caption=caption, meta=meta)


def parse_sidecar(name: str, data: bytes) -> tuple[str, str]:
    """Caption and other fields, as a JSON object or "", of a .txt or .json file.

    Raises:
        UnreadableSidecarError: it is not UTF-8 or not JSON, or says nothing.
    """
    try:
        text: Any = data.decode("utf-8-sig")
        fields: dict[str, Any] = {}
        if name.endswith(".json"):
            fields = json.loads(text, parse_constant=_refuse_constant)
            text = fields.pop("caption", None) or "" if isinstance(fields, dict) and fields else None
        if not isinstance(text, str):
            raise UnreadableSidecarError('it must hold a JSON object with a text "caption" or other fields')
        caption = " ".join(text.split())
        caption.encode()  # JSON can spell halves of characters, which nothing later could write
    except (ValueError, RecursionError) as error:
        raise UnreadableSidecarError(" ".join(str(error).split())) from error
    return caption, json.dumps(fields, sort_keys=True) if fields else ""


def ingest_stage(
    ds: ray.data.Dataset, sources: Sequence[SourceConfig], cache_uri: str, workers: WorkersConfig
) -> ray.data.Dataset:
    return map_shards(ds, Ingest(sources, cache_uri).__call__, num_cpus=workers.num_cpus, name="ingest")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

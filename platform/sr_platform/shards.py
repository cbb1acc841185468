"""A prepared dataset: webdataset shards and the manifest that commits them.

    URI/shards/<name>-000000.tar  <key>.hq.png <key>.lq.png [<key>.lq1.png ...] <key>.json [<key>.latents.safetensors]
    URI/index.parquet             where in its shard every member of every sample lies
    URI/quarantine.jsonl          what was left out, and why
    URI/manifest.json             written last: what it names is complete

In : samples, (key, {"hq.png": bytes, ...})
Out: shards that are byte-identical for identical samples; sample_reader.py reads any sample by range.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from sr_platform.config import StrictConfig
from sr_platform.errors import InputDataError
from sr_platform.storage import open_storage

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.parquet"
QUARANTINE_NAME = "quarantine.jsonl"


class ShardInfo(StrictConfig):
    """One shard of a manifest."""

    name: str
    """Its file, relative to the dataset: shards/<name>-000000.tar."""
    sha256: str
    num_samples: int
    size_bytes: int


class SampleEntry(StrictConfig):
    """One sample of a shard: its row in the index."""

    key: str
    group: str = ""
    """What the recipe mixes by, such as nature and faces."""
    members: dict[str, tuple[int, int]]
    """Suffix -> (start, end) in bytes within the shard."""


class PackedShard(NamedTuple):
    """A tar, and where in it every sample's members lie."""

    data: bytes
    members: dict[str, dict[str, tuple[int, int]]]
    """Key -> suffix -> (start, end) in bytes."""


class Source(StrictConfig):
    """Where pictures came from."""

    name: str
    uri: str
    """Recorded for people; a copy of the same pictures elsewhere gives the same manifest digest."""
    licence: str
    terms: str = ""
    """What the licence asks of those who use the pictures, in a sentence."""
    homepage: str = ""
    group: str = ""
    """What the recipe mixes by, such as nature and faces."""
    num_pictures: int
    sha256: str
    """Over the names and contents of its pictures."""


class Manifest(StrictConfig):
    """What a prepared dataset holds and what it was made from."""

    format_version: int
    shards: list[ShardInfo]
    recipe: dict[str, Any]
    recipe_digest: str
    sources: list[Source]
    licences: list[str]
    counts: dict[str, int]
    """pictures, samples, and one entry per reason of quarantine."""
    mixture: dict[str, float] = pydantic.Field(default_factory=dict)
    """Group -> share of the draws in training; empty: every sample is drawn equally often."""
    index_sha256: str
    """Of index.parquet. It only repeats what the shards hold, so the digest leaves it out."""
    digest: str
    """Over everything above except where the sources lay."""

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)


def make_manifest(
    *,
    shards: Sequence[ShardInfo],
    recipe: Mapping[str, Any],
    sources: Sequence[Source],
    counts: Mapping[str, int],
    index_sha256: str,
    mixture: Mapping[str, float] | None = None,
) -> Manifest:
    """The manifest of these shards, its digests computed."""
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        shards=list(shards),
        recipe=dict(recipe),
        recipe_digest=json_digest(recipe),
        sources=list(sources),
        licences=sorted({source.licence for source in sources if source.licence}),
        counts=dict(sorted(counts.items())),
        mixture=dict(mixture or {}),
        index_sha256=index_sha256,
        digest="",
    )
    return manifest.model_copy(update={"digest": manifest_digest(manifest)})


def manifest_digest(manifest: Manifest) -> str:
    """sha256 of the manifest's content: the same data gives the same digest wherever it lies."""
    content = manifest.model_dump(
        mode="json", exclude={"digest": True, "index_sha256": True, "sources": {"__all__": {"uri"}}}
    )
    return json_digest(content)


def json_digest(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(uri: str, manifest: Manifest) -> None:
    """Publishes the manifest; from then on the dataset exists."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
    open_storage(uri).write_bytes_atomic(MANIFEST_NAME, text.encode())


def read_manifest(uri: str) -> Manifest:
    """The manifest of the dataset at `uri`.

    Raises:
        InputDataError: there is none, it is damaged, or its format is another.
    """
    storage = open_storage(uri)
    where = storage.path(MANIFEST_NAME)
    if not storage.exists(MANIFEST_NAME):
        raise InputDataError(
            f"shards: {where} does not exist, so {uri} is not a finished dataset; "
            f"run pipelines/prepare.py with --out {uri}"
        )
    try:
        manifest = Manifest.model_validate_json(storage.read_bytes(MANIFEST_NAME))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputDataError(
            f"shards: {where} is damaged ({place}: {first['msg']}); prepare the dataset again"
        ) from error
    if manifest.format_version != FORMAT_VERSION:
        raise InputDataError(
            f"shards: {where} has format {manifest.format_version}; this version reads {FORMAT_VERSION}; "
            "prepare the dataset again"
        )
    if manifest.digest != manifest_digest(manifest):
        raise InputDataError(f"shards: {where} was changed after it was written: its digest does not match its content")
    return manifest


def pack_shard(samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> PackedShard:
    """A webdataset tar of (key, members), byte-identical for the same samples in the same order."""
    buffer = io.BytesIO()
    places: dict[str, dict[str, tuple[int, int]]] = {}
    # tarfile directly: webdataset's writer does the same and imports torch, seconds in every worker.
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for key, members in samples:
            if not key or "." in key:
                raise ValueError(
                    f"shards: key {key!r} must be non-empty and without dots; webdataset splits names there"
                )
            for suffix, data in sorted(members.items()):
                # A fresh TarInfo names no user, no group and no time.
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size, info.mode = len(data), 0o444
                archive.addfile(info, io.BytesIO(data))
                end = buffer.tell() - (-len(data) % tarfile.BLOCKSIZE)
                places.setdefault(key, {})[suffix] = (end - len(data), end)
    return PackedShard(buffer.getvalue(), places)


def pack_index(entries: Sequence[Sequence[SampleEntry]]) -> bytes:
    """index.parquet of the entries of every shard, in the order of the manifest's shards: a row per sample."""
    rows = [(shard, entry) for shard, held in enumerate(entries) for entry in held]
    suffixes = sorted({suffix for _, entry in rows for suffix in entry.members})
    columns: dict[str, pa.Array] = {
        "key": pa.array([entry.key for _, entry in rows], pa.string()),
        "group": pa.array([entry.group for _, entry in rows], pa.string()),
        "shard": pa.array([shard for shard, _ in rows], pa.int32()),
    }
    for suffix in suffixes:
        places = [entry.members.get(suffix, (None, None)) for _, entry in rows]
        columns[f"{suffix}:start"] = pa.array([start for start, _ in places], pa.int64())
        columns[f"{suffix}:end"] = pa.array([end for _, end in places], pa.int64())
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()

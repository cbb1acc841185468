"""Publishes a dataset shard by shard, exactly once: `publish_shard` in workers, `commit_dataset` in the driver.

    shards/<name>-000012.tar    appears whole
    done/<name>-000012.json     then its marker: the shard, where its samples lie, what was left out of it
    index.parquet, quarantine.jsonl, manifest.json    when every marker is there; the markers go then

A killed run leaves shards and markers; the same run again redoes only shards without a marker and arrives at the same
bytes. Nothing counts as a dataset before its manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pydantic

from sr_platform.config import StrictConfig
from sr_platform.shards import (
    INDEX_NAME,
    QUARANTINE_NAME,
    Manifest,
    SampleEntry,
    ShardInfo,
    Source,
    make_manifest,
    pack_index,
    pack_shard,
    write_manifest,
)
from sr_platform.storage import Storage

DONE = "done/"
"""Folder of the markers of finished shards, while the dataset is unfinished."""


class Rejection(StrictConfig):
    """One line of quarantine.jsonl."""

    source: str
    """The picture's name in the whole run: "<source>/<path>"."""
    key: str = ""
    """Of the crop; empty when the whole picture was left out."""
    reason: str
    """A few words, the same for every case of its kind: they are counted."""
    detail: str


class ShardReport(StrictConfig):
    """What became of everything that was dealt to one shard."""

    index: int
    plan: str = ""
    """Digest of the plan it was made by: a shard of another plan is no part of this one."""
    shard: ShardInfo | None
    """None when nothing of it was usable: then no file is written."""
    entries: tuple[SampleEntry, ...] = ()
    rejections: tuple[Rejection, ...] = ()


def shard_name(name: str, index: int) -> str:
    return f"{name}-{index:06d}"


def publish_shard(
    storage: Storage,
    *,
    name: str,
    index: int,
    plan: str = "",
    samples: Iterable[tuple[str, Mapping[str, bytes]]],
    groups: Mapping[str, str] | None = None,
    rejections: Sequence[Rejection] = (),
) -> ShardReport:
    """Writes one shard and then its marker; doing it again, even at the same time elsewhere, gives the same bytes.

    `plan` is the digest of everything that decides what the shard holds; `samples` are (key, members); `groups` maps
    keys to the group they are mixed by.
    """
    packed = pack_shard(samples)
    file = f"shards/{shard_name(name, index)}.tar"
    info = None
    if packed.members:
        storage.write_bytes_atomic(file, packed.data)
        digest = hashlib.sha256(packed.data).hexdigest()
        info = ShardInfo(name=file, sha256=digest, num_samples=len(packed.members), size_bytes=len(packed.data))
    entries = tuple(
        SampleEntry(key=key, group=(groups or {}).get(key, ""), members=places)
        for key, places in packed.members.items()
    )
    report = ShardReport(index=index, plan=plan, shard=info, entries=entries, rejections=tuple(rejections))
    storage.write_bytes_atomic(f"{DONE}{shard_name(name, index)}.json", report.model_dump_json().encode())
    return report


def finished_shards(storage: Storage, *, name: str, plan: str = "") -> dict[int, ShardReport]:
    """The reports of all shards of a plan that are published whole, by index: their tars are there, not cut off."""
    markers = [marker for marker in storage.list(f"{DONE}{name}-") if marker.endswith(".json")]
    sizes = storage.sizes("shards/")
    reports = [_parse_marker(data) for data in storage.read_all(markers)]
    return {
        report.index: report
        for report in reports
        if report
        and report.plan == plan
        and (report.shard is None or sizes.get(report.shard.name) == report.shard.size_bytes)
    }


def commit_dataset(
    storage: Storage,
    reports: Sequence[ShardReport],
    *,
    recipe: Mapping[str, Any],
    sources: Sequence[Source],
    counts: Mapping[str, int],
    rejections: Sequence[Rejection] = (),
    mixture: Mapping[str, float] | None = None,
) -> Manifest:
    """Writes index, quarantine and, last, the manifest, then removes the markers.

    `counts` is completed by the number of samples and of every reason of quarantine; `rejections` are those that never
    reached a shard.
    """
    reports = sorted(reports, key=lambda report: report.index)
    rejected = [*rejections, *(rejection for report in reports for rejection in report.rejections)]
    index = pack_index([report.entries for report in reports if report.shard])
    storage.write_bytes_atomic(INDEX_NAME, index)
    storage.write_bytes_atomic(QUARANTINE_NAME, json_lines(rejection.model_dump() for rejection in rejected))
    shards = [report.shard for report in reports if report.shard]
    reasons = Counter(rejection.reason for rejection in rejected)
    manifest = make_manifest(
        shards=shards,
        recipe=recipe,
        sources=sources,
        counts={
            **counts,
            "samples": sum(shard.num_samples for shard in shards),
            **{f"quarantined: {reason}": count for reason, count in reasons.items()},
        },
        index_sha256=hashlib.sha256(index).hexdigest(),
        mixture=mixture,
    )
    write_manifest(storage.uri, manifest)
    remove_markers(storage)
    return manifest


def remove_markers(storage: Storage) -> None:
    """Removes what only an unfinished dataset needs."""
    storage.delete_all(DONE)


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """One JSON object per line, keys sorted."""
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()


def _parse_marker(data: bytes) -> ShardReport | None:
    try:
        return ShardReport.model_validate_json(data)
    except pydantic.ValidationError:
        # Of another version of this file: the shard is simply made again.
        return None

"""Shards are byte-identical for identical samples; a manifest commits them."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset as wds

from sr_platform.errors import InputDataError
from sr_platform.shards import (
    Manifest,
    SampleEntry,
    ShardInfo,
    Source,
    make_manifest,
    pack_index,
    pack_shard,
    read_manifest,
    write_manifest,
)

SAMPLES = [
    (
        f"{'deep/' * (i % 2)}key-{i}{'x' * (120 if i == 3 else 0)}",
        {"json": b"{}", "lq.png": b"l" * i, "hq.png": bytes(700 * i)},
    )
    for i in range(5)
]
SHARDS = [ShardInfo(name=f"shards/test-{i:06d}.tar", sha256=f"{i:064d}", num_samples=3, size_bytes=9) for i in (0, 1)]
SOURCE = Source(name="photographs", uri="/somewhere", licence="CC0", num_pictures=2, sha256="00")


def manifest_of(**changes: object) -> Manifest:
    content = {"shards": SHARDS, "recipe": {"seed": 0}, "sources": [SOURCE], "counts": {}, "index_sha256": "11"}
    return make_manifest(**{**content, **changes})  # type: ignore[arg-type]


def test_equal_samples_give_equal_bytes_whatever_the_order_of_their_members() -> None:
    reordered = [(key, dict(reversed(list(members.items())))) for key, members in SAMPLES]
    assert pack_shard(SAMPLES) == pack_shard(reordered)
    assert pack_shard(SAMPLES) != pack_shard(SAMPLES[::-1])
    # Of the bytes themselves: a shard that another version writes must not be taken for the same.
    digest = hashlib.sha256(pack_shard(SAMPLES).data).hexdigest()
    assert digest == "3b8a734ebea77272b1404cf2e667f33ebe9185b15a5cb537eedbaacc995eace5"


def test_every_member_lies_where_the_packed_shard_says() -> None:
    data, places = pack_shard(SAMPLES)
    assert list(places) == [key for key, _ in SAMPLES]
    for key, members in SAMPLES:
        assert {suffix: data[start:end] for suffix, (start, end) in places[key].items()} == members


def test_webdataset_reads_our_shards() -> None:
    stages = wds.tariterators.tar_file_expander([{"url": "x", "stream": io.BytesIO(pack_shard(SAMPLES).data)}])
    read = list(wds.tariterators.group_by_keys(stages))
    assert [(s["__key__"], s["hq.png"], s["lq.png"]) for s in read] == [
        (key, members["hq.png"], members["lq.png"]) for key, members in SAMPLES
    ]


@pytest.mark.parametrize("key", ["", "a.b"])
def test_keys_that_webdataset_would_split_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="without dots"):
        pack_shard([(key, {"json": b""})])


def test_the_index_has_a_row_per_sample_and_names_what_it_lacks() -> None:
    entries = [
        [SampleEntry(key="a", group="nature", members={"hq.png": (512, 600)})],
        [SampleEntry(key="b", members={"hq.png": (512, 700), "lq.png": (1536, 1600)})],
    ]
    table = pq.read_table(io.BytesIO(pack_index(entries)))
    assert table.to_pylist() == [
        {"key": "a", "group": "nature", "shard": 0, "hq.png:start": 512, "hq.png:end": 600}
        | {"lq.png:start": None, "lq.png:end": None},
        {"key": "b", "group": "", "shard": 1, "hq.png:start": 512, "hq.png:end": 700}
        | {"lq.png:start": 1536, "lq.png:end": 1600},
    ]
    assert pack_index(entries) == pack_index(entries)


def test_the_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = manifest_of(mixture={"nature": 1.0})
    write_manifest(str(tmp_path), manifest)
    assert read_manifest(str(tmp_path)) == manifest
    assert (manifest.num_samples, manifest.licences) == (6, ["CC0"])


def test_the_digest_follows_content_and_not_place() -> None:
    here = manifest_of()
    assert here.digest == manifest_of(sources=[SOURCE.model_copy(update={"uri": "s3://b/c"})]).digest
    assert here.digest == manifest_of(index_sha256="22").digest
    changed = [
        manifest_of(recipe={"seed": 1}),
        manifest_of(mixture={"nature": 1.0}),
        manifest_of(sources=[SOURCE.model_copy(update={"licence": "CC-BY"})]),
        manifest_of(shards=SHARDS[::-1]),
        manifest_of(counts={"pictures": 1}),
    ]
    assert len({here.digest, *(manifest.digest for manifest in changed)}) == 6
    assert [manifest.recipe_digest == here.recipe_digest for manifest in changed] == [False, True, True, True, True]


def test_a_missing_damaged_or_altered_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputDataError, match=r"manifest.json does not exist.*pipelines/prepare.py"):
        read_manifest(str(tmp_path))
    path = tmp_path / "manifest.json"
    path.write_text("{")
    with pytest.raises(InputDataError, match=r"manifest.json is damaged"):
        read_manifest(str(tmp_path))
    write_manifest(str(tmp_path), manifest_of())
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "shards": content["shards"][:1]}))
    with pytest.raises(InputDataError, match="was changed after it was written"):
        read_manifest(str(tmp_path))
    path.write_text(json.dumps({**content, "format_version": 7}))
    with pytest.raises(InputDataError, match="has format 7; this version reads 2"):
        read_manifest(str(tmp_path))

"""Shards are byte-identical for identical samples; a manifest commits them; a reader finds every sample again."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path

import pytest
import webdataset as wds

from sr_platform.errors import InputDataError
from sr_platform.shards import (
    Manifest,
    SampleReader,
    ShardInfo,
    Source,
    make_manifest,
    pack_shard,
    read_manifest,
    verify_shard,
    write_manifest,
)
from sr_platform.storage import open_storage

SAMPLES = [
    (
        f"{'deep/' * (i % 2)}key-{i}{'x' * (120 if i == 3 else 0)}",
        {"json": b"{}", "lq.png": b"l" * i, "hq.png": bytes(700 * i)},
    )
    for i in range(5)
]
SOURCE = Source(name="photographs", uri="/somewhere", licence="CC0", num_pictures=2, sha256="00")


def write_dataset(uri: str, *, uri_of_source: str = "/somewhere") -> Manifest:
    storage = open_storage(uri)
    shards = []
    for index, samples in enumerate((SAMPLES[:3], SAMPLES[3:])):
        data, name = pack_shard(samples), f"shards/test-{index:06d}.tar"
        storage.write_bytes_atomic(name, data)
        digest = hashlib.sha256(data).hexdigest()
        shards.append(ShardInfo(name=name, sha256=digest, num_samples=len(samples), size_bytes=len(data)))
    source = SOURCE.model_copy(update={"uri": uri_of_source})
    manifest = make_manifest(shards=shards, recipe={"seed": 0}, sources=[source], counts={"samples": 5})
    write_manifest(uri, manifest)
    return manifest


@pytest.fixture(params=["local", "s3"])
def dataset_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    uri = str(tmp_path / "set") if request.param == "local" else request.getfixturevalue("s3_uri") + "/set"
    write_dataset(uri)
    return uri


def test_equal_samples_give_equal_bytes_whatever_the_order_of_their_members() -> None:
    reordered = [(key, dict(reversed(list(members.items())))) for key, members in SAMPLES]
    assert pack_shard(SAMPLES) == pack_shard(reordered)
    assert pack_shard(SAMPLES) != pack_shard(SAMPLES[::-1])


def test_webdataset_reads_our_shards() -> None:
    stages = wds.tariterators.tar_file_expander([{"url": "x", "stream": io.BytesIO(pack_shard(SAMPLES))}])
    read = list(wds.tariterators.group_by_keys(stages))
    assert [(s["__key__"], s["hq.png"], s["lq.png"]) for s in read] == [
        (key, members["hq.png"], members["lq.png"]) for key, members in SAMPLES
    ]


@pytest.mark.parametrize("key", ["", "a.b"])
def test_keys_that_webdataset_would_split_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="without dots"):
        pack_shard([(key, {"json": b""})])


def test_the_reader_returns_every_sample_in_any_order(dataset_uri: str) -> None:
    reader = SampleReader(dataset_uri)
    assert len(reader) == 5
    assert reader.keys == [key for key, _ in SAMPLES]
    for index in (4, 0, 3, 1, 2, -1):
        assert reader[index] == SAMPLES[index][1]
    with pytest.raises(IndexError):
        reader[5]


def test_a_pickled_reader_reads_without_scanning_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(str(tmp_path))
    copied = pickle.dumps(SampleReader(str(tmp_path)))
    monkeypatch.setattr("sr_platform.shards._scan", None)
    assert pickle.loads(copied)[3] == SAMPLES[3][1]  # noqa: S301


def test_the_manifest_comes_back_as_it_was_written(dataset_uri: str) -> None:
    manifest = read_manifest(dataset_uri)
    assert manifest.num_samples == 5
    assert manifest.licences == ["CC0"]
    for shard in manifest.shards:
        verify_shard(open_storage(dataset_uri), shard)


def test_the_digest_follows_content_and_not_place(tmp_path: Path) -> None:
    here, there = write_dataset(str(tmp_path / "a")), write_dataset(str(tmp_path / "b"), uri_of_source="s3://b/c")
    assert here.digest == there.digest
    other = make_manifest(shards=here.shards, recipe={"seed": 1}, sources=here.sources, counts=here.counts)
    assert other.digest != here.digest
    assert other.recipe_digest != here.recipe_digest


def test_a_missing_damaged_or_altered_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputDataError, match=r"manifest.json does not exist.*pipelines/prepare.py"):
        read_manifest(str(tmp_path))
    path = tmp_path / "manifest.json"
    path.write_text("{")
    with pytest.raises(InputDataError, match=r"manifest.json is damaged"):
        read_manifest(str(tmp_path))
    write_dataset(str(tmp_path))
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "shards": content["shards"][:1]}))
    with pytest.raises(InputDataError, match="was changed after it was written"):
        read_manifest(str(tmp_path))
    path.write_text(json.dumps({**content, "format_version": 7}))
    with pytest.raises(InputDataError, match="has format 7; this version reads 1"):
        read_manifest(str(tmp_path))


def test_a_missing_cut_or_foreign_shard_is_named(tmp_path: Path) -> None:
    manifest = write_dataset(str(tmp_path))
    shard = tmp_path / manifest.shards[1].name
    data = shard.read_bytes()
    for damaged in (data[:3000], b"no tar at all" * 100):
        shard.write_bytes(damaged)
        with pytest.raises(InputDataError, match=r"test-000001.tar is not a readable tar"):
            SampleReader(str(tmp_path))
        with pytest.raises(InputDataError, match="differs from its manifest"):
            verify_shard(open_storage(tmp_path), manifest.shards[1])
    shard.write_bytes(pack_shard(SAMPLES[:1]))
    with pytest.raises(InputDataError, match="holds 1 samples, its manifest says 2"):
        SampleReader(str(tmp_path))
    shard.unlink()
    with pytest.raises(InputDataError, match=r"test-000001.tar does not exist"):
        SampleReader(str(tmp_path))

"""A dataset is published shard by shard, exactly once: what is there is whole, what is missing is made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sr_platform import storage as storage_module
from sr_platform.publication import (
    Rejection,
    ShardReport,
    commit_dataset,
    finished_shards,
    json_lines,
    publish_shard,
    remove_markers,
    shard_name,
)
from sr_platform.sample_reader import SampleReader
from sr_platform.shards import Manifest, Source
from sr_platform.storage import Storage, open_storage
from sr_platform.verification import verify_dataset

REJECTION = Rejection(source="wild/b.png", reason="too small", detail="12 x 9 px")
SOURCE = Source(name="wild", uri="/x", licence="CC0", num_pictures=9, sha256="00")


def samples_of(index: int) -> list[tuple[str, dict[str, bytes]]]:
    return [(f"s{index}-{i}", {"hq.png": bytes([index, i] * 900), "json": b"{}"}) for i in range(3)]


def publish(storage: Storage, index: int) -> ShardReport:
    """Shard 2 is one of which nothing is usable."""
    samples = [] if index == 2 else samples_of(index)
    groups = {key: "faces" if key.endswith("0") else "nature" for key, _ in samples}
    rejections = [REJECTION] if index else []
    return publish_shard(storage, name="t", index=index, samples=samples, groups=groups, rejections=rejections)


def commit(storage: Storage, reports: list[ShardReport]) -> Manifest:
    return commit_dataset(
        storage,
        reports,
        recipe={"seed": 0},
        sources=[SOURCE],
        counts={"pictures": 9},
        rejections=[REJECTION.model_copy(update={"reason": "duplicate"})],
        mixture={"faces": 0.5, "nature": 0.5},
    )


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "set" if request.param == "local" else request.getfixturevalue("s3_uri") + "/set")


def test_shards_are_named_by_their_number() -> None:
    assert shard_name("train", 12) == "train-000012"


def test_a_shard_appears_before_its_marker_and_both_say_the_same(storage: Storage) -> None:
    report = publish(storage, 1)
    assert report.shard is not None
    assert storage.list() == ["done/t-000001.json", "shards/t-000001.tar"]
    data = storage.read_bytes("shards/t-000001.tar")
    assert (len(data), hashlib.sha256(data).hexdigest()) == (report.shard.size_bytes, report.shard.sha256)
    assert finished_shards(storage, name="t") == {1: report}
    assert report.entries[0].group == "faces"


def test_nothing_usable_leaves_a_marker_and_no_shard(storage: Storage) -> None:
    assert publish(storage, 2).shard is None
    assert storage.list() == ["done/t-000002.json"]
    assert finished_shards(storage, name="t").keys() == {2}


def test_only_whole_shards_of_this_dataset_count_as_finished(storage: Storage) -> None:
    reports = {index: publish(storage, index) for index in range(5)}
    storage.delete("shards/t-000000.tar")
    storage.write_bytes_atomic("shards/t-000001.tar", b"cut off")
    storage.write_bytes_atomic("done/t-000003.json", b'{"of": "another version"}')
    storage.write_bytes_atomic("done/other-000009.json", b"{}")
    assert finished_shards(storage, name="t") == {2: reports[2], 4: reports[4]}


def test_publishing_again_in_any_order_gives_the_same_dataset(tmp_path: Path) -> None:
    here, there = open_storage(tmp_path / "a"), open_storage(tmp_path / "b")
    manifests = [
        commit(here, [publish(here, index) for index in (0, 1, 2, 3)]),
        commit(there, [publish(there, index) for index in (3, 1, 1, 2, 0, 3)][2:]),
    ]
    assert manifests[0] == manifests[1]
    assert {name: here.read_bytes(name) for name in here.list()} == {n: there.read_bytes(n) for n in there.list()}


def test_a_committed_dataset_holds_everything_once(storage: Storage) -> None:
    manifest = commit(storage, [publish(storage, index) for index in (1, 0, 2)])
    assert storage.list() == [
        "index.parquet",
        "manifest.json",
        "quarantine.jsonl",
        "shards/t-000000.tar",
        "shards/t-000001.tar",
    ]
    assert manifest.counts == {
        "pictures": 9,
        "samples": 6,
        "quarantined: duplicate": 1,
        "quarantined: too small": 2,
    }
    reader = SampleReader(storage.uri)
    assert reader.read_many(range(6)) == [members for index in (0, 1) for _, members in samples_of(index)]
    assert reader.mixture == {"faces": 0.5, "nature": 0.5}
    assert {name: indices.tolist() for name, indices in reader.groups.items()} == {
        "faces": [0, 3],
        "nature": [1, 2, 4, 5],
    }
    lines = [json.loads(line) for line in storage.read_bytes("quarantine.jsonl").splitlines()]
    assert [line["reason"] for line in lines] == ["duplicate", "too small", "too small"]
    assert verify_dataset(storage.uri) == []


def test_nothing_counts_as_a_dataset_before_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, written = open_storage(tmp_path), []
    write = Storage.write_bytes_atomic

    def record(self: Storage, name: str, data: bytes) -> None:
        written.append(name)
        write(self, name, data)

    monkeypatch.setattr(Storage, "write_bytes_atomic", record)
    commit(storage, [publish(storage, 0)])
    assert written == [
        "shards/t-000000.tar",
        "done/t-000000.json",
        "index.parquet",
        "quarantine.jsonl",
        "manifest.json",
    ]


def test_markers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    publish(storage, 0)
    remove_markers(storage)
    assert storage.list() == ["shards/t-000000.tar"]


def test_lines_of_json_have_their_keys_sorted() -> None:
    assert json_lines([{"b": 1, "a": "\u00fc"}, {}]) == b'{"a": "\\u00fc", "b": 1}\n{}\n'


def test_an_unsteady_server_changes_no_byte(
    faulty_s3: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.0)
    steady, server = open_storage(tmp_path), faulty_s3(seed=3, rate=0.3)
    unsteady = open_storage(f"{server.uri}/set")
    expected = commit(steady, [publish(steady, index) for index in range(4)])
    for index in range(4):
        publish(unsteady, index)
    reports = finished_shards(unsteady, name="t")
    assert commit(unsteady, list(reports.values())) == expected
    assert {name: steady.read_bytes(name) for name in steady.list()} == {
        name: unsteady.read_bytes(name) for name in unsteady.list()
    }
    assert sum(server.injected.values()) > 5

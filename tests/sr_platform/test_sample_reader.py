"""Any sample is found through the index, on a local disk, on S3 and in local copies of shards on S3."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sr_platform import shard_files
from sr_platform import storage as storage_module
from sr_platform.errors import InputDataError, RequestError
from sr_platform.publication import Rejection, commit_dataset, publish_shard
from sr_platform.sample_reader import SampleReader, find_sample, read_index
from sr_platform.shards import read_manifest
from sr_platform.storage import Storage, open_storage

RNG = np.random.default_rng(0)


def members_of(shard: int, i: int) -> dict[str, bytes]:
    """Every second sample has a variant; the sizes are such that neighbours are merged or not."""
    members = {"hq.png": RNG.bytes(3000 + 200_000 * (i == 2)), "lq.png": RNG.bytes(700 * i), "json": b'{"caption": ""}'}
    return members | ({"lq1.png": RNG.bytes(90)} if i % 2 else {})


SAMPLES = [(f"folder/s{shard}-{i}", members_of(shard, i)) for shard in range(3) for i in range(4)]
CONTENT = [members for _, members in SAMPLES]


def write_dataset(storage: Storage) -> str:
    reports = [
        publish_shard(
            storage,
            name="t",
            index=shard,
            samples=SAMPLES[4 * shard : 4 * shard + 4],
            groups={key: "faces" if key.endswith("3") else "nature" for key, _ in SAMPLES},
        )
        for shard in range(3)
    ]
    rejections = [Rejection(source="wild/c.png", key="c-000", reason="too small", detail="12 x 9 px")]
    mixture = {"faces": 0.5, "nature": 0.5}
    commit_dataset(storage, reports, recipe={}, sources=[], counts={}, rejections=rejections, mixture=mixture)
    return storage.uri


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return write_dataset(open_storage(tmp_path / "set"))


@pytest.fixture(params=["local", "s3", "cached"])
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> SampleReader:
    if request.param == "local":
        return SampleReader(request.getfixturevalue("uri"))
    there = write_dataset(open_storage(request.getfixturevalue("s3_uri") + "/set"))
    return SampleReader(there, tmp_path / "cache" if request.param == "cached" else None)


def test_every_sample_comes_back_in_any_order(reader: SampleReader) -> None:
    assert len(reader) == 12
    assert reader.keys == [key for key, _ in SAMPLES]
    assert reader[7] == CONTENT[7]
    order = [11, 0, 5, 5, 2, -1, 7, 3]
    assert reader.read_many(order) == [CONTENT[i] for i in order]
    assert reader.read_many([]) == []
    for index in (12, -13):
        with pytest.raises(IndexError, match="of 12"):
            reader[index]


def test_only_what_is_wanted_is_returned(reader: SampleReader) -> None:
    assert reader.suffixes(0) == ["hq.png", "json", "lq.png"]
    assert reader.suffixes(1) == ["hq.png", "json", "lq.png", "lq1.png"]
    assert reader.read_many([1, 4], ["lq.png"]) == [{"lq.png": CONTENT[i]["lq.png"]} for i in (1, 4)]
    wanted = [(5, ["lq1.png", "hq.png"]), (2, ["json"])]
    assert reader.read_members(wanted) == [{s: CONTENT[i][s] for s in suffixes} for i, suffixes in wanted]
    for suffix in ("lq1.png", "latents"):
        with pytest.raises(RequestError, match=f"sample folder/s0-0 has no {suffix}, only hq.png, json, lq.png"):
            reader.read_many([0], [suffix])


def test_groups_and_shares_come_from_the_dataset(reader: SampleReader) -> None:
    assert {name: found.tolist() for name, found in reader.groups.items()} == {
        "nature": [0, 1, 2, 4, 5, 6, 8, 9, 10],
        "faces": [3, 7, 11],
    }
    assert reader.mixture == {"faces": 0.5, "nature": 0.5}


def test_a_pickled_reader_reads_on_without_opening_the_dataset_again(reader: SampleReader, monkeypatch) -> None:
    reader.read_many([0, 4])
    copied = pickle.dumps(reader)
    monkeypatch.setattr(Storage, "read_bytes", None)
    assert pickle.loads(copied)[6] == CONTENT[6]  # noqa: S301


def test_opening_reads_the_manifest_and_the_index_and_no_shard(uri: str, monkeypatch) -> None:
    read: list[str] = []
    read_bytes = Storage.read_bytes
    monkeypatch.setattr(Storage, "read_bytes", lambda self, name: read.append(name) or read_bytes(self, name))
    monkeypatch.setattr(Storage, "read_range", None)
    SampleReader(uri)
    assert read == ["manifest.json", "index.parquet"]


def test_from_s3_each_sample_is_one_request_however_many_members_are_wanted(s3_uri: str, monkeypatch) -> None:
    monkeypatch.setattr(shard_files, "MAX_GAP_BYTES", 2000)
    reader = SampleReader(write_dataset(open_storage(s3_uri)))
    asked: list[tuple[str, int, int]] = []
    read_ranges = Storage.read_ranges
    monkeypatch.setattr(Storage, "read_ranges", lambda self, r: asked.extend(r) or read_ranges(self, r))
    reader.read_many([0, 5], ["hq.png", "json", "lq.png"])
    assert [name for name, _, _ in asked] == ["shards/t-000000.tar", "shards/t-000001.tar"]
    asked.clear()
    assert reader.read_members([(10, ["lq.png"]), (10, ["json"]), (2, ["hq.png"])])[0] == {
        "lq.png": CONTENT[10]["lq.png"]
    }
    # The large hq.png of sample 10 lies before what is wanted and is not read.
    assert [(name, end - start < 4000) for name, start, end in asked] == [
        ("shards/t-000000.tar", False),
        ("shards/t-000002.tar", True),
    ]


def test_a_missing_or_foreign_index_is_named(uri: str) -> None:
    path = Path(uri) / "index.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(InputDataError, match=r"index.parquet differs from its manifest.*prepare the dataset again"):
        SampleReader(uri)
    path.unlink()
    with pytest.raises(InputDataError, match=r"index.parquet does not exist"):
        SampleReader(uri)
    with pytest.raises(InputDataError, match=r"not a finished dataset; run pipelines/prepare.py"):
        SampleReader(uri + "-elsewhere")


def test_a_missing_or_cut_shard_is_named(reader: SampleReader) -> None:
    storage = reader.shard_files.storage
    name = reader.manifest.shards[1].name
    data = storage.read_bytes(name)
    storage.write_bytes_atomic(name, data[:5000])
    with pytest.raises(InputDataError, match=r"t-000001.tar .*differs from its manifest"):
        reader[6]
    storage.delete(name)
    reader = pickle.loads(pickle.dumps(reader))  # noqa: S301  # an open file would still be read
    with pytest.raises(InputDataError, match=r"t-000001.tar does not exist"):
        reader[6]
    assert reader[0] == CONTENT[0]


@pytest.mark.parametrize("is_cached", [False, True])
def test_an_unsteady_server_changes_no_sample(faulty_s3: Callable[..., Any], tmp_path, monkeypatch, is_cached) -> None:
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(storage_module, "CHUNK_BYTES", 50_000)
    server = faulty_s3(seed=5, rate=0.3)
    reader = SampleReader(write_dataset(open_storage(server.uri)), tmp_path if is_cached else None)
    before = sum(server.injected.values())
    for order in ([3, 9, 0, 5], [11, 2, 7, 8], [1, 4, 6, 10]):
        assert reader.read_many(order) == [CONTENT[i] for i in order]
    assert sum(server.injected.values()) > before


def test_the_index_finds_keys_and_places(uri: str) -> None:
    index = read_index(open_storage(uri), read_manifest(uri))
    assert (index.position("folder/s1-2"), index.position("s1-2")) == (6, None)
    shard, start, end = index.place(6, "json")
    data = (Path(uri) / "shards" / f"t-{shard:06d}.tar").read_bytes()
    assert data[start:end] == CONTENT[6]["json"]


def test_a_sample_is_found_by_its_key_and_its_absence_explained(uri: str) -> None:
    assert find_sample(uri, "folder/s2-1") == CONTENT[9]
    for key, message in [
        ("c-000", r"has no sample 'c-000'; it was left out: too small: 12 x 9 px"),
        ("wild/c.png", r"it was left out: too small"),
        ("s1", r"did you mean folder/s1-0, folder/s1-1, folder/s1-2\?"),
        ("zebra", r"its keys are folder/s0-0, folder/s0-1, folder/s0-2 \.\.\."),
    ]:
        with pytest.raises(InputDataError, match=message):
            find_sample(uri, key)

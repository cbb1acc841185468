"""Ranges are merged where that saves requests; shards on S3 are copied once, checked, and read locally from then on."""

from __future__ import annotations

import errno
import hashlib
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sr_platform import shard_files
from sr_platform import storage as storage_module
from sr_platform.errors import InputDataError
from sr_platform.shard_files import ShardFiles, fetch_shard, merge_ranges
from sr_platform.shards import ShardInfo
from sr_platform.storage import Storage, open_storage

DATA = [np.random.default_rng(i).bytes(100_000 + i) for i in range(5)]


def write_shards(storage: Storage) -> list[ShardInfo]:
    for i, data in enumerate(DATA):
        storage.write_bytes_atomic(f"shards/{i}.tar", data)
    return [
        ShardInfo(name=f"shards/{i}.tar", sha256=hashlib.sha256(data).hexdigest(), num_samples=1, size_bytes=len(data))
        for i, data in enumerate(DATA)
    ]


def random_ranges(count: int) -> list[tuple[int, int, int]]:
    rng = np.random.default_rng(1)
    shards, starts, lengths = rng.integers(0, 5, count), rng.integers(0, 90_000, count), rng.integers(1, 9000, count)
    return [(int(s), int(a), int(a + n)) for s, a, n in zip(shards, starts, lengths, strict=True)]


def test_ranges_are_merged_over_small_gaps_within_a_shard() -> None:
    ranges = [(1, 50, 60), (0, 10, 20), (0, 25, 30), (0, 12, 15), (0, 41, 45), (1, 50, 60)]
    assert merge_ranges(ranges, 10) == [(0, 10, 30), (0, 41, 45), (1, 50, 60)]
    assert merge_ranges(ranges, 0) == [(0, 10, 20), (0, 25, 30), (0, 41, 45), (1, 50, 60)]
    assert merge_ranges([], 10) == []


@pytest.mark.parametrize("gap", [0, 500, 10**9])
@pytest.mark.parametrize("place", ["local", "s3", "cached"])
def test_any_ranges_come_back_as_asked(place: str, gap: int, tmp_path: Path, request, monkeypatch) -> None:
    monkeypatch.setattr(shard_files, "MAX_GAP_BYTES", gap)
    storage = open_storage(tmp_path / "set" if place == "local" else request.getfixturevalue("s3_uri"))
    files = ShardFiles(storage, write_shards(storage), tmp_path / "cache" if place == "cached" else None)
    ranges = random_ranges(60)
    assert files.read(ranges) == [DATA[shard][start:end] for shard, start, end in ranges]
    assert files.read([]) == []


def test_threads_may_share_open_files_and_few_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "MAX_OPEN_FILES", 2)
    storage = open_storage(tmp_path)
    files, ranges = ShardFiles(storage, write_shards(storage)), random_ranges(400)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: files.read(ranges[n : n + 4]), range(0, 400, 4)))
    assert [data for datas in found for data in datas] == [DATA[shard][start:end] for shard, start, end in ranges]
    links = list(Path("/proc/self/fd").iterdir())
    assert sum(link.exists() and link.readlink().is_relative_to(tmp_path) for link in links) <= 2


def test_a_file_that_went_stale_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.0)
    storage = open_storage(tmp_path)
    files = ShardFiles(storage, write_shards(storage))
    files.read([(0, 0, 9)])
    stale, pread = files._open[0], shard_files.pread

    def mounted_anew(descriptor: int, start: int, end: int) -> bytes:
        if descriptor == stale.fileno():
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(descriptor, start, end)

    monkeypatch.setattr(shard_files, "pread", mounted_anew)
    assert files.read([(0, 0, 9)]) == [DATA[0][:9]]
    assert files._open[0] is not stale


@pytest.fixture
def on_s3(s3_uri: str) -> tuple[Storage, list[ShardInfo]]:
    storage = open_storage(s3_uri)
    return storage, write_shards(storage)


def test_a_shard_is_fetched_once_and_read_locally_from_then_on(on_s3, tmp_path: Path, monkeypatch) -> None:
    storage, shards = on_s3
    files = ShardFiles(storage, shards, tmp_path)
    files.read([(2, 0, 10), (4, 5, 9)])
    for name in [shards[2].name, shards[4].name]:
        storage.delete(name)
    assert pickle.loads(pickle.dumps(files)).read([(2, 50, 60), (4, 5, 9)]) == [DATA[2][50:60], DATA[4][5:9]]  # noqa: S301
    assert sorted(p.name for p in tmp_path.glob("*.tar")) == sorted(f"{shards[i].sha256}.tar" for i in (2, 4))
    assert list(tmp_path.glob("*.unfinished")) == []


def test_a_shard_that_is_not_the_manifests_is_never_kept(on_s3, tmp_path: Path) -> None:
    storage, shards = on_s3
    storage.write_bytes_atomic(shards[0].name, bytes(len(DATA[0])))
    with pytest.raises(InputDataError, match=r"shards/0.tar differs from its manifest"):
        fetch_shard(storage, shards[0], tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".lock"]


def test_what_a_killed_process_left_behind_does_no_harm(on_s3, tmp_path: Path) -> None:
    storage, shards = on_s3
    (tmp_path / f"{shards[0].sha256}.unfinished").write_bytes(b"half")
    (tmp_path / f"{shards[0].sha256}.tar").write_bytes(b"cut off by a power failure")
    assert fetch_shard(storage, shards[0], tmp_path).read_bytes() == DATA[0]


def test_whoever_wants_a_shard_at_the_same_time_it_is_fetched_once(faulty_s3, tmp_path: Path) -> None:
    server = faulty_s3(rate=0.0)
    storage = open_storage(server.uri)
    shards = write_shards(storage)
    before = server.num_requests
    with ThreadPoolExecutor(6) as pool:  # the lock is one between open files: threads compete as processes do
        paths = list(pool.map(lambda _: fetch_shard(storage, shards[3], tmp_path), range(6)))
    assert {path.read_bytes() for path in paths} == {DATA[3]}
    assert server.num_requests - before == 2  # its size, and its bytes

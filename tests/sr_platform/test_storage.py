"""Storage keeps the same promises on a local folder and on a real S3 server."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import aiohttp
import botocore.exceptions
import botocore.parsers
import pytest

from sr_platform import s3
from sr_platform import storage as storage_module
from sr_platform.errors import InputDataError, RequestError, StorageError
from sr_platform.storage import Storage, open_storage

PART = 5 * 2**20
"""The smallest that S3 takes."""


@pytest.fixture(params=["path", "file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        return open_storage(request.getfixturevalue("s3_uri") + "/some/prefix/")
    return open_storage(tmp_path / "a b" if request.param == "path" else f"file://{tmp_path}/a%20b")


def test_what_was_written_is_read_back_listed_and_measured(storage: Storage) -> None:
    storage.write_bytes_atomic("shards/a-0.tar", b"0123456789")
    storage.write_bytes_atomic("manifest.json", b"{}")
    assert storage.read_bytes("shards/a-0.tar") == b"0123456789"
    assert storage.read_range("shards/a-0.tar", 2, 5) == b"234"
    assert storage.read_range("shards/a-0.tar", 4, 4) == b""
    assert storage.list() == ["manifest.json", "shards/a-0.tar"]
    assert storage.list("shards/") == storage.list("sha") == ["shards/a-0.tar"]
    assert storage.sizes() == {"manifest.json": 2, "shards/a-0.tar": 10}
    assert storage.size("shards/a-0.tar") == 10
    assert storage.exists("manifest.json")
    assert not storage.exists("shards")


def test_many_files_are_read_in_order_and_removed_together(storage: Storage) -> None:
    names = [f"done/{index:03d}.json" for index in range(40)]
    for index, name in enumerate(names):
        storage.write_bytes_atomic(name, str(index).encode())
    storage.write_bytes_atomic("kept.json", b"{}")
    assert storage.read_all(names[::-1]) == tuple(str(index).encode() for index in reversed(range(40)))
    storage.delete_all("done/")
    storage.delete_all("nothing/")
    assert storage.list() == ["kept.json"]
    with pytest.raises(InputDataError, match=r"000\.json does not exist"):
        storage.read_all(names[:1])


def test_a_second_write_replaces_the_first_and_delete_removes(storage: Storage) -> None:
    storage.write_bytes_atomic("x", b"one")
    storage.write_bytes_atomic("x", b"")
    assert storage.read_bytes("x") == b""
    storage.delete("x")
    storage.delete("x")
    assert storage.list() == []


def test_another_process_can_open_the_same_storage(storage: Storage) -> None:
    storage.write_bytes_atomic("x", b"1")
    copy = pickle.loads(pickle.dumps(storage))  # noqa: S301
    assert (copy.uri, copy.read_bytes("x")) == (storage.uri, b"1")


def test_nothing_there_is_an_empty_list_and_a_clear_refusal_to_read(storage: Storage) -> None:
    assert storage.list() == []
    assert not storage.exists("x")
    for call in (lambda: storage.read_bytes("x"), lambda: storage.read_range("x", 0, 2), lambda: storage.size("x")):
        with pytest.raises(InputDataError, match="x does not exist"):
            call()


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x"])
def test_a_name_cannot_leave_the_storage(storage: Storage, name: str) -> None:
    with pytest.raises(RequestError, match="is not the name of a file below"):
        storage.read_bytes(name)


def test_a_missing_bucket_lists_nothing_and_cannot_be_read(s3_uri: str) -> None:
    storage = open_storage(s3_uri + "-of-nobody")
    assert storage.list() == []
    with pytest.raises(InputDataError, match="does not exist"):
        storage.read_bytes("x")


@pytest.mark.parametrize("uri", ["gs://bucket/x", "http://host/x", "s3://", ""])
def test_other_schemes_are_refused_with_what_is_allowed(uri: str) -> None:
    with pytest.raises(RequestError, match="s3://bucket/prefix"):
        open_storage(uri)


def test_local_uris_become_absolute_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = open_storage("data/")
    assert relative.uri == str(tmp_path / "data") == open_storage(f"file://{tmp_path}/data").uri


def test_a_failed_local_write_leaves_the_old_file_and_no_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path)
    storage.write_bytes_atomic("x", b"old")
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.0)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(StorageError, match=r"x still failed after 10 attempts: .*No space left"):
        storage.write_bytes_atomic("x", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert storage.read_bytes("x") == b"old"


def test_unfinished_files_of_a_killed_writer_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-123").write_bytes(b"half")
    assert open_storage(tmp_path).list() == []


class Unsteady:
    """A read that fails a number of times before it works."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self) -> bytes:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return b"1"


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error"),
        ConnectionResetError("cut"),
        TimeoutError(),
        aiohttp.ClientPayloadError("Response payload is not completed"),
        botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"),
        botocore.exceptions.ClientError({"Error": {"Code": "SlowDown"}}, "GetObject"),
        botocore.parsers.ResponseParserError("half an answer"),
        s3.ShortReadError("3 of 5 bytes arrived"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_passing_failures_are_waited_out(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    unsteady = Unsteady(9, error)
    monkeypatch.setattr(Path, "read_bytes", lambda path: unsteady())
    assert open_storage(tmp_path).read_bytes("x") == b"1"
    assert unsteady.calls == 10
    # About a minute in all, in waits that grow up to a limit and differ from worker to worker.
    assert 30 < sum(waits) < 90
    assert all(0.75 * w <= actual <= 1.25 * w for w, actual in zip((0.2, 0.4, 0.8, 1.6, 3.2), waits, strict=False))
    assert max(waits) <= 1.25 * storage_module.LONGEST_WAIT_S


def test_lasting_failures_and_refusals_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.0)
    storage = open_storage(tmp_path)
    broken = Unsteady(99, ConnectionResetError("cut"))
    monkeypatch.setattr(Path, "read_bytes", lambda path: broken())
    with pytest.raises(StorageError, match="x still failed after 10 attempts: cut"):
        storage.read_bytes("x")
    refused = Unsteady(99, PermissionError("Forbidden"))
    monkeypatch.setattr(Path, "read_bytes", lambda path: refused())
    with pytest.raises(RequestError, match="refused: Forbidden; check credentials"):
        storage.read_bytes("x")
    assert refused.calls == 1


def test_a_file_in_the_place_of_a_folder_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"")
    with pytest.raises(RequestError, match=r"data/x.*a file is where a folder should be|data/x does not exist"):
        open_storage(tmp_path / "data").write_bytes_atomic("x", b"1")


def test_a_large_file_is_read_in_pieces(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "CHUNK_BYTES", 1000)
    data = bytes(range(256)) * 40
    storage.write_bytes_atomic("x", data)
    pieces = list(storage.read_chunks("x"))
    assert b"".join(pieces) == data
    assert [len(piece) for piece in pieces] == [1000] * 10 + [240]
    assert storage.read_ranges([("x", 500, 600), ("x", 0, 3), ("x", 10200, 99999)]) == [
        data[500:600],
        data[:3],
        data[10200:],
    ]


@pytest.mark.parametrize("size_bytes", [0, 1, PART, PART + 1, 2 * PART + 7])
def test_a_large_file_is_published_from_pieces_of_any_size(
    storage: Storage, size_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "PART_BYTES", PART)
    data = random.Random(0).randbytes(size_bytes)  # noqa: S311
    storage.write_bytes_atomic("x", b"old")
    cuts = [0, *sorted(random.Random(1).sample(range(size_bytes + 1), min(5, size_bytes + 1))), size_bytes]  # noqa: S311
    storage.write_chunks("x", (data[start:end] for start, end in pairwise(cuts)))
    assert storage.read_bytes("x") == data
    assert storage.list() == ["x"]


def test_a_large_file_that_breaks_off_leaves_the_old_one(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "PART_BYTES", PART)
    storage.write_bytes_atomic("x", b"old")

    def broken() -> Iterator[bytes]:
        yield bytes(2 * PART)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        storage.write_chunks("x", broken())
    assert storage.read_bytes("x") == b"old"
    assert storage.list() == ["x"]


def test_threads_may_share_a_storage(storage: Storage) -> None:
    names = [f"f{i}" for i in range(40)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: storage.write_bytes_atomic(name, name.encode() * 1000), names))
        assert list(pool.map(storage.read_bytes, names)) == [name.encode() * 1000 for name in names]
    assert storage.sizes() == {name: 1000 * len(name) for name in names}


def test_files_are_found_through_links_and_links_to_nowhere_are_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "broken").symlink_to("nowhere")
    assert open_storage(tmp_path).list() == ["file", "link"]

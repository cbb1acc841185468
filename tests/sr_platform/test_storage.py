"""Storage keeps the same promises on a local folder and on a real S3 server."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from sr_platform import storage as storage_module
from sr_platform.errors import InputDataError, RequestError, StorageError
from sr_platform.storage import Storage, open_storage


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


def test_an_s3_file_is_published_by_a_single_put(s3_uri: str) -> None:
    data = bytes(12 * 2**20)
    storage = open_storage(s3_uri)
    storage.write_bytes_atomic("large.tar", data)
    # An upload in parts would carry the number of parts in its tag: "...-3".
    assert "-" not in storage._filesystem().info(f"{s3_uri}/large.tar")["ETag"]
    assert storage.size("large.tar") == len(data)


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
    with pytest.raises(StorageError, match=r"x still failed after 4 attempts: .*No space left"):
        storage.write_bytes_atomic("x", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert storage.read_bytes("x") == b"old"


def test_unfinished_files_of_a_killed_writer_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-123").write_bytes(b"half")
    assert open_storage(tmp_path).list() == []


class Unsteady:
    """A filesystem that fails a number of times before it works."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return bytes(LocalFileSystem().cat_file(path, **kwargs))


def test_passing_failures_are_retried_and_lasting_ones_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.0)
    storage = open_storage(tmp_path)
    storage.write_bytes_atomic("x", b"1")
    unsteady = Unsteady(3, OSError("SlowDown"))
    monkeypatch.setattr(Storage, "_filesystem", lambda self: unsteady)
    assert storage.read_bytes("x") == b"1"
    assert unsteady.calls == 4
    broken = Unsteady(99, ConnectionResetError("cut"))
    monkeypatch.setattr(Storage, "_filesystem", lambda self: broken)
    with pytest.raises(StorageError, match="still failed after 4 attempts: cut"):
        storage.read_bytes("x")
    refused = Unsteady(99, PermissionError("Forbidden"))
    monkeypatch.setattr(Storage, "_filesystem", lambda self: refused)
    with pytest.raises(RequestError, match="refused: Forbidden; check credentials"):
        storage.read_bytes("x")
    assert refused.calls == 1

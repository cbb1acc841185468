"""Against a real S3 server, and the same server behind a proxy that refuses, throttles, resets and cuts."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import numpy as np
import pytest

from sr_platform import s3
from sr_platform import storage as storage_module
from sr_platform.errors import InputDataError, RequestError, StorageError
from sr_platform.storage import open_storage

DATA = np.random.default_rng(0).bytes(200_000)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.0)


def test_a_file_is_published_by_a_single_put(s3_uri: str) -> None:
    data = bytes(12 * 2**20)
    storage = open_storage(s3_uri)
    storage.write_bytes_atomic("large.tar", data)
    # An upload in parts would carry the number of parts in its tag: "...-3".
    assert "-" not in s3.filesystem(os.getpid()).info(f"{s3_uri}/large.tar")["ETag"]
    assert storage.size("large.tar") == len(data)


def test_what_s3_does_not_take_in_one_piece_is_refused_at_once(s3_uri: str) -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return 6 * 2**30

    with pytest.raises(RequestError, match=r"x.tar would have 6.0 GiB .* at most 5 GiB at once; make smaller shards"):
        open_storage(s3_uri).write_bytes_atomic("x.tar", Huge())


def test_a_listing_goes_on_over_pages_and_leaves_folder_marks_out(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PAGE_KEYS", 3)
    storage = open_storage(f"{s3_uri}/set")
    names = [f"a/{i:02d} +%.tar" for i in range(10)]
    for name in names:
        storage.write_bytes_atomic(name, name.encode())
    s3.write(f"{s3_uri}/set/b/", b"")
    s3.write(f"{s3_uri}/settings", b"of somebody else")
    assert storage.sizes() == {name: len(name) for name in names}


def test_a_range_ends_where_the_object_ends(s3_uri: str) -> None:
    s3.write(f"{s3_uri}/x", b"0123456789")
    s3.write(f"{s3_uri}/empty", b"")
    assert s3.read_range(f"{s3_uri}/x", 7, 99) == b"789"
    assert s3.read_range(f"{s3_uri}/x", 10, 12) == b""
    assert s3.read_range(f"{s3_uri}/empty", 0, None) == b""


@pytest.mark.parametrize("seed", [1, 2])
def test_everything_works_on_a_server_that_spoils_every_third_request(
    faulty_s3: Callable[..., Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PAGE_KEYS", 4)
    monkeypatch.setattr(storage_module, "CHUNK_BYTES", 30_000)
    server = faulty_s3(seed=seed, rate=0.33)
    storage = open_storage(f"{server.uri}/set")
    for i in range(12):
        storage.write_bytes_atomic(f"x{i:02d}", DATA[i:])
    assert storage.sizes() == {f"x{i:02d}": len(DATA) - i for i in range(12)}
    assert all(storage.read_bytes(f"x{i:02d}") == DATA[i:] for i in range(12))
    assert all(storage.read_range("x00", i, 50_000) == DATA[i:50_000] for i in range(12))
    assert storage.read_ranges([("x01", 100 * i, 100 * i + 70_000) for i in range(12)]) == [
        DATA[100 * i + 1 : 100 * i + 70_001] for i in range(12)
    ]
    assert b"".join(storage.read_chunks("x03")) == DATA[3:]
    assert all(storage.exists(f"x{i:02d}") and not storage.exists(f"y{i}") for i in range(12))
    for i in range(11):
        storage.delete(f"x{i:02d}")
    assert storage.list() == ["x11"]
    assert {fault for _, fault in server.injected} == set(server.FAULTS)
    assert {method for method, _ in server.injected} == {"GET", "PUT", "HEAD", "DELETE"}
    assert sum(server.injected.values()) > 0.25 * server.num_requests


@pytest.mark.parametrize("seed", [1, 2])
def test_a_large_file_arrives_in_parts_on_a_server_that_spoils_every_third_request(
    faulty_s3: Callable[..., Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "PART_BYTES", 5 * 2**20)
    server = faulty_s3(seed=seed, rate=0.33)
    storage, data = open_storage(server.uri), np.random.default_rng(seed).bytes(17 * 2**20)
    storage.write_chunks("x", (data[i : i + 2**20] for i in range(0, len(data), 2**20)))
    server.rate = 0.0
    assert storage.read_bytes("x") == data
    assert s3.filesystem(os.getpid()).info(f"{server.uri}/x")["ETag"].endswith('-4"')
    assert server.injected.keys() & {("POST", "lost"), ("POST", "reset"), ("POST", "503"), ("POST", "500")}


@pytest.mark.parametrize("fault", ["lost", "cut"])
def test_an_upload_counts_though_the_answer_that_says_so_is_lost(
    faulty_s3: Callable[..., Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "PART_BYTES", 5 * 2**20)
    server = faulty_s3(rate=0.0, faults=(fault,))
    storage, finish = open_storage(server.uri), s3.finish_upload

    def lose_the_first_answer(*args: Any) -> None:
        if server.injected:
            server.rate = 0.0
            raise FileNotFoundError("NoSuchUpload")  # what AWS answers; the server here finishes once more
        server.rate = 1.0
        finish(*args)

    monkeypatch.setattr(s3, "finish_upload", lose_the_first_answer)
    storage.write_chunks("x", [bytes(12 * 2**20)])
    assert server.injected == {("POST", fault): 1}
    assert storage.sizes() == {"x": 12 * 2**20}


def test_an_upload_that_fails_for_good_is_given_up(
    faulty_s3: Callable[..., Any], s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "PART_BYTES", 5 * 2**20)
    server = faulty_s3(rate=0.0)
    part = s3.write_part

    def refuse_the_second(path: str, upload: str, number: int, data: bytes) -> dict[str, Any]:
        if number == 2:
            raise ConnectionResetError("cut")
        return part(path, upload, number, data)

    monkeypatch.setattr(s3, "write_part", refuse_the_second)
    with pytest.raises(StorageError, match="x still failed after 10 attempts: cut"):
        open_storage(server.uri).write_chunks("x", [bytes(12 * 2**20)])
    assert open_storage(server.uri).list() == []
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    assert "Uploads" not in client.list_multipart_uploads(Bucket=server.uri.removeprefix("s3://"))


def test_many_threads_get_through_a_server_that_throttles(faulty_s3: Callable[..., Any]) -> None:
    server = faulty_s3(rate=0.4, faults=("503",))
    storage = open_storage(server.uri)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: storage.write_bytes_atomic(f"x{i}", DATA[i:1000]), range(48)))
        assert list(pool.map(lambda i: storage.read_bytes(f"x{i}"), range(48))) == [DATA[i:1000] for i in range(48)]
    assert server.injected.keys() == {("PUT", "503"), ("GET", "503")}


@pytest.mark.parametrize("fault", ["500", "503", "reset", "lost", "cut", "short"])
def test_no_fault_is_taken_for_an_answer(faulty_s3: Callable[..., Any], fault: str) -> None:
    server = faulty_s3(rate=0.0, faults=(fault,))
    storage = open_storage(server.uri)
    storage.write_bytes_atomic("x", DATA)
    server.rate = 1.0
    calls: list[Callable[[], Any]] = [lambda: storage.read_bytes("x"), lambda: storage.read_range("x", 5, 5000)]
    if fault != "short":
        calls += [lambda: storage.exists("x"), storage.list, lambda: storage.delete("x"), lambda: storage.size("y")]
        calls += [lambda: storage.write_bytes_atomic("y", DATA), lambda: storage.list("missing/")]
    for call in calls:
        with pytest.raises(StorageError, match="still failed after 10 attempts"):
            call()
    server.rate = 0.0
    # What was lost on the way back had been done.
    assert storage.list() == {"lost": ["y"], "cut": ["y"]}.get(fault, ["x"])


def test_a_missing_bucket_is_absent_for_reading_and_empty_for_listing(s3_uri: str) -> None:
    storage = open_storage(s3_uri + "-of-nobody")
    assert (storage.list(), storage.exists("x")) == ([], False)
    storage.delete("x")
    with pytest.raises(InputDataError, match="does not exist"):
        storage.write_bytes_atomic("x", b"")


def test_credentials_that_cannot_work_are_named_at_once(
    s3_uri: str, forgetful_s3: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 1e6)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    forgetful_s3()
    with pytest.raises(RequestError, match=r"x is refused: .*nobody.*; check credentials"):
        open_storage(s3_uri).read_bytes("x")
    monkeypatch.delenv("AWS_PROFILE")
    forgetful_s3()
    with pytest.raises(RequestError, match=r"is refused: .*bucket name"):
        open_storage("s3://No Bucket!").read_bytes("x")

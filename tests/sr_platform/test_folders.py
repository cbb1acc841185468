"""Folders are complete or absent, on a local disk, on a real S3 server and on one that spoils requests."""

from __future__ import annotations

import hashlib
import multiprocessing
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sr_platform import folders, s3
from sr_platform import storage as storage_module
from sr_platform.errors import InputDataError, RequestError, StorageError
from sr_platform.folders import (
    LISTING_NAME,
    fetch_folder,
    folder_digest,
    folder_exists,
    publish_folder,
    published_digest,
    read_listing,
)
from sr_platform.storage import Storage, open_storage

FILES = {
    "model_index.json": b"{}",
    "unet/weights.safetensors": np.random.default_rng(0).bytes(300_000),
    "unet/config.json": b"",
    "README.md": b"# Model\n",
}


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "made", FILES)


@pytest.fixture(params=["local", "s3"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    base = request.getfixturevalue("s3_uri") if request.param == "s3" else str(tmp_path / "published")
    return f"{base}/models/unified"


def write_files(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def content(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in open_storage(path).list() if name != LISTING_NAME}


def test_a_published_folder_is_fetched_as_it_was(folder: Path, target: str, tmp_path: Path) -> None:
    assert not folder_exists(target)
    digest = publish_folder(folder, target)
    assert folder_exists(target)
    fetched = fetch_folder(target, tmp_path / "cache")
    assert content(fetched) == FILES
    assert digest == folder_digest(folder) == folder_digest(fetched) == read_listing(target).digest
    assert read_listing(target).size_bytes == sum(map(len, FILES.values()))
    assert content(folder) == FILES


def test_the_digest_is_that_of_the_lines_of_sha256sum(folder: Path) -> None:
    printed = subprocess.run(["sha256sum", *sorted(FILES)], cwd=folder, check=True, capture_output=True).stdout
    assert folder_digest(folder) == hashlib.sha256(printed).hexdigest()


def test_another_folder_replaces_all_of_the_first(folder: Path, target: str, tmp_path: Path) -> None:
    first = publish_folder(folder, target)
    other = {"model_index.json": b"[]", "vae/config.json": b"{}"}
    second = publish_folder(write_files(tmp_path / "other", other), target)
    assert second != first
    assert open_storage(target).list() == sorted([LISTING_NAME, *other])
    assert content(fetch_folder(target, tmp_path / "cache")) == other
    assert not [path for path in tmp_path.rglob("*") if "unfinished" in path.name or "old" in path.name]


def test_the_same_folder_again_is_no_work(folder: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = publish_folder(folder, target)
    monkeypatch.setattr(Storage, "write_chunks", lambda *_: pytest.fail("written again"))
    assert publish_folder(folder, target) == digest


def test_a_folder_that_is_needed_no_more_is_moved(folder: Path, target: str, tmp_path: Path) -> None:
    publish_folder(write_files(tmp_path / "before", {"a": b"1"}), target)
    digest = folder_digest(folder)
    assert publish_folder(folder, target, may_move=True) == digest == published_digest(target)
    assert content(fetch_folder(target, tmp_path / "cache")) == FILES
    assert folder.exists() == target.startswith("s3://")


def test_a_publication_that_breaks_off_is_none(folder: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Storage.write_chunks

    def refuse_weights(storage: Storage, name: str, chunks: Any) -> None:
        if name.endswith(".safetensors"):
            raise StorageError("storage: no room")
        write(storage, name, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_chunks", refuse_weights)
        with pytest.raises(StorageError, match="no room"):
            publish_folder(folder, target)
    assert not folder_exists(target)
    with pytest.raises(InputDataError, match="holds no complete folder"):
        read_listing(target)
    publish_folder(folder, target)
    assert folder_exists(target)


def test_a_failed_replacement_leaves_a_local_folder_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = str(tmp_path / "published")
    publish_folder(folder, target)
    other = write_files(tmp_path / "other", {"a": b"1"})
    monkeypatch.setattr(folders, "_copy_file", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        publish_folder(other, target)
    assert content(Path(target)) == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "other", "published"]


def test_a_local_folder_is_used_where_it_lies(folder: Path) -> None:
    assert fetch_folder(str(folder)) == fetch_folder(folder.as_uri()) == folder


def test_a_copy_is_made_once_and_made_again_when_somebody_tidied_up(
    folder: Path, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_folder(folder, f"{s3_uri}/m")
    fetched = fetch_folder(f"{s3_uri}/m", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_download", lambda *_: pytest.fail("downloaded again"))
        assert fetch_folder(f"{s3_uri}/m", tmp_path / "cache") == fetched
    (fetched / "unet" / "weights.safetensors").unlink()
    assert content(fetch_folder(f"{s3_uri}/m", tmp_path / "cache")) == FILES


def test_what_a_killed_download_left_is_not_taken_for_a_copy(folder: Path, s3_uri: str, tmp_path: Path) -> None:
    digest = publish_folder(folder, f"{s3_uri}/m")
    write_files(tmp_path / "cache" / f".m-{digest[:16]}.unfinished", {"stale": b"", "README.md": b"half"})
    assert content(fetch_folder(f"{s3_uri}/m", tmp_path / "cache")) == FILES


def test_a_damaged_file_is_refused_and_leaves_nothing_behind(folder: Path, s3_uri: str, tmp_path: Path) -> None:
    publish_folder(folder, f"{s3_uri}/m")
    s3.write(f"{s3_uri}/m/README.md", b"# Modem\n")
    with pytest.raises(InputDataError, match=r"m/README.md differs from its listing"):
        fetch_folder(f"{s3_uri}/m", tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("listing", [b"{", b"[]", b'{"files": {"x": {}}}'])
def test_a_damaged_listing_is_named(s3_uri: str, listing: bytes) -> None:
    s3.write(f"{s3_uri}/m/{LISTING_NAME}", listing)
    with pytest.raises(InputDataError, match=r"complete.json is damaged"):
        fetch_folder(f"{s3_uri}/m")


def test_a_listing_cannot_write_outside_the_cache(s3_uri: str, tmp_path: Path) -> None:
    name = b'{"files": {"../../x": {"size_bytes": 1, "sha256": ""}}}'
    s3.write(f"{s3_uri}/m/{LISTING_NAME}", name)
    with pytest.raises(RequestError, match="is not the name of a file below"):
        fetch_folder(f"{s3_uri}/m", tmp_path / "cache")


def fetched_content(uri: str, cache: Path) -> tuple[str, dict[str, bytes]]:
    path = fetch_folder(uri, cache)
    return path.name, content(path)


def test_processes_of_one_machine_share_a_copy(folder: Path, s3_uri: str, tmp_path: Path) -> None:
    publish_folder(folder, f"{s3_uri}/m")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.starmap(fetched_content, [(f"{s3_uri}/m", tmp_path / "cache")] * 3)
    assert all(result == results[0] for result in results)
    assert results[0][1] == FILES
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", ".lock"]


@pytest.mark.parametrize("seed", [1, 2])
def test_folders_pass_a_server_that_spoils_every_tenth_request(
    faulty_s3: Callable[..., Any], seed: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(storage_module, "CHUNK_BYTES", 2**20)
    large = np.random.default_rng(seed).bytes(12 * 2**20)
    write_files(folder, {"vae.safetensors": large} | {f"tokenizer/{i}": b"1" * i for i in range(20)})
    server = faulty_s3(seed=seed, rate=0.1)
    digest = publish_folder(folder, f"{server.uri}/m")
    fetched = fetch_folder(f"{server.uri}/m", tmp_path / "cache")
    assert folder_digest(fetched) == digest
    assert content(fetched) == content(folder)
    assert sum(server.injected.values()) > 3


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_what_is_not_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(InputDataError, match="is not a folder with files in it"):
        publish_folder(tmp_path / name, str(tmp_path / "target"))
    if name != "empty":
        with pytest.raises(InputDataError, match="is not a folder; give one"):
            fetch_folder(str(tmp_path / name))


def test_a_file_is_not_replaced_by_a_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(RequestError, match="file is a file; give another place"):
        publish_folder(folder, str(tmp_path / "file"))

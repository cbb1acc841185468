"""Every byte of a dataset is compared with what its manifest and its index promise."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sr_platform import storage as storage_module
from sr_platform.errors import InputDataError
from sr_platform.shards import make_manifest, pack_shard, read_manifest, write_manifest
from sr_platform.storage import open_storage
from sr_platform.verification import HashedStream, read_entries, verify_dataset, verify_shard


@pytest.fixture
def uri(prepared_dataset: str, tmp_path: Path) -> str:
    return shutil.copytree(prepared_dataset, tmp_path / "set").as_posix()


def test_an_intact_dataset_has_no_problems_here_and_on_s3(
    uri: str, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "CHUNK_BYTES", 5000)
    for name, data in ((name, open_storage(uri).read_bytes(name)) for name in open_storage(uri).list()):
        open_storage(s3_uri).write_bytes_atomic(name, data)
    total = sum(shard.size_bytes for shard in read_manifest(uri).shards)
    for place in (uri, s3_uri):
        steps: list[tuple[int, int]] = []
        assert verify_dataset(place, lambda done, of: steps.append((done, of))) == []  # noqa: B023
        assert steps == [(total // 2, total), (total, total)]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (flip_a_bit, "shards/train-000001.tar", "train-000001.tar has sha256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1024]), "shards/train-000000.tar", "bytes, its manifest"),
        (lambda path: path.write_bytes(b"no tar" * 999), "shards/train-000000.tar", "has 5994 bytes, its manifest"),
        (Path.unlink, "shards/train-000000.tar", "train-000000.tar does not exist"),
        (Path.unlink, "index.parquet", "index.parquet does not exist"),
        (flip_a_bit, "index.parquet", "index.parquet differs from its manifest"),
        (lambda path: path.write_text(path.read_text().replace("tiny", "huge")), "manifest.json", "was changed after"),
        (Path.unlink, "manifest.json", "is not a finished dataset"),
    ],
)
def test_each_kind_of_damage_is_one_problem(
    damage: Callable[[Path], object], name: str, message: str, uri: str
) -> None:
    damage(Path(uri) / name)
    (problem,) = verify_dataset(uri)
    assert message in problem


def test_all_problems_are_found_in_one_go(uri: str) -> None:
    for name in ("shards/train-000000.tar", "shards/train-000001.tar", "index.parquet"):
        flip_a_bit(Path(uri) / name)
    assert len(verify_dataset(uri)) == 3


def test_an_index_that_fits_its_manifest_and_not_its_shards_is_found(uri: str) -> None:
    manifest, path = read_manifest(uri), Path(uri) / "index.parquet"
    table = pq.read_table(path)

    def recommit(index: object) -> list[str]:
        pq.write_table(index, path)
        digest = __import__("hashlib").sha256(path.read_bytes()).hexdigest()
        content = {name: getattr(manifest, name) for name in ("shards", "recipe", "sources", "counts")}
        write_manifest(uri, make_manifest(**content, index_sha256=digest))
        return verify_dataset(uri)

    (problem,) = recommit(table.slice(0, 11))
    assert "train-000001.tar: sample s1-5 is not in index.parquet" in problem
    (problem,) = recommit(table.take([1, 0, *range(2, 12)]))
    assert "train-000000.tar: sample s0-1 does not lie where index.parquet says" in problem
    assert recommit(table) == []


def test_one_shard_can_be_checked_alone(uri: str) -> None:
    storage, (first, second) = open_storage(uri), read_manifest(uri).shards
    flip_a_bit(Path(uri) / second.name)
    verify_shard(storage, first)
    with pytest.raises(InputDataError, match=r"train-000001.tar differs from its manifest"):
        verify_shard(storage, second)


def test_a_tar_is_read_as_it_was_packed_whatever_the_size_of_its_pieces() -> None:
    samples = [(f"k{i}{'x' * (150 if i == 1 else 0)}", {"json": b"{}", "hq.png": bytes(999 * i)}) for i in range(4)]
    data, places = pack_shard(samples)
    for step in (100, 512, 10**6):
        stream = HashedStream(data[i : i + step] for i in range(0, len(data), step))
        assert {entry.key: entry.members for entry in read_entries(stream)} == places
        stream.drain()
        assert stream.size_bytes == len(data)
    with pytest.raises(tarfile.TarError):
        list(read_entries(HashedStream(iter([b"no tar at all" * 100]))))


def test_a_stream_gives_exactly_what_is_asked_for_until_it_ends() -> None:
    stream, file = HashedStream(iter([b"abc", b"defgh", b"i"])), io.BytesIO(b"abcdefghi")
    assert [stream.read(n) for n in (2, 4, 9, 1)] == [file.read(n) for n in (2, 4, 9, 1)]

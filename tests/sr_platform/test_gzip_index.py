"""Any bytes of a gzip file are read through its index, without decompressing what lies before."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from sr_platform import gzip_index
from sr_platform.errors import InputDataError, StorageError
from sr_platform.gzip_index import IndexWriter, read_gzip_range
from sr_platform.storage import Storage, open_storage

RNG = np.random.default_rng(0)
CONTENT = b"".join(RNG.bytes(40_000) + b"again and again " * 3000 for _ in range(12))
SPANS = [(0, 10), (5, 5 + 2**17), (400_000, 400_100), (300_000, 900_000), (len(CONTENT) - 10, len(CONTENT)), (7, 7)]


@pytest.fixture(autouse=True)
def _close_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gzip_index, "SPACING_BYTES", 2**17)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path)


def indexed(storage: Storage, data: bytes) -> None:
    storage.write_bytes_atomic("a.gz", data)
    writer = IndexWriter(storage, "a.gz", len(data))
    writer.stream.seek(3 * len(CONTENT) // 4)
    writer.stream.read(1)
    writer.save(storage, "index")


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("members", [1, 3])
def test_any_span_is_read(level: int, members: int, storage: Storage) -> None:
    parts = [
        CONTENT[index * len(CONTENT) // members : (index + 1) * len(CONTENT) // members] for index in range(members)
    ]
    indexed(storage, b"".join(gzip.compress(part, level) for part in parts))
    for start, end in SPANS:
        data = read_gzip_range(storage, "a.gz", start, end, cache=storage, index="index")
        assert data == CONTENT[start:end], (start, end)


def test_a_read_fetches_only_what_lies_between_two_places(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed = gzip.compress(CONTENT, 1)
    indexed(storage, compressed)
    spans: list[int] = []
    read_range = Storage.read_range

    def watched(self: Storage, name: str, start: int, end: int) -> bytes:
        spans.append(end - start)
        return read_range(self, name, start, end)

    monkeypatch.setattr(Storage, "read_range", watched)
    assert read_gzip_range(storage, "a.gz", 800_000, 800_100, cache=storage, index="index") == CONTENT[800_000:800_100]
    assert sum(spans) < len(compressed) // 2
    assert len(spans) <= 4


def test_beyond_the_end_there_is_nothing(storage: Storage) -> None:
    indexed(storage, gzip.compress(CONTENT))
    end = len(CONTENT)
    assert read_gzip_range(storage, "a.gz", end - 5, end + 5, cache=storage, index="index") == CONTENT[-5:]


def test_damage_within_the_file_is_told(storage: Storage) -> None:
    data = gzip.compress(CONTENT)
    indexed(storage, data)
    storage.write_bytes_atomic("a.gz", data[:5000] + bytes(200_000) + data[205_000:])
    with pytest.raises(InputDataError, match="damaged gzip file"):
        read_gzip_range(storage, "a.gz", 0, 300_000, cache=storage, index="index")


def test_an_index_that_is_gone_or_cut_off_is_not_the_pictures_fault(storage: Storage) -> None:
    indexed(storage, gzip.compress(CONTENT))
    storage.write_bytes_atomic("short", storage.read_bytes("index")[:60])
    with pytest.raises(StorageError, match="is cut off"):
        read_gzip_range(storage, "a.gz", 0, 10, cache=storage, index="short")
    with pytest.raises(StorageError, match="is gone; run the same command again"):
        read_gzip_range(storage, "a.gz", 0, 10, cache=storage, index="nowhere")

"""A file over range reads behaves as a file, and asks storage once for what lies close together."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from sr_platform.errors import InputDataError
from sr_platform.range_file import RangeFile
from sr_platform.storage import Storage, open_storage

DATA = bytes(range(256)) * 40


@pytest.fixture
def file(tmp_path: Path) -> RangeFile:
    open_storage(tmp_path).write_bytes_atomic("x", DATA)
    return RangeFile(open_storage(tmp_path), "x", len(DATA), window_bytes=1000)


def test_it_reads_and_seeks_as_a_file(file: RangeFile) -> None:
    real = io.BytesIO(DATA)
    for whence, offset, size in [
        (0, 10, 5),
        (1, 100, 2000),
        (2, -50, 20),
        (1, 0, 100),
        (0, 20_000, 5),
        (0, 3, -1),
        (0, 0, 0),
    ]:
        assert file.seek(offset, whence) == real.seek(offset, whence)
        assert file.read(size) == real.read(size)
        assert file.tell() == real.tell()
    assert (file.seekable(), file.readable()) == (True, True)
    with pytest.raises(OSError, match="does not exist"):
        file.seek(-1)


def test_it_can_be_buffered(file: RangeFile) -> None:
    buffered = io.BufferedReader(file)
    buffered.seek(300)
    assert buffered.read(70) == DATA[300:370]


def test_reads_within_a_window_cost_one_request(file: RangeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []
    read_range = Storage.read_range
    monkeypatch.setattr(Storage, "read_range", lambda *args: requests.append(args[2:]) or read_range(*args))
    for start in range(0, 900, 100):
        file.seek(start)
        file.read(100)
    file.fetch(5000, 7000)
    file.seek(6500)
    assert file.read(500) == DATA[6500:7000]
    assert requests == [(0, 1000), (5000, 7000)]


def test_what_storage_raised_is_kept(tmp_path: Path) -> None:
    file = RangeFile(open_storage(tmp_path), "nowhere", 10)
    with pytest.raises(InputDataError):
        file.read(1)
    assert isinstance(file.failure, InputDataError)

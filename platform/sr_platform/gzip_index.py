"""Random access to a gzip file in storage: an index of places at which decompression can start.

In : a gzip file, read once from beginning to end by `IndexWriter`.
Out: an index (the file format of indexed_gzip) in a cache; `read_gzip_range` then reads any bytes with three range
     reads: the index's table of places, one window of 32 KiB, and the compressed bytes between two places.

Holding whole indexes open would take 4 KiB of memory for every MiB of the data in every worker.
"""

from __future__ import annotations

import contextlib
import functools
import io
import struct
from bisect import bisect_left, bisect_right
from typing import NamedTuple

import indexed_gzip

from sr_platform.errors import InputDataError, StorageError
from sr_platform.range_file import RangeFile
from sr_platform.storage import Storage

SPACING_BYTES = 8 * 2**20
"""Decompressed bytes between two places: half of it is decompressed in vain by a read, on average."""
_STREAM_WINDOW_BYTES = 8 * 2**20
_READ_BYTES = 64 * 1024

# zran.c of indexed_gzip, "GZIDX" version 1: magic, version, flags, sizes, spacing, window size, number of points;
# the points: compressed and decompressed offset, bits, whether it has a window; the windows.
_HEADER = struct.Struct("<5sBBQQIII")
_POINT = struct.Struct("<QQBB")

_DAMAGED = (indexed_gzip.ZranError, indexed_gzip.NotCoveredError, EOFError)


class _Index(NamedTuple):
    header: tuple[bytes, int, int, int, int, int, int, int]
    compressed: tuple[int, ...]
    """Where each place lies in the gzip file."""
    decompressed: tuple[int, ...]
    points: tuple[bytes, ...]
    windows: tuple[tuple[int, int], ...]
    """Where in the index each place's window lies; (n, n) when it needs none."""


class IndexWriter:
    """The decompressed stream of a gzip file, seekable; the index grows while it is read."""

    def __init__(self, storage: Storage, name: str, size_bytes: int) -> None:
        self.source = RangeFile(storage, name, size_bytes, window_bytes=_STREAM_WINDOW_BYTES)
        self.stream = indexed_gzip.IndexedGzipFile(fileobj=self.source, spacing=SPACING_BYTES)

    def save(self, cache: Storage, name: str) -> None:
        """Writes the index, of all that can be decompressed."""
        with contextlib.suppress(indexed_gzip.ZranError):
            self.stream.build_full_index()
        if self.source.failure:
            raise self.source.failure
        buffer = io.BytesIO()
        self.stream.export_index(fileobj=buffer)
        cache.write_bytes_atomic(name, buffer.getvalue())


def read_gzip_range(storage: Storage, name: str, start: int, end: int, *, cache: Storage, index: str) -> bytes:
    """Decompressed bytes `start` to `end`, fewer only where the stream ends earlier.

    Raises:
        InputDataError: the file is damaged or gone.
        StorageError: storage keeps failing, or the index is gone.
    """
    places = _index_at(cache.uri, index)
    first = bisect_right(places.decompressed, start) - 1
    after = bisect_left(places.decompressed, end)
    size_bytes = places.header[3]
    compressed_end = places.compressed[after] if after < len(places.points) else size_bytes
    source = RangeFile(storage, name, size_bytes)
    # The byte before a place holds its first bits.
    source.fetch(max(places.compressed[first] - 1, 0), compressed_end + 1)
    # An index of two places: indexed_gzip reads what lies between places that it knows, so there is one after the end.
    points = places.points[first] + _POINT.pack(compressed_end, end + 1, 0, 0)
    window = _cached(cache, index, *places.windows[first])
    part = io.BytesIO(_HEADER.pack(*places.header[:7], 2) + points + window)
    try:
        with indexed_gzip.IndexedGzipFile(fileobj=source, auto_build=False, readbuf_size=_READ_BYTES) as stream:
            stream.import_index(fileobj=part)
            # `raw`, because the buffer around it would read on, and each read begins at a place again.
            return bytes(stream.raw.pread(end - start, start))
    except _DAMAGED as error:
        if source.failure:
            raise source.failure from error
        raise InputDataError(f"{storage.path(name)} is a damaged gzip file ({' '.join(str(error).split())})") from error


@functools.lru_cache(maxsize=256)
def _index_at(cache_uri: str, index: str) -> _Index:
    cache = Storage(cache_uri)
    header = _HEADER.unpack(_cached(cache, index, 0, _HEADER.size))
    num_points, window_bytes = header[7], header[6]
    table_end = _HEADER.size + num_points * _POINT.size
    table = _cached(cache, index, _HEADER.size, table_end)
    points = list(_POINT.iter_unpack(table))
    windows, offset = [], table_end
    for *_, has_window in points:
        windows.append((offset, offset + window_bytes * has_window))
        offset = windows[-1][1]
    return _Index(
        header,
        tuple(point[0] for point in points),
        tuple(point[1] for point in points),
        tuple(table[start : start + _POINT.size] for start in range(0, len(table), _POINT.size)),
        tuple(windows),
    )


def _cached(cache: Storage, index: str, start: int, end: int) -> bytes:
    try:
        data = cache.read_range(index, start, end)
    except InputDataError as error:
        raise StorageError(f"gzip index: {cache.path(index)} is gone; run the same command again") from error
    if len(data) != end - start:
        raise StorageError(f"gzip index: {cache.path(index)} is cut off; delete it and run the same command again")
    return data

"""Reads byte ranges of shards: in place from a local disk, by request from S3, or from local copies of shards on S3."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

from sr_platform.errors import InputDataError
from sr_platform.shards import ShardInfo
from sr_platform.storage import Storage, pread, retried

Range = tuple[int, int, int]
"""(shard, start, end): the shard's place in the manifest, and bytes."""

# A request to S3 takes as long as some hundred KiB, so what lies between two members is read along.
MAX_GAP_BYTES = 256 * 1024
MAX_OPEN_FILES = 256
_SHARDS_AT_ONCE = 4


class ShardFiles:
    """The shards of one dataset; picklable, and safe to use from several threads."""

    def __init__(self, storage: Storage, shards: Sequence[ShardInfo], cache_dir: Path | None = None) -> None:
        self.storage, self.shards = storage, shards
        self.cache_dir = None if storage.is_local else cache_dir
        self._open: OrderedDict[int, FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[ShardFiles], tuple[Storage, Sequence[ShardInfo], Path | None]]:
        return ShardFiles, (self.storage, self.shards, self.cache_dir)

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range, in the order given.

        Raises:
            InputDataError: a shard is missing, shorter than its manifest says or, when it is copied, another.
            StorageError: storage keeps failing.
        """
        if self.storage.is_local or self.cache_dir is not None:
            files = self._files({shard for shard, _, _ in ranges})
            _announce(files, ranges)
            return [self._read_file(*wanted) for wanted in ranges]
        merged = merge_ranges(ranges, MAX_GAP_BYTES)
        datas = self.storage.read_ranges([(self.shards[shard].name, start, end) for shard, start, end in merged])
        for wanted, data in zip(merged, datas, strict=True):
            self._check_length(wanted, data)
        return _cut(ranges, merged, datas)

    def _read_file(self, shard: int, start: int, end: int) -> bytes:
        data = retried(self.storage.path(self.shards[shard].name), lambda: self._pread(shard, start, end))
        self._check_length((shard, start, end), data)
        return data

    def _pread(self, shard: int, start: int, end: int) -> bytes:
        file = self._files({shard})[shard]
        try:
            return pread(file.fileno(), start, end)
        except OSError:
            with self._lock:
                self._open.pop(shard, None)  # a stale handle of a network disk stays stale
            raise

    def _files(self, shards: Set[int]) -> dict[int, FileIO]:
        """The shards' files, kept open: on a network disk opening takes longer than reading a sample."""
        with self._lock:
            files = {shard: self._open[shard] for shard in shards if shard in self._open}
        missing = sorted(shards - files.keys())
        if missing:
            with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
                files |= zip(missing, pool.map(self._open_file, missing), strict=True)
        with self._lock:
            for shard, file in files.items():
                self._open[shard] = file
                self._open.move_to_end(shard)
            while len(self._open) > MAX_OPEN_FILES:
                # Not closed here: another thread may be reading it, and the last reference closes it.
                self._open.popitem(last=False)
        return files

    def _open_file(self, shard: int) -> FileIO:
        info = self.shards[shard]
        if self.cache_dir is None:
            path = self.storage.path(info.name)
        else:
            path = str(fetch_shard(self.storage, info, self.cache_dir))
        return retried(path, lambda: FileIO(path))

    def _check_length(self, wanted: Range, data: bytes) -> None:
        shard, start, end = wanted
        if len(data) != end - start:
            raise InputDataError(
                f"shards: {self.storage.path(self.shards[shard].name)} ends before byte {end}, within a sample: "
                "it differs from its manifest; prepare the dataset again"
            )


def _announce(files: Mapping[int, FileIO], ranges: Sequence[Range]) -> None:
    """Has the system read all ranges ahead at the same time; they are collected one after the other."""
    if not hasattr(os, "posix_fadvise"):
        return
    for shard, start, end in merge_ranges(ranges, MAX_GAP_BYTES):
        with contextlib.suppress(OSError):  # a hint; the read itself will tell
            os.posix_fadvise(files[shard].fileno(), start, end - start, os.POSIX_FADV_WILLNEED)


def fetch_shard(storage: Storage, shard: ShardInfo, cache_dir: Path) -> Path:
    """A local copy of a shard, checked against its manifest; fetched once for all processes that share `cache_dir`.

    Raises:
        InputDataError: the shard is missing or differs from its manifest.
    """
    path = cache_dir / f"{shard.sha256}.tar"
    if _is_whole(path, shard):
        return path
    cache_dir.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however it ends
        if not _is_whole(path, shard):
            _download(storage, shard, path)
    return path


def merge_ranges(ranges: Sequence[Range], max_gap: int) -> list[Range]:
    """The fewest ranges that cover these, in order of place, where gaps up to `max_gap` bytes are read along."""
    merged: list[Range] = []
    for shard, start, end in sorted(ranges):
        if merged and merged[-1][0] == shard and start - merged[-1][2] <= max_gap:
            merged[-1] = (shard, merged[-1][1], max(merged[-1][2], end))
        else:
            merged.append((shard, start, end))
    return merged


def _cut(ranges: Sequence[Range], merged: Sequence[Range], datas: Sequence[bytes]) -> list[bytes]:
    """Each of `ranges`, cut out of the merged one that holds it."""
    cut: dict[Range, bytes] = {}
    holders = iter(zip(merged, datas, strict=True))
    (shard, first, last), data = next(holders, ((-1, 0, 0), b""))
    for wanted in sorted(set(ranges)):
        while wanted[0] != shard or wanted[2] > last:
            (shard, first, last), data = next(holders)
        cut[wanted] = data[wanted[1] - first : wanted[2] - first]
    return [cut[wanted] for wanted in ranges]


def _is_whole(path: Path, shard: ShardInfo) -> bool:
    # Published under the name of its content; only a crash of the whole machine could have shortened it since.
    return path.is_file() and path.stat().st_size == shard.size_bytes


def _download(storage: Storage, shard: ShardInfo, path: Path) -> None:
    digest, unfinished = hashlib.sha256(), path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        for chunk in storage.read_chunks(shard.name):
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != shard.sha256:
        unfinished.unlink()
        raise InputDataError(
            f"shards: {storage.path(shard.name)} differs from its manifest: it is damaged or of another dataset; "
            "prepare the dataset again"
        )
    unfinished.replace(path)

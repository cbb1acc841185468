"""Checks a prepared dataset against its own digests.

In : a finished dataset, local or on S3; shards are streamed, so memory does not grow with them.
Out: what is wrong, a line each.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import numpy as np

from sr_platform.errors import InputDataError
from sr_platform.sample_reader import SampleIndex, read_index
from sr_platform.shards import INDEX_NAME, Manifest, SampleEntry, ShardInfo, read_manifest
from sr_platform.storage import Storage, open_storage

SHARDS_AT_ONCE = 4
_TAR_BUFFER_BYTES = 2**20

Progress = Callable[[int, int], None]
"""(bytes read so far, bytes in all)."""


def verify_dataset(uri: str, progress: Progress | None = None) -> list[str]:
    """Everything that is wrong with the dataset at `uri`, a line each; none when it is as it was written.

    Checks the manifest's digest, the sha256 of index and shards, and that the index says what the shards hold.

    Raises:
        StorageError: storage keeps failing, so nothing can be said.
    """
    storage = open_storage(uri)
    try:
        manifest = read_manifest(uri)
    except InputDataError as error:
        return [str(error)]
    problems: list[str] = []
    index = None
    try:
        index = read_index(storage, manifest)
    except InputDataError as error:
        problems.append(str(error))
    done_bytes, total_bytes = 0, sum(shard.size_bytes for shard in manifest.shards)
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        numbers = range(len(manifest.shards))
        for number, found in zip(
            numbers, pool.map(lambda n: _check(storage, manifest, index, n), numbers), strict=True
        ):
            problems += found
            done_bytes += manifest.shards[number].size_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
    return problems


def verify_shard(storage: Storage, shard: ShardInfo) -> None:
    """Raises InputDataError unless the shard has the bytes its manifest promises."""
    stream = HashedStream(storage.read_chunks(shard.name))
    stream.drain()
    if stream.size_bytes != shard.size_bytes or stream.sha256 != shard.sha256:
        raise InputDataError(f"shards: {storage.path(shard.name)} differs from its manifest; prepare the dataset again")


class HashedStream:
    """A file to read forwards, over chunks, that hashes what passes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._chunk, self._position = chunks, b"", 0
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def read(self, size_bytes: int) -> bytes:
        """Exactly as much as asked for, less only at the end."""
        parts, missing = [], size_bytes
        while missing and (self._position < len(self._chunk) or self._next()):
            parts.append(self._chunk[self._position : self._position + missing])
            self._position += len(parts[-1])
            missing -= len(parts[-1])
        return b"".join(parts)

    def drain(self) -> None:
        """Reads on to the end."""
        while self._next():
            pass

    def _next(self) -> bool:
        self._chunk, self._position = next(self._chunks, b""), 0
        self._digest.update(self._chunk)
        self.size_bytes += len(self._chunk)
        return bool(self._chunk)


def read_entries(stream: HashedStream) -> Iterator[SampleEntry]:
    """The samples of a tar, in order, and where their members lie. Raises tarfile.TarError."""
    key, members = "", dict[str, tuple[int, int]]()
    with tarfile.open(fileobj=stream, mode="r|", bufsize=_TAR_BUFFER_BYTES) as archive:  # type: ignore[call-overload]
        for member in archive:
            archive.members = []  # it would keep them all
            of_key, _, suffix = member.name.partition(".")
            if of_key != key and members:
                yield SampleEntry(key=key, members=members)
                members = {}
            key, members[suffix] = of_key, (member.offset_data, member.offset_data + member.size)
    if members:
        yield SampleEntry(key=key, members=members)


def _check(storage: Storage, manifest: Manifest, index: SampleIndex | None, number: int) -> list[str]:
    """What is wrong with one shard."""
    shard = manifest.shards[number]
    where = storage.path(shard.name)
    try:
        stream = HashedStream(storage.read_chunks(shard.name))
        unlike = "" if index is None else _first_difference(stream, index, number)
        stream.drain()
    except InputDataError as error:
        return [str(error)]
    if stream.size_bytes != shard.size_bytes:
        return [f"shards: {where} has {stream.size_bytes} bytes, its manifest says {shard.size_bytes}"]
    if stream.sha256 != shard.sha256:
        return [f"shards: {where} has sha256 {stream.sha256}, its manifest says {shard.sha256}"]
    return [f"shards: {where}: {unlike}"] if unlike else []


def _first_difference(stream: HashedStream, index: SampleIndex, number: int) -> str:
    """Where index and shard first disagree; empty when they agree."""
    rows = np.flatnonzero(index.shards == number)
    try:
        for row, entry in zip_longest(rows.tolist(), read_entries(stream)):
            if row is None:
                return f"sample {entry.key} is not in {INDEX_NAME}"
            members = {suffix: index.place(row, suffix)[1:] for suffix in index.suffixes(row)}
            if entry is None or index.keys[row].as_py() != entry.key or members != entry.members:
                return f"sample {index.keys[row]} does not lie where {INDEX_NAME} says"
    except tarfile.TarError as error:
        return f"not a readable tar ({error})"
    return ""

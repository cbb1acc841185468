"""Files under one URI: a local folder (path or file://) or an S3 prefix (s3://bucket/prefix), with the same calls.

    storage = open_storage("s3://bucket/datasets/nano")
    storage.write_bytes_atomic("manifest.json", data)     # readers see the old file or the new one, never a part
    storage.read_range("shards/nano-000000.tar", 512, 4096)

Errors, throttling and cut connections are waited out for about a minute; a read returns everything or raises.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from sr_platform import s3
from sr_platform.errors import InputDataError, RequestError, StorageError

ATTEMPTS = 10
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 15.0
CHUNK_BYTES = 32 * 2**20
PART_BYTES = 32 * 2**20
"""Of an upload in parts; S3 takes 10,000 of them, of 5 MiB at least."""
_CHUNKS_AT_ONCE = 2
_PARTS_AT_ONCE = 8
_FILES_AT_ONCE = 16
_UNFINISHED = ".unfinished-"
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

T = TypeVar("T")


class FileDetails(NamedTuple):
    """What a listing tells about a file."""

    size_bytes: int
    fingerprint: str
    """Changes when the bytes may have changed: the time of the last change, or the ETag."""


def open_storage(uri: str | os.PathLike[str]) -> Storage:
    """The storage at a path, file:// or s3:// URI; nothing is created or contacted yet.

    Raises:
        RequestError: the URI has another scheme, or names no bucket.
    """
    return Storage(_normalised(os.fspath(uri)))


class Storage:
    """Files named by relative paths with "/"; picklable, and safe to use from several threads."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        """An absolute local path, or s3://bucket/prefix, without a slash at the end."""

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.uri,)

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    @property
    def is_local(self) -> bool:
        return not self.uri.startswith("s3://")

    def path(self, name: str) -> str:
        """The full path or URI of a file. Raises RequestError when the name would leave the storage."""
        parts = name.split("/")
        if not name or name.startswith("/") or ".." in parts or (os.sep != "/" and os.sep in name):
            raise RequestError(f"storage: {name!r} is not the name of a file below {self.uri}; use a relative path")
        return f"{self.uri}/{name}"

    def read_bytes(self, name: str) -> bytes:
        """A whole file. Raises InputDataError when it does not exist, StorageError when storage keeps failing."""
        path = self.path(name)
        return retried(path, Path(path).read_bytes if self.is_local else lambda: s3.read_range(path, 0, None))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (exclusive), fewer only where the file ends earlier. Raises as `read_bytes` does."""
        path = self.path(name)
        if end <= start:
            return b""
        return retried(path, lambda: (_read_local if self.is_local else s3.read_range)(path, start, end))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """`read_range` of each (name, start, end), from S3 at the same time."""
        if self.is_local:
            return [self.read_range(*wanted) for wanted in ranges]
        answers = s3.read_ranges([(self.path(name), start, end) for name, start, end in ranges])
        # What failed is asked for again one by one, which takes the load off a server that throttles.
        return [
            answer if isinstance(answer, bytes) else self.read_range(*wanted)
            for answer, wanted in zip(answers, ranges, strict=True)
        ]

    def read_chunks(self, name: str) -> Iterator[bytes]:
        """A whole file in pieces of CHUNK_BYTES, for files that are too large for memory. Raises as `read_bytes`."""
        size_bytes, step = self.size(name), CHUNK_BYTES * _CHUNKS_AT_ONCE
        for first in range(0, size_bytes, step):
            starts = range(first, min(first + step, size_bytes), CHUNK_BYTES)
            yield from self.read_ranges([(name, start, min(start + CHUNK_BYTES, size_bytes)) for start in starts])

    def write_bytes_atomic(self, name: str, data: bytes) -> None:
        """Publishes a file: it appears under its name whole or not at all, replacing what was there."""
        path = self.path(name)
        retried(path, lambda: _write_local(Path(path), [data]) if self.is_local else s3.write(path, data))

    def write_chunks(self, name: str, chunks: Iterable[bytes]) -> None:
        """`write_bytes_atomic` of a file too large for memory or for one request, in pieces of any size.

        On the way to S3 about 350 MiB of it are held. Raises OSError where a local disk refuses: the pieces pass once.
        """
        path = self.path(name)
        if self.is_local:
            _write_local(Path(path), chunks)
        else:
            _write_parts(path, chunks)

    def exists(self, name: str) -> bool:
        with contextlib.suppress(InputDataError):
            self.size(name)
            return True
        return False

    def size(self, name: str) -> int:
        """Bytes of a file. Raises InputDataError when it does not exist."""
        path = self.path(name)
        return retried(path, lambda: (_size_local if self.is_local else s3.size)(path))

    def delete(self, name: str) -> None:
        """Removes a file, and a local folder that is empty then, as it would not exist on S3; gone is no error."""
        path = self.path(name)
        with contextlib.suppress(InputDataError):
            retried(path, Path(path).unlink if self.is_local else lambda: s3.delete(path))
        if self.is_local:
            with contextlib.suppress(OSError):  # not empty, or gone as well
                Path(path).parent.rmdir()

    def delete_all(self, prefix: str) -> None:
        """Removes every file whose name starts with `prefix`, several at once."""
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            tuple(pool.map(self.delete, self.list(prefix)))

    def read_all(self, names: Sequence[str]) -> Sequence[bytes]:
        """Whole files, in the order of `names`, several at once. Raises as `read_bytes` does."""
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            return tuple(pool.map(self.read_bytes, names))

    def list(self, prefix: str = "") -> list[str]:
        """Names of all files whose names start with `prefix`, sorted; empty when nothing is there."""
        return sorted(self.sizes(prefix))

    def remove_unfinished(self) -> None:
        """Removes what killed writers left behind; for the time when nobody writes."""
        for path in Path(self.uri).rglob(f"{_UNFINISHED}*") if self.is_local else ():
            path.unlink(missing_ok=True)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Name and bytes of all files whose names start with `prefix`, in one listing."""
        return {name: details.size_bytes for name, details in self.details(prefix).items()}

    def details(self, prefix: str = "") -> dict[str, FileDetails]:
        """Bytes and fingerprint of all files whose names start with `prefix`, in one listing."""
        found = self._list_local(prefix) if self.is_local else self._list_s3(prefix)
        skip = len(self.uri) + 1
        named = {path[skip:]: FileDetails(*details) for path, details in found.items()}
        return {name: d for name, d in named.items() if name.startswith(prefix) and not _is_unfinished(name)}

    def _list_local(self, prefix: str) -> dict[str, tuple[int, str]]:
        folder = prefix.rpartition("/")[0]
        root = f"{self.uri}/{folder}" if folder else self.uri
        return retried(root, lambda: _files_below(root))

    def _list_s3(self, prefix: str) -> dict[str, tuple[int, str]]:
        found, token, start = dict[str, tuple[int, str]](), "", f"{self.uri}/{prefix}"
        while True:
            # Page by page: a long listing from an unsteady server would never come through in one go.
            try:
                page, token = retried(start, lambda token=token: s3.list_page(start, token))  # type: ignore[misc]
            except InputDataError:  # no such bucket
                return {}
            found |= page
            if not token:
                return found


def retried(path: str, call: Callable[[], T]) -> T:
    """`call`, again after passing failures of storage at `path`, with growing waits.

    Raises:
        InputDataError: the file is not there.
        RequestError: access is refused.
        StorageError: it still failed after ATTEMPTS attempts.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except _ABSENT as error:
            raise InputDataError(f"storage: {path} does not exist; check the name and the URI") from error
        except s3.REFUSED as error:
            raise RequestError(f"storage: {path} is refused: {_one_line(error)}; check credentials") from error
        except FileExistsError as error:
            raise RequestError(f"storage: {path}: a file is where a folder should be; give another place") from error
        except s3.PASSING as error:
            if attempt == ATTEMPTS:
                raise StorageError(
                    f"storage: {path} still failed after {ATTEMPTS} attempts: {_one_line(error)}"
                ) from error
            # Spread, or workers that were turned away together come back together.
            spread = random.uniform(0.75, 1.25)  # noqa: S311
            time.sleep(min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S) * spread)
    raise AssertionError("unreachable")


def pread(descriptor: int, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of an open file, fewer only where it ends earlier."""
    data = os.pread(descriptor, end - start, start)
    while len(data) < end - start and (more := os.pread(descriptor, end - start - len(data), start + len(data))):
        data += more
    return data


def _normalised(uri: str) -> str:
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme == "s3":
        bucket_and_prefix = uri.removeprefix("s3://").strip("/")
        if not bucket_and_prefix:
            raise RequestError(f"storage: {uri!r} names no bucket; write s3://bucket/prefix")
        return f"s3://{bucket_and_prefix}"
    if scheme == "file":
        uri = unquote(urlsplit(uri).path)
    elif scheme or not uri:
        raise RequestError(f"storage: {uri!r} cannot be opened; give a path, file:///path or s3://bucket/prefix")
    # Absolute at once: a Ray worker's current directory is another one.
    return str(Path(uri).expanduser().absolute())


def _read_local(path: str, start: int, end: int) -> bytes:
    with Path(path).open("rb", buffering=0) as file:
        return pread(file.fileno(), start, end)


def _size_local(path: str) -> int:
    if not Path(path).is_file():
        raise FileNotFoundError(path)
    return Path(path).stat().st_size


def _files_below(root: str) -> dict[str, tuple[int, str]]:
    found: dict[str, tuple[int, str]] = {}
    for folder, _, names in os.walk(root, onerror=_raise_unless_absent):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile, or a link to nowhere
                path = Path(folder, name)
                if path.is_file():
                    status = path.stat()
                    found[str(path)] = (status.st_size, str(status.st_mtime_ns))
    return found


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, _ABSENT):
        raise error


def _is_unfinished(name: str) -> bool:
    return name.rpartition("/")[2].startswith(_UNFINISHED)


def _write_local(path: Path, chunks: Iterable[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{_UNFINISHED}{uuid.uuid4().hex}")
    try:
        with unfinished.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_parts(path: str, chunks: Iterable[bytes]) -> None:
    """One PUT where a part is all there is, else several parts at once, each of them retried."""
    parts = _in_parts(chunks)
    first, second = next(parts, b""), next(parts, None)
    if second is None:
        retried(path, lambda: s3.write(path, first))
        return
    upload = retried(path, lambda: s3.begin_upload(path))
    try:
        sent = _send_parts(path, upload, itertools.chain((first, second), parts))
        _finish_parts(path, upload, [part for part, _ in sent], sum(size_bytes for _, size_bytes in sent))
    except BaseException:
        with contextlib.suppress(StorageError, RequestError):  # what went wrong before says more
            retried(path, lambda: s3.abort_upload(path, upload))
        raise


def _in_parts(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of PART_BYTES, the last of them shorter."""
    pending = bytearray()
    for chunk in chunks:
        for start in range(0, len(chunk), PART_BYTES):
            pending += memoryview(chunk)[start : start + PART_BYTES]
            if len(pending) >= PART_BYTES:
                yield bytes(memoryview(pending)[:PART_BYTES])
                pending = pending[PART_BYTES:]
    if pending:
        yield bytes(pending)


def _send_parts(path: str, upload: str, parts: Iterable[bytes]) -> list[tuple[dict[str, Any], int]]:
    """What the server calls each part, and its bytes."""

    def send(number: int, data: bytes) -> tuple[dict[str, Any], int]:
        return retried(path, lambda: s3.write_part(path, upload, number, data)), len(data)

    sending: list[Future[tuple[dict[str, Any], int]]] = []
    with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
        for number, data in enumerate(parts, start=1):
            if number > _PARTS_AT_ONCE:
                sending[-_PARTS_AT_ONCE].result()
            sending.append(pool.submit(send, number, data))
    return [future.result() for future in sending]


def _finish_parts(path: str, upload: str, parts: Sequence[dict[str, Any]], size_bytes: int) -> None:
    try:
        retried(path, lambda: s3.finish_upload(path, upload, parts))
    except InputDataError:
        # Finished by an attempt whose answer was lost: S3 has forgotten the upload, and the object is there.
        if retried(path, lambda: s3.size(path)) != size_bytes:
            raise


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Files under one URI: a local folder (path or file://) or an S3 prefix (s3://bucket/prefix), with the same calls.

    storage = open_storage("s3://bucket/datasets/nano")
    storage.write_bytes_atomic("manifest.json", data)     # readers see the old file or the new one, never a part
    storage.read_range("shards/nano-000000.tar", 512, 4096)

S3 goes through s3fs, which finds endpoint, region and credentials as boto does (AWS_ENDPOINT_URL, AWS_PROFILE, ...).
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import botocore.exceptions
import fsspec
from fsspec.implementations.local import LocalFileSystem

from sr_platform.errors import InputDataError, RequestError, StorageError

ATTEMPTS = 4
FIRST_WAIT_S = 0.5
_UNFINISHED = ".unfinished-"
_REFUSED = (botocore.exceptions.NoCredentialsError, botocore.exceptions.ParamValidationError, PermissionError)
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_PASSING = (OSError, botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError)

T = TypeVar("T")


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
        return bytes(self._retried(path, lambda fs: fs.cat_file(path)))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (exclusive) of a file, in one range request. Raises as `read_bytes` does."""
        path = self.path(name)
        return bytes(self._retried(path, lambda fs: fs.cat_file(path, start=start, end=end))) if end > start else b""

    def write_bytes_atomic(self, name: str, data: bytes) -> None:
        """Publishes a file: it appears under its name whole or not at all, replacing what was there."""
        path = self.path(name)
        if self.is_local:
            self._retried(path, lambda fs: _write_local(Path(path), data))
        else:
            # One PUT; the default would split large files and leave parts behind after a crash.
            self._retried(path, lambda fs: fs.pipe_file(path, data, chunksize=max(len(data), 1)))

    def exists(self, name: str) -> bool:
        path = self.path(name)
        return bool(self._retried(path, lambda fs: fs.isfile(path)))

    def size(self, name: str) -> int:
        """Bytes of a file. Raises InputDataError when it does not exist."""
        path = self.path(name)
        return int(self._retried(path, lambda fs: fs.info(path)["size"]))

    def delete(self, name: str) -> None:
        """Removes a file, and a local folder that is empty then, as it would not exist on S3; gone is no error."""
        path = self.path(name)
        self._retried(path, lambda fs: fs.rm_file(path) if fs.isfile(path) else None)
        if self.is_local:
            with contextlib.suppress(OSError):  # not empty, or gone as well
                Path(path).parent.rmdir()

    def list(self, prefix: str = "") -> list[str]:
        """Names of all files whose names start with `prefix`, sorted; empty when nothing is there."""
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Name and bytes of all files whose names start with `prefix`, in one listing."""
        folder = prefix.rpartition("/")[0]
        root = f"{self.uri}/{folder}" if folder else self.uri
        found = self._retried(root, lambda fs: _files_below(fs, root))
        skip = len(_stripped(self.uri)) + 1
        sizes = {path[skip:]: size for path, size in found.items()}
        return {n: s for n, s in sizes.items() if n.startswith(prefix) and not _is_unfinished(n)}

    def _filesystem(self) -> Any:
        if self.is_local:
            return LocalFileSystem()
        # Retries are ours and s3fs's; a stale listing would hide what another worker has just published.
        retries = {"retries": {"max_attempts": 1, "mode": "standard"}, "connect_timeout": 10, "read_timeout": 60}
        return fsspec.filesystem("s3", config_kwargs=retries, use_listings_cache=False)

    def _retried(self, path: str, call: Callable[[Any], T]) -> T:
        """`call` with the filesystem, again after passing failures, with growing waits."""
        for attempt in range(ATTEMPTS):
            try:
                return call(self._filesystem())
            except _ABSENT as error:
                raise InputDataError(f"storage: {path} does not exist; check the name and the URI") from error
            except _REFUSED as error:
                raise RequestError(f"storage: {path} is refused: {_one_line(error)}; check credentials") from error
            except _PASSING as error:
                if attempt == ATTEMPTS - 1:
                    raise StorageError(
                        f"storage: {path} still failed after {ATTEMPTS} attempts: {_one_line(error)}"
                    ) from error
                time.sleep(FIRST_WAIT_S * 2**attempt)
        raise AssertionError("unreachable")


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


def _stripped(uri: str) -> str:
    return uri.removeprefix("s3://")


def _files_below(fs: Any, root: str) -> dict[str, int]:
    if not fs.exists(root):
        return {}
    return {path: int(info["size"]) for path, info in fs.find(root, detail=True).items() if info["type"] == "file"}


def _is_unfinished(name: str) -> bool:
    return name.rpartition("/")[2].startswith(_UNFINISHED)


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{_UNFINISHED}{uuid.uuid4().hex}")
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

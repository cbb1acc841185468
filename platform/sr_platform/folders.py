"""A folder of files, such as a model, at a URI: complete or absent, on a local disk and on S3 alike.

    digest = publish_folder(Path("model"), "s3://bucket/run/models/unified")
    fetch_folder("s3://bucket/run/models/unified")     a local path; downloaded once per machine, and checked

A published folder also holds `LISTING_NAME`, the names, sizes and digests of its files. On S3 it is written last, and
without it nothing counts as published; a local folder is moved into its place whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sr_platform.errors import InputDataError, RequestError
from sr_platform.storage import Storage, open_storage

LISTING_NAME = ".complete.json"
_CACHE_PATH = Path.home() / ".cache" / "sr_platform" / "folders"
_FILES_AT_ONCE = 4


@dataclass(frozen=True)
class ListedFile:
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Listing:
    """What a folder holds, by relative name; `LISTING_NAME` itself is left out."""

    files: dict[str, ListedFile]

    @property
    def digest(self) -> str:
        """sha256 over the lines that `sha256sum` prints of the files in the order of their names."""
        lines = (f"{self.files[name].sha256}  {name}\n" for name in sorted(self.files))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())

    def only(self, suffixes: tuple[str, ...]) -> Listing:
        """The files whose names end so."""
        return Listing({name: file for name, file in self.files.items() if name.endswith(suffixes)})

    def to_bytes(self) -> bytes:
        files = {name: dataclasses.asdict(self.files[name]) for name in sorted(self.files)}
        return (json.dumps({"digest": self.digest, "files": files}, indent=2) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Listing:
        return cls({name: ListedFile(**file) for name, file in json.loads(data)["files"].items()})


def list_folder(path: Path) -> Listing:
    """The listing of what lies in a local folder now; every byte is read.

    Raises:
        InputDataError: it is not a folder, or an empty one.
    """
    storage = open_storage(path)
    names = [name for name in storage.list() if name != LISTING_NAME]
    if not names:
        raise InputDataError(f"folder: {path} is not a folder with files in it; give one")
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        files = pool.map(partial(_listed, storage), names)
        return Listing(dict(zip(names, files, strict=True)))


def folder_digest(path: Path) -> str:
    """`Listing.digest` of a local folder's files as they are now. Raises as `list_folder` does."""
    return list_folder(path).digest


def folder_exists(uri: str) -> bool:
    """Whether a folder was published at `uri`, wholly."""
    return open_storage(uri).exists(LISTING_NAME)


def published_digest(uri: str) -> str:
    """`Listing.digest` of the folder published at `uri`. Raises as `read_listing` does."""
    return read_listing(uri).digest


def publish_folder(local: Path, uri: str, *, may_move: bool = False) -> str:
    """Copies a folder to `uri`, where it replaces what was there; returns its digest.

    While it replaces another folder there is none for a while, and never a mixture. The same folder again is no work.
    With `may_move` the caller needs `local` no more: on one disk it is moved then.

    Raises:
        InputDataError: `local` is not a folder with files in it, or they change meanwhile.
        StorageError: storage keeps failing; nothing counts as published then.
    """
    listing, target = list_folder(local), open_storage(uri)
    if folder_exists(uri) and read_listing(uri) == listing:
        return listing.digest
    if target.is_local:
        _publish_local(open_storage(local), Path(target.uri), listing, may_move=may_move)
    else:
        _publish_s3(open_storage(local), target, listing)
    return listing.digest


def fetch_folder(uri: str, cache: Path | None = None) -> Path:
    """A local path of the folder at `uri`: a local folder as it is, one on S3 as a copy in `cache`.

    A copy appears only when every file has the digest that the listing promises, is shared by all processes of the
    machine, and never changes: another content gets another path.

    Raises:
        InputDataError: there is no folder, none that was published wholly, or a damaged one.
        StorageError: storage keeps failing.
    """
    source = open_storage(uri)
    if source.is_local:
        if not Path(source.uri).is_dir():
            raise InputDataError(f"folder: {source.uri} is not a folder; give one")
        return Path(source.uri)
    listing = read_listing(uri)
    cache = cache or _CACHE_PATH
    path = cache / f"{source.uri.rpartition('/')[2]}-{listing.digest[:16]}"
    if _is_whole(path, listing):
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however it ends
        if not _is_whole(path, listing):
            _download(source, path, listing)
    return path


def read_listing(uri: str) -> Listing:
    """What the folder published at `uri` holds. Raises InputDataError where none was published wholly."""
    storage = open_storage(uri)
    try:
        return Listing.from_bytes(storage.read_bytes(LISTING_NAME))
    except InputDataError as error:
        raise InputDataError(
            f"folder: {storage.uri} holds no complete folder, as {LISTING_NAME} is missing; check the URI, "
            "or publish it again"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputDataError(f"folder: {storage.path(LISTING_NAME)} is damaged; publish the folder again") from error


def _listed(storage: Storage, name: str) -> ListedFile:
    digest, size_bytes = hashlib.sha256(), 0
    for chunk in storage.read_chunks(name):
        digest.update(chunk)
        size_bytes += len(chunk)
    return ListedFile(size_bytes, digest.hexdigest())


def _publish_local(source: Storage, path: Path, listing: Listing, *, may_move: bool) -> None:
    if path.exists() and not path.is_dir():
        raise RequestError(f"folder: {path} is a file; give another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, old = (path.with_name(f".{path.name}.{kind}-{uuid.uuid4().hex[:8]}") for kind in ("unfinished", "old"))
    try:
        if may_move and Path(source.uri).stat().st_dev == path.parent.stat().st_dev:
            _move(Path(source.uri), unfinished, listing)
        else:
            _copy(source, open_storage(unfinished), listing)
        if path.exists():
            path.rename(old)
        unfinished.rename(path)
    finally:
        for leftover in (unfinished, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _move(source: Path, target: Path, listing: Listing) -> None:
    for name in listing.files:
        with (source / name).open("rb") as file:
            os.fsync(file.fileno())  # or a crash of the machine could leave the names without the bytes
    source.rename(target)
    open_storage(target).write_bytes_atomic(LISTING_NAME, listing.to_bytes())


def _publish_s3(source: Storage, target: Storage, listing: Listing) -> None:
    target.delete(LISTING_NAME)
    for name in target.list():
        if name not in listing.files:
            target.delete(name)
    _copy(source, target, listing)


def _download(source: Storage, path: Path, listing: Listing) -> None:
    """Under the lock: what lies at `path` or beside it was left by a killed process, or is damaged."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    for leftover in (unfinished, path):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(leftover)
    try:
        _copy(source, open_storage(unfinished), listing)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _copy(source: Storage, target: Storage, listing: Listing) -> None:
    """All files of `listing`, checked on their way, then the listing."""
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        tuple(pool.map(partial(_copy_file, source, target), listing.files, listing.files.values()))
    target.write_bytes_atomic(LISTING_NAME, listing.to_bytes())


def _copy_file(source: Storage, target: Storage, name: str, expected: ListedFile) -> None:
    digest = hashlib.sha256()

    def chunks() -> Iterator[bytes]:
        for chunk in source.read_chunks(name):
            digest.update(chunk)
            yield chunk
        if digest.hexdigest() != expected.sha256:
            raise InputDataError(
                f"folder: {source.path(name)} differs from its listing: it is damaged or was changed meanwhile; "
                "publish the folder again"
            )

    # What raises before the last piece is never published.
    target.write_chunks(name, chunks())


def _is_whole(path: Path, listing: Listing) -> bool:
    """Whether the copy is there, as it was checked when it was made; somebody may have tidied up since."""
    files = ((path / name, file.size_bytes) for name, file in listing.files.items())
    return path.is_dir() and all(file.is_file() and file.stat().st_size == size for file, size in files)

"""Pictures in zip, tar and tar.gz archives, local or on S3, read by range and never unpacked to disk.

    tables = list_archives(storage, {"DIV2K_train_HR.zip": FileDetails(...)}, cache)
    data = read_place(storage, tables["DIV2K_train_HR.zip"].members[0].place, cache)

In : archives in a storage; a cache, in which the table of an archive is kept until the archive changes.
Out: every member with its place, from which it is read by one request, or with its problem. What is damaged is named,
     never dropped: a member by its own problem, an archive by its table's.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import indexed_gzip
from tqdm import tqdm

from sr_platform.errors import InputDataError
from sr_platform.gzip_index import IndexWriter, read_gzip_range
from sr_platform.range_file import RangeFile
from sr_platform.storage import FileDetails, Storage

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
OTHER_SUFFIXES = (".7z", ".rar", ".tar.bz2", ".tar.xz", ".tar.zst", ".tbz2", ".txz")
"""Archives that are recognised but not read."""

_TABLE_VERSION = 1
_SCANS_AT_ONCE = 4
_MAX_TAR_HEADER_BYTES = 16 * 2**20
_MAX_ZIP_DIRECTORY_BYTES = 512 * 2**20
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_EXTRA_SLACK_BYTES = 512
_UTF8_FLAG, _ENCRYPTED_FLAG = 0x800, 0x1

# What the libraries raise on damaged archives; StorageError is none of them.
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    indexed_gzip.ZranError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    ArithmeticError,
    struct.error,
    zlib.error,
    NotImplementedError,
    RecursionError,
)

Place = list[Any]
"""JSON: ["file", name] or [kind of archive, its name, ...]."""


class Member(NamedTuple):
    """One file of an archive."""

    name: str
    """As stored; bytes that are not UTF-8 are lone surrogates, as in Python's names of files."""
    size_bytes: int
    place: Place
    problem: str = ""
    """Why it cannot be read, as "reason: detail"."""


class MemberTable(NamedTuple):
    """What an archive holds."""

    members: list[Member]
    """In the order of the archive; folders are left out."""
    problem: str = ""
    """Why there may be members that are not listed, as "reason: detail"."""


def is_archive(name: str) -> bool:
    return name.lower().endswith((*SUFFIXES, *OTHER_SUFFIXES))


def list_archives(storage: Storage, archives: Mapping[str, FileDetails], cache: Storage) -> dict[str, MemberTable]:
    """The table of every archive, scanned several at a time, or from the cache when it did not change."""
    with ThreadPoolExecutor(_SCANS_AT_ONCE) as pool:
        tables = pool.map(lambda name: _table_of(storage, name, archives[name], cache), archives)
        progress = tqdm(tables, total=len(archives), desc="archives", unit="archive", disable=not archives)
        return dict(zip(archives, progress, strict=True))


def read_place(storage: Storage, place: Place, cache: Storage) -> bytes:
    """The bytes of a file or member.

    Raises:
        InputDataError: it is gone or damaged.
        StorageError: storage keeps failing.
    """
    kind, name, *where = place
    if kind == "file":
        return storage.read_bytes(name)
    if kind == "zip":
        return _read_zipped(storage, name, *where)
    start, end, *index = where
    if kind == "tar":
        data = storage.read_range(name, start, end)
    else:
        data = read_gzip_range(storage, name, start, end, cache=cache, index=index[0])
    if len(data) != end - start:
        raise InputDataError(f"{storage.path(name)} ends within it: {len(data)} of {end - start} bytes are there")
    return data


def _table_of(storage: Storage, name: str, details: FileDetails, cache: Storage) -> MemberTable:
    identity = json.dumps([_TABLE_VERSION, storage.uri, name, details.size_bytes, details.fingerprint])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
    if cache.exists(f"archives/{digest}.json.gz"):
        members, problem = json.loads(gzip.decompress(cache.read_bytes(f"archives/{digest}.json.gz")))
        return MemberTable([Member(*member) for member in members], problem)
    table = _scanned(storage, name, details.size_bytes, cache, f"archives/{digest}.gzidx")
    text = gzip.compress(json.dumps(table).encode(), compresslevel=1, mtime=0)
    cache.write_bytes_atomic(f"archives/{digest}.json.gz", text)
    return table


def _scanned(storage: Storage, name: str, size_bytes: int, cache: Storage, index: str) -> MemberTable:
    if not name.lower().endswith(SUFFIXES):
        read = ", ".join(SUFFIXES)
        return MemberTable([], f"unreadable archive: only {read} are read; pack it again, or unpack it")
    # By content: archives of either kind are found under the other's name.
    head = storage.read_range(name, 0, 4)
    if head.startswith(b"PK") or name.lower().endswith(".zip"):
        return _scan_zip(RangeFile(storage, name, size_bytes, window_bytes=2**20), name)
    if not head.startswith(b"\x1f\x8b"):
        return _scan_tar(RangeFile(storage, name, size_bytes), ["tar", name], size_bytes)
    writer = IndexWriter(storage, name, size_bytes)
    table = _scan_tar(writer.stream, ["tgz", name], None, source=writer.source, index=index)
    if table.members:
        writer.save(cache, index)
    return table


def _scan_zip(file: RangeFile, name: str) -> MemberTable:
    directory: Any = _Bounded(file, _MAX_ZIP_DIRECTORY_BYTES)
    try:
        with zipfile.ZipFile(directory) as archive:
            return MemberTable([_zip_member(info, name) for info in archive.infolist() if not info.is_dir()])
    except _DAMAGED as error:
        return MemberTable([], _archive_problem(error, file))


def _zip_member(info: zipfile.ZipInfo, archive: str) -> Member:
    raw = info.orig_filename
    if not info.flag_bits & _UTF8_FLAG:
        # Not declared, and zipfile reads it as code page 437: in fact it mostly is UTF-8.
        raw = raw.encode("cp437", "surrogateescape").decode("utf-8", "surrogateescape")
    sizes = [info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type]
    place = ["zip", archive, *sizes, len(info.orig_filename.encode("utf-8", "surrogateescape"))]
    problem = ""
    if info.flag_bits & _ENCRYPTED_FLAG:
        problem = "unreadable: it is encrypted"
    elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        problem = f"unreadable: compressed by method {info.compress_type}; only stored and deflated members are read"
    elif info.external_attr >> 28 == 0o12:
        problem = "not a file: a link"
    return Member(raw, info.file_size, place, problem)


def _read_zipped(
    storage: Storage, name: str, offset: int, packed_bytes: int, size_bytes: int, crc: int, method: int, name_bytes: int
) -> bytes:
    def read(start: int, end: int) -> bytes:
        return storage.read_range(name, start, end)

    where = f"{storage.path(name)}, member at byte {offset}"
    # The local header repeats the name, and its extra field has a length of its own: room for it comes along.
    data = read(offset, offset + _LOCAL_HEADER.size + name_bytes + _EXTRA_SLACK_BYTES + packed_bytes)
    if len(data) < _LOCAL_HEADER.size or not data.startswith(b"PK\x03\x04"):
        raise InputDataError(f"{where}: there is no member, the archive is damaged")
    *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(data)
    start = _LOCAL_HEADER.size + name_bytes + extra_bytes
    if start + packed_bytes > len(data):
        data = read(offset, offset + start + packed_bytes)
    packed = data[start : start + packed_bytes]
    try:
        # One byte more than declared tells a member that lies about its size, whatever it would expand to.
        unpacked = (
            packed if method == zipfile.ZIP_STORED else zlib.decompressobj(-15).decompress(packed, size_bytes + 1)
        )
    except zlib.error as error:
        raise InputDataError(f"{where}: {error}") from error
    if len(unpacked) != size_bytes:
        raise InputDataError(f"{where}: it has not the {size_bytes} bytes that the archive says")
    if zlib.crc32(unpacked) != crc:
        raise InputDataError(f"{where}: its checksum is wrong")
    return unpacked


class _Bounded:
    """A file whose reads are bounded: a damaged or hostile header may claim any size."""

    def __init__(self, file: Any, max_bytes: int) -> None:
        self._file, self._max_bytes = file, max_bytes
        self.tell, self.seek, self.seekable = file.tell, file.seek, file.seekable

    def read(self, size: int = -1) -> bytes:
        data = bytes(self._file.read(size if 0 <= size <= self._max_bytes else self._max_bytes + 1))
        if len(data) > self._max_bytes:
            raise OSError(f"a header of more than {self._max_bytes} bytes")
        return data


def _scan_tar(
    file: Any, place: Place, size_bytes: int | None, *, source: RangeFile | None = None, index: str = ""
) -> MemberTable:
    """Of a tar or, when its size is unknown, of a decompressed stream."""
    members: list[Member] = []
    extra = [index] if index else []
    try:
        headers: Any = _Bounded(file, _MAX_TAR_HEADER_BYTES)
        with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it keeps all of them
                if info.size < 0 or archive.offset <= info.offset:
                    raise tarfile.ReadError(f"a negative size at byte {info.offset}")
                end = info.offset_data + info.size
                if not info.isdir():
                    problem = _tar_problem(info, end, size_bytes)
                    members.append(Member(info.name, info.size, [*place, info.offset_data, end, *extra], problem))
            _check_end(file, archive.offset)
    except _DAMAGED as error:
        return MemberTable(members, _archive_problem(error, source or file))
    return MemberTable(members)


def _tar_problem(info: tarfile.TarInfo, end: int, size_bytes: int | None) -> str:
    if not info.isreg() or info.issparse():
        return "not a file: a link, device or sparse file"
    return f"unreadable: the archive ends within it, at byte {size_bytes}" if size_bytes and end > size_bytes else ""


def _check_end(file: Any, offset: int) -> None:
    """tarfile ends silently at a damaged header, and at the end of a file that was cut off."""
    file.seek(offset)
    block = bytes(file.read(tarfile.BLOCKSIZE))
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"the header at byte {offset} is damaged")
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends without an end mark, so it was cut off")


def _archive_problem(error: BaseException, file: RangeFile) -> str:
    if file.failure and not isinstance(file.failure, InputDataError):
        raise file.failure from error
    detail = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return f"unreadable archive: {detail}; pictures in it may be missing"

"""Members of archives are listed once and read by range; what is damaged is named, never dropped."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sr_platform import archives as archives_module
from sr_platform.archives import MemberTable, is_archive, list_archives, read_place
from sr_platform.errors import InputDataError, StorageError
from sr_platform.storage import Storage, open_storage

FILES = {f"folder/{index}.png": np.random.default_rng(index).bytes(3000 * index + index) for index in range(5)}
KINDS = ["a.zip", "a.tar", "a.tar.gz", "a.tgz"]


def packed(name: str, files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, data in files.items():
                archive.writestr(path, data)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w:gz" if name.endswith("gz") else "w") as tar:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "cache")


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(request.getfixturevalue("s3_uri") + "/x" if request.param == "s3" else tmp_path / "in")


@pytest.fixture
def scan(tmp_path: Path, cache: Storage) -> Callable[[str, bytes], MemberTable]:
    """`scan(name, data)` -> the table of an archive in a folder."""

    def scan(name: str, data: bytes) -> MemberTable:
        storage = open_storage(tmp_path / "in")
        storage.write_bytes_atomic(name, data)
        return list_archives(storage, {name: storage.details()[name]}, cache)[name]

    return scan


@pytest.fixture
def read(tmp_path: Path, cache: Storage) -> Callable[[list], bytes]:
    return lambda place: read_place(open_storage(tmp_path / "in"), place, cache)


@pytest.mark.parametrize("name", KINDS)
def test_every_member_is_listed_and_read_from_a_folder_and_from_s3(name: str, storage: Storage, cache: Storage) -> None:
    storage.write_bytes_atomic(name, packed(name, FILES))
    table = list_archives(storage, storage.details(), cache)[name]
    assert table.problem == ""
    assert {member.name: member.size_bytes for member in table.members} == {n: len(d) for n, d in FILES.items()}
    assert {member.name: read_place(storage, member.place, cache) for member in table.members} == FILES


@pytest.mark.parametrize("name", KINDS)
def test_an_archive_is_scanned_once_until_it_changes(
    name: str, storage: Storage, cache: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes_atomic(name, packed(name, FILES))
    first = list_archives(storage, storage.details(), cache)
    with monkeypatch.context() as patch:
        patch.setattr(archives_module, "_scanned", lambda *args: pytest.fail("scanned again"))
        assert list_archives(storage, storage.details(), cache) == first
    storage.write_bytes_atomic(name, packed(name, {"other.png": b"1"}))
    (member,) = list_archives(storage, storage.details(), cache)[name].members
    assert (member.name, read_place(storage, member.place, cache)) == ("other.png", b"1")


def test_files_beside_archives_are_read_the_same_way(tmp_path: Path, cache: Storage) -> None:
    (tmp_path / "a.png").write_bytes(b"1")
    assert read_place(open_storage(tmp_path), ["file", "a.png"], cache) == b"1"
    assert [name for name in ("a.ZIP", "a.tar.GZ", "a.7z", "a.tar.xz", "a.gz", "a.png") if is_archive(name)] == [
        "a.ZIP",
        "a.tar.GZ",
        "a.7z",
        "a.tar.xz",
    ]


@pytest.mark.parametrize(("name", "as_name"), [("a.tar", "a.zip.tar"), ("a.zip", "a.tar"), ("a.tgz", "a.tar")])
def test_kinds_are_told_by_content(name: str, as_name: str, scan: Callable[[str, bytes], MemberTable]) -> None:
    assert len(scan(as_name, packed(name, FILES)).members) == len(FILES)


def test_other_archives_are_named_rather_than_passed_over(scan: Callable[[str, bytes], MemberTable]) -> None:
    assert scan("a.7z", b"7z") == ([], f"unreadable archive: only {', '.join(archives_module.SUFFIXES)} are read; "
                                       "pack it again, or unpack it")  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("data", [b"", b"no archive at all", b"PK\x03\x04", b"\x1f\x8b\x08", bytes(600)])
def test_what_is_no_archive_is_a_problem_of_its_own(
    name: str, data: bytes, scan: Callable[[str, bytes], MemberTable]
) -> None:
    table = scan(name, data)
    if table.problem:
        assert table == ([], table.problem)
        assert table.problem.startswith("unreadable archive: ")
    else:
        assert data == bytes(600), "zeros end a tar"


@pytest.mark.parametrize("name", KINDS)
def test_an_archive_that_is_cut_off_anywhere_says_so_and_loses_no_whole_member(
    name: str, scan: Callable[[str, bytes], MemberTable], read: Callable[[list], bytes]
) -> None:
    whole = packed(name, FILES)
    for part in range(1, 10):
        # Without the zeros that fill a tar up.
        table = scan(name, whole[: len(whole.rstrip(b"\0")) * part // 10])
        told = [member for member in table.members if member.problem]
        assert table.problem.startswith("unreadable archive: ")
        for member in table.members:
            if not member.problem:
                try:
                    assert read(member.place) == FILES[member.name]
                except InputDataError:
                    told.append(member)
        assert len(told) <= 1


def test_a_damaged_header_within_a_tar_is_a_problem(scan: Callable[[str, bytes], MemberTable]) -> None:
    data = bytearray(packed("a.tar", FILES))
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        header = tar.getmembers()[2].offset
    data[header + 150] ^= 1
    table = scan("a.tar", bytes(data))
    assert [member.name for member in table.members] == ["folder/0.png", "folder/1.png"]
    assert table.problem == f"unreadable archive: the header at byte {header} is damaged; pictures in it may be missing"


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + bytes(3) + b"\x7f" + bytes(7)])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.timeout(20)
def test_hostile_sizes_in_a_tar_neither_hang_nor_fill_memory(
    size: bytes, kind: bytes, scan: Callable[[str, bytes], MemberTable]
) -> None:
    info = tarfile.TarInfo("a.png")
    info.type = kind
    header = bytearray(info.tobuf())
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    table = scan("a.tar", packed("a.tar", {"0.png": b"0"})[:1024] + bytes(header) + bytes(2048))
    assert table.members[0].name == "0.png"
    assert table.problem or table.members[1].problem


def test_links_and_devices_are_problems(scan: Callable[[str, bytes], MemberTable]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    table = scan("a.tar", buffer.getvalue())
    assert [member.problem for member in table.members] == ["not a file: a link, device or sparse file"] * 4
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert scan("a.zip", buffer.getvalue()).members[0].problem == "not a file: a link"


def test_names_that_are_not_utf8_keep_their_bytes(
    scan: Callable[[str, bytes], MemberTable], read: Callable[[list], bytes]
) -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        info = tarfile.TarInfo("caf\xe9.png")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"1"))
    zipped = packed("a.zip", {"cafX.png": b"1"}).replace(b"cafX.png", b"caf\xe9.png")
    for archive, data in (("a.tar", buffer.getvalue()), ("a.tgz", gzip.compress(buffer.getvalue())), ("a.zip", zipped)):
        (member,) = scan(archive, data).members
        assert (member.name, read(member.place)) == (name, b"1")
    utf8 = packed("a.zip", {"cafXX.png": b"1"}).replace(b"cafXX.png", "caf\xe9.png".encode())
    assert scan("a.zip", utf8).members[0].name == "caf\xe9.png"


def test_members_that_zip_cannot_give_are_problems(scan: Callable[[str, bytes], MemberTable]) -> None:
    data = bytearray(packed("a.zip", {"a.png": b"1" * 100}))
    directory = data.rindex(b"PK\x01\x02")
    data[directory + 8] |= 1
    assert scan("a.zip", bytes(data)).members[0].problem == "unreadable: it is encrypted"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.png", b"1" * 100)
    assert "compressed by method 12" in scan("a.zip", buffer.getvalue()).members[0].problem


def test_a_damaged_member_is_told_when_it_is_read(
    scan: Callable[[str, bytes], MemberTable], read: Callable[[list], bytes]
) -> None:
    whole = packed("a.zip", {"a.png": b"1" * 100 + bytes(range(256)) * 9})
    directory = whole.rindex(b"PK\x01\x02")
    start = 30 + len("a.png")
    for place, message in (
        (directory + 16, "checksum"),
        (directory + 24, "has not the"),
        (start + 1, "member at byte 0"),
        (0, "no member"),
    ):
        data = bytearray(whole)
        data[place] ^= 0x5A
        with pytest.raises(InputDataError, match=message):
            read(scan("a.zip", bytes(data)).members[0].place)


def test_a_member_that_expands_beyond_its_size_is_stopped(
    scan: Callable[[str, bytes], MemberTable], read: Callable[[list], bytes]
) -> None:
    data = bytearray(packed("a.zip", {"a.png": bytes(50_000_000)}))
    struct.pack_into("<I", data, data.rindex(b"PK\x01\x02") + 24, 1000)
    (member,) = scan("a.zip", bytes(data)).members
    assert member.size_bytes == 1000
    with pytest.raises(InputDataError, match="has not the 1000 bytes"):
        read(member.place)


def test_a_long_extra_field_of_a_zip_member_is_skipped(
    scan: Callable[[str, bytes], MemberTable], read: Callable[[list], bytes]
) -> None:
    info = zipfile.ZipInfo("a.png")
    info.extra = struct.pack("<HH", 0x9999, 5000) + bytes(5000)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, FILES["folder/4.png"])
    assert read(scan("a.zip", buffer.getvalue()).members[0].place) == FILES["folder/4.png"]


@pytest.mark.parametrize("name", KINDS)
def test_storage_that_fails_stops_the_job_rather_than_blaming_an_archive(
    name: str, tmp_path: Path, cache: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path / "in")
    storage.write_bytes_atomic(name, packed(name, FILES))
    details = storage.details()
    read_range = Storage.read_range

    def fail(self: Storage, file: str, start: int, end: int) -> bytes:
        if file == name and (start, end) != (0, 4):
            raise StorageError("storage: gone")
        return read_range(self, file, start, end)

    monkeypatch.setattr(Storage, "read_range", fail)
    with pytest.raises(StorageError, match="gone"):
        list_archives(storage, details, cache)

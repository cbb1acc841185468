"""Finds the pictures of the sources, in folders and in archives, with what lies beside them, without reading one.

In : sources.
Out: `Picture`s, in the order of the sources and of their names; whatever looks like a picture and cannot be read is
     one too, with its problem.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

from pipelines.contact_sheet import CONTACT_SHEET_NAME
from pipelines.sources import SourceConfig
from pipelines.stages.decode import SUFFIXES
from sr_platform.archives import MemberTable, Place, is_archive, list_archives
from sr_platform.errors import InputDataError
from sr_platform.shards import MANIFEST_NAME
from sr_platform.storage import FileDetails, Storage, open_storage

MAX_PICTURE_BYTES = 512 * 2**20
MAX_SIDECAR_BYTES = 2**20
_SIDECAR_SUFFIXES = (".txt", ".json")
_PREPARED_LQ = re.compile(r"(.*/)?([^/.]+)\.lq\d*\.png")


@dataclass(frozen=True)
class Picture:
    """One picture of the input, found by listing."""

    name: str
    """"<source>/<path below its URI>", with archives as folders; printable, and unique in a run."""
    place: str
    """Where its bytes and what lies beside it are, as ASCII JSON that `Ingest` reads."""
    size_bytes: int
    fingerprint: str
    """Changes when the bytes, or those of the files beside it, may have changed."""
    problem: str = ""
    """Why it is not to be read at all, as "reason: detail"."""


class _Entry(NamedTuple):
    """A file, a member of an archive, or what is wrong with an archive."""

    path: str
    """Below the source's URI, printable."""
    place: Place
    size_bytes: int
    fingerprint: str
    problem: str = ""


def list_pictures(sources: Sequence[SourceConfig], cache: Storage, *, job: str = "prepare") -> list[Picture]:
    """Every picture of every source, in the order of the sources and then of the names.

    `cache` keeps what is known about archives, so that they are looked through once. `job` is named in errors.

    Raises:
        InputDataError: a source does not exist, or holds no picture.
    """
    return [picture for source in sources for picture in _list_source(source, cache, job)]


def storage_of(source: SourceConfig) -> Storage:
    """The source's folder or, when the source is a single archive, the folder around it."""
    storage = open_storage(source.uri)
    folder, _, name = storage.uri.rpartition("/")
    if is_archive(name) and folder not in ("", "s3:/") and open_storage(folder).exists(name):
        return open_storage(folder)
    return storage


def printable(name: str) -> str:
    """The name with everything unprintable escaped; different names stay different."""
    return "".join(_escaped(char) for char in name)


def _list_source(source: SourceConfig, cache: Storage, job: str) -> list[Picture]:
    storage = storage_of(source)
    uri = open_storage(source.uri).uri
    only = uri.rpartition("/")[2] if storage.uri != uri else ""
    files = {name: d for name, d in sorted(storage.details(only).items()) if not only or name == only}
    archives = {
        name: details
        for name, details in files.items()
        if is_archive(name) and _is_addressable(name) and not source.takes_nothing_below(printable(name))
    }
    entries = list(_entries(files, list_archives(storage, archives, cache)))
    pictures = list(_pictures(source, entries))
    if not pictures:
        held = (
            f"{len(entries)} files, none of them a picture that it takes" if entries else "nothing, or does not exist"
        )
        raise InputDataError(
            f"{job}: source {source.name}: {uri} holds {held}; give a folder or an archive with "
            f"{', '.join(SUFFIXES)} files, and check include and exclude"
        )
    return pictures


def _entries(files: Mapping[str, FileDetails], tables: Mapping[str, MemberTable]) -> Iterator[_Entry]:
    """Files and, in place of archives, their members."""
    for name, (size_bytes, changed) in files.items():
        path, fingerprint = printable(name), f"{size_bytes}-{changed}"
        if name not in tables:
            problem = "" if _is_addressable(name) else f"unsafe name: {path} leads out of the folder"
            yield _Entry(path, ["file", name], size_bytes, fingerprint, problem)
            continue
        for member in tables[name].members:
            unsafe = _unsafe(member.name)
            problem = f"unsafe name: {unsafe}" if unsafe else member.problem
            inner = member.name if unsafe else str(PurePosixPath(member.name))
            yield _Entry(f"{path}/{printable(inner)}", member.place, member.size_bytes, fingerprint, problem)
        if tables[name].problem:
            yield _Entry(path, [], size_bytes, fingerprint, tables[name].problem)


def _pictures(source: SourceConfig, entries: Sequence[_Entry]) -> Iterator[Picture]:
    """In the order of names; of several with one name the first keeps it, the others are problems."""
    sidecars: dict[str, _Entry] = {}
    for entry in entries:
        if entry.path.endswith(_SIDECAR_SUFFIXES):
            sidecars.setdefault(entry.path, entry)
    found = sorted(_of_interest(source, entries), key=lambda entry: entry.path)
    taken: set[str] = set()
    for entry in found:
        name, problem = entry.path, entry.problem
        if name in taken:
            name = next(free for n in range(2, len(found) + 2) if (free := f"{entry.path}#{n}") not in taken)
            problem = f"duplicate name: the first {entry.path} is used"
        taken.add(name)
        yield _picture(source.name, entry._replace(path=name, problem=problem), _beside(entry.path, sidecars))


def _of_interest(source: SourceConfig, entries: Sequence[_Entry]) -> Iterable[_Entry]:
    """Pictures that the source takes, and archives that could not be read whole."""
    paths = {entry.path for entry in entries}
    for entry in entries:
        if not entry.place or (
            entry.path.lower().endswith(SUFFIXES)
            and source.takes(entry.path)
            and not _is_of_a_dataset(entry.path, paths)
        ):
            yield entry


def _is_of_a_dataset(path: str, paths: Set[str]) -> bool:
    """Whether it is the lq or the contact sheet of a prepared dataset: neither is a source of hq."""
    if prepared := _PREPARED_LQ.fullmatch(path):
        return f"{prepared[1] or ''}{prepared[2]}.hq.png" in paths
    folder, _, name = path.rpartition("/")
    return name == CONTACT_SHEET_NAME and f"{folder}/{MANIFEST_NAME}".lstrip("/") in paths


def _picture(source: str, entry: _Entry, beside: Sequence[_Entry]) -> Picture:
    problem = entry.problem
    if not problem and entry.size_bytes > MAX_PICTURE_BYTES:
        problem = f"too many bytes: {entry.size_bytes}, more than {MAX_PICTURE_BYTES}"
    for sidecar in beside:
        name = PurePosixPath(sidecar.path).name
        if not problem and sidecar.problem:
            problem = f"unreadable caption: {name}: {sidecar.problem}"
        if not problem and sidecar.size_bytes > MAX_SIDECAR_BYTES:
            problem = f"unreadable caption: {name} has {sidecar.size_bytes} bytes, more than {MAX_SIDECAR_BYTES}"
    files = [[PurePosixPath(sidecar.path).name, sidecar.place] for sidecar in beside]
    place = json.dumps({"source": source, "at": entry.place, "beside": files})
    # The members of one archive share its fingerprint.
    fingerprints = dict.fromkeys([entry.fingerprint, *(sidecar.fingerprint for sidecar in beside)])
    return Picture(f"{source}/{entry.path}", place, entry.size_bytes, "+".join(fingerprints), problem)


def _beside(path: str, sidecars: Mapping[str, _Entry]) -> list[_Entry]:
    """`a/b.txt` and `a/b.json` beside `a/b.png` or, as in webdataset, `a/b.hq.png`: a key may end at the first dot."""
    folder, _, base = path.rpartition("/")
    stems = [stem for stem in (base.rpartition(".")[0], base.partition(".")[0]) if stem]
    found = []
    for suffix in _SIDECAR_SUFFIXES:
        names = (f"{folder}/{stem}{suffix}" if folder else f"{stem}{suffix}" for stem in stems)
        found += [sidecars[name] for name in names if name in sidecars][:1]
    return found


def _is_addressable(name: str) -> bool:
    """Whether storage can read it: object stores allow names that no folder could hold."""
    return not name.startswith("/") and ".." not in name.split("/")


def _unsafe(name: str) -> str:
    """What is wrong with the name of an archive's member; empty when nothing is."""
    if re.match(r"[/\\]|[A-Za-z]:", name):
        return "it is an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return "it leads out of the archive"
    if any(char < " " or char == "\x7f" for char in name):
        return "it has control characters"
    return "" if name.strip("./") else "it is empty"


def _escaped(char: str) -> str:
    if char == "\\":
        return "\\\\"
    if char.isprintable():
        return char
    # A byte that is not UTF-8 is a lone surrogate in Python's names of files.
    code = ord(char)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"

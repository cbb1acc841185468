"""What is known to be done, in a hidden folder of the output: a record per published result.

    .restore/done-<digest>.json      a record of a run that is under way, written by whoever published the result
    .restore/journal-00000.jsonl     records put together by the driver, as it goes
    .restore/records.jsonl           all records, after a run
    .restore/claim.json              settings, and the outputs a run is making: what lies there then is its own
    .restore/settings/<digest>.json  settings by their digests

A result is published first and recorded then: what a killed run leaves unrecorded are the pictures it had in hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sr_platform.errors import InputDataError
from sr_platform.storage import Storage, open_storage

FOLDER = ".restore"
_DONE, _JOURNAL, _ALL, _CLAIM = "done-", "journal-", "records.jsonl", "claim.json"


@dataclass(frozen=True)
class Record:
    """A result that was published, and all that it depends on."""

    path: str
    """Of the input, below the input's URI."""
    output: str
    fingerprint: str
    """Of the input in its listing, and of the files beside it."""
    input_sha256: str
    input_size_px: tuple[int, int]
    """Width, height."""
    output_sha256: str
    output_bytes: int
    output_size_px: tuple[int, int]
    prompt: str
    settings: str
    """Digest."""
    model_version: str
    manifest_digest: str | None
    seconds: float
    """Spent on restoring it."""
    notes: tuple[str, ...] = ()
    """What of the input could not be used."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Record:
        fields = json.loads(text)
        for name in ("input_size_px", "output_size_px", "notes"):
            fields[name] = tuple(fields[name])
        return cls(**fields)


@dataclass(frozen=True)
class Claim:
    """What a run that did not end had begun."""

    settings: str
    model_version: str
    outputs: frozenset[str]


class Records:
    """The records below one output; safe to use from several processes, as long as one alone puts them together."""

    def __init__(self, out: Storage) -> None:
        self._storage = open_storage(f"{out.uri}/{FOLDER}")
        self._num_parts = 0

    @property
    def uri(self) -> str:
        return self._storage.uri

    def load(self) -> dict[str, Record]:
        """The last record of every output. Raises InputDataError when a file of them is damaged."""
        names = self._storage.list()
        parts = [name for name in names if name.startswith(_JOURNAL)]
        self._num_parts = 1 + max((int(name[len(_JOURNAL) :].partition(".")[0]) for name in parts), default=-1)
        found: dict[str, Record] = {}
        for name in [*([_ALL] if _ALL in names else []), *parts]:
            found.update((record.output, record) for record in self._read_lines(name))
        singles = [name for name in names if name.startswith(_DONE)]
        for name, data in zip(singles, self._storage.read_all(singles), strict=True):
            record = self._parsed(name, data)
            found[record.output] = record
        return found

    def write(self, record: Record) -> None:
        """By whoever published the result."""
        self._storage.write_bytes_atomic(_single(record.output), record.to_json().encode())

    def find(self, output: str) -> Record | None:
        """A record of the run that is under way."""
        name = _single(output)
        try:
            return self._parsed(name, self._storage.read_bytes(name))
        except InputDataError:
            return None

    def gather(self, records: Sequence[Record]) -> None:
        """Puts records that were written one by one together, so that a folder never holds many files."""
        lines = [record.to_json() + "\n" for record in records]
        if lines:
            self._storage.write_bytes_atomic(f"{_JOURNAL}{self._num_parts:05d}.jsonl", "".join(lines).encode())
            self._num_parts += 1
            self._delete_singles(records)

    def finish(self, records: Mapping[str, Record]) -> None:
        """After a run: all records in one file; no claim, as there is nothing left that it could be about."""
        lines = (f"{records[output].to_json()}\n".encode() for output in sorted(records))
        self._storage.write_chunks(_ALL, lines)
        for prefix in (_JOURNAL, _DONE):
            self._storage.delete_all(prefix)
        self._storage.delete(_CLAIM)
        self._num_parts = 0

    def remove_if_empty(self) -> None:
        """A local folder that only a look has made, and the output around it; S3 has no empty ones."""
        if self._storage.is_local:
            for folder in (Path(self.uri), Path(self.uri).parent):
                with contextlib.suppress(OSError):  # not empty, or not there
                    folder.rmdir()

    def claim(self, claim: Claim) -> None:
        content = {**dataclasses.asdict(claim), "outputs": sorted(claim.outputs)}
        self._storage.write_bytes_atomic(_CLAIM, json.dumps(content).encode())

    def claimed(self) -> Claim | None:
        """By the last run, when it did not end."""
        if not self._storage.exists(_CLAIM):
            return None
        try:
            content = json.loads(self._storage.read_bytes(_CLAIM))
            return Claim(content["settings"], content["model_version"], frozenset(content["outputs"]))
        except (ValueError, LookupError, TypeError) as error:
            raise self._damaged(_CLAIM) from error

    def remember_settings(self, digest: str, settings: Mapping[str, Any]) -> None:
        self._storage.write_bytes_atomic(f"settings/{digest}.json", json.dumps(settings, sort_keys=True).encode())

    def settings_of(self, digest: str) -> dict[str, Any]:
        """Empty where they are not known any more."""
        try:
            found: dict[str, Any] = json.loads(self._storage.read_bytes(f"settings/{digest}.json"))
        except (InputDataError, ValueError):
            return {}
        return found

    def _read_lines(self, name: str) -> Iterator[Record]:
        for line in self._storage.read_bytes(name).splitlines():
            yield self._parsed(name, line)

    def _parsed(self, name: str, data: bytes) -> Record:
        try:
            return Record.from_json(data)
        except (ValueError, LookupError, TypeError) as error:
            raise self._damaged(name) from error

    def _damaged(self, name: str) -> InputDataError:
        return InputDataError(
            f"restore: {self._storage.path(name)} is damaged; delete it, and what it tells of is made again "
            "with --overwrite"
        )

    def _delete_singles(self, records: Iterable[Record]) -> None:
        for record in records:
            self._storage.delete(_single(record.output))


def _single(output: str) -> str:
    return f"{_DONE}{hashlib.sha256(output.encode('utf-8', 'surrogateescape')).hexdigest()}.json"

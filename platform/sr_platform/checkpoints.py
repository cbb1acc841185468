"""Checkpoints of training that any number of ranks can read: train state -> files -> train state, exported weights.

    <uri>/update_00000100/<attempt>-00000-of-00002.000.safetensors    what rank 0 of 2 owns, in files of PART_BYTES
    <uri>/update_00000100/<attempt>-00000-of-00002.json               then its table of them; it goes with the commit
    <uri>/update_00000100/checkpoint.json                             all tables and what the caller adds: the commit

Only checkpoint.json makes it a checkpoint, and rank 0 writes it when every rank's files are there. An attempt is one
life of all workers: its name is in its files', so that one which was thought dead and still writes mixes with no other.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import pydantic
import torch
from torch import Tensor

from sr_platform.config import StrictConfig
from sr_platform.errors import InputDataError
from sr_platform.storage import CHUNK_BYTES, Storage, open_storage

COMMIT_NAME = "checkpoint.json"
_ELEMENT_BYTES = 4
_BATCH_ELEMENTS = 2**26
_FILES_AT_ONCE = 4

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """A range of one flattened parameter in a file: fp32, little-endian."""

    parameter: str
    kind: str
    start: int
    numel: int
    offset_bytes: int


class PartFile(StrictConfig):
    """One safetensors file."""

    name: str
    """In the checkpoint's folder."""
    size_bytes: int
    sha256: str
    pieces: tuple[Piece, ...]


class RankTable(StrictConfig):
    """What one rank has written."""

    files: tuple[PartFile, ...]


class CheckpointTable(StrictConfig):
    """checkpoint.json."""

    format: Literal[1] = 1
    update: int
    attempt: str
    meta: dict[str, Any]
    optimizer_steps: int
    loss_scaler: dict[str, float]
    shapes: dict[str, tuple[int, ...]]
    files: tuple[PartFile, ...]


Range = tuple[str, str, int, int]
"""(parameter, kind, first element, number of elements)."""


class CheckpointReader:
    """One whole checkpoint. Tensors are read by byte range, when they are asked for."""

    def __init__(self, uri: str, table: CheckpointTable, digest: str) -> None:
        self.uri = f"{uri}/{folder_name(table.update)}"
        self.update, self.meta, self.shapes = table.update, table.meta, table.shapes
        self.optimizer_steps, self.loss_scaler = table.optimizer_steps, table.loss_scaler
        self.digest = digest
        """sha256 of checkpoint.json, which holds that of every file."""
        self._storage = open_storage(self.uri)
        self._files, self._pieces = table.files, _pieces(table)
        self.kinds = {kind for _, kind in self._pieces}

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """A range of a flattened parameter: flat, fp32. Raises as `read_many` does."""
        return next(self.read_many([(name, kind, start, numel)]))

    def tensor(self, name: str, kind: str) -> Tensor:
        """A whole parameter in its shape, fp32. Raises as `read_many` does."""
        shape = self.shapes.get(name, ())
        return self.read(name, kind, 0, math.prod(shape)).reshape(shape)

    def verify(self) -> None:
        """Reads every file and compares it with the digest it was written with: a minute for tens of GB on a disk.

        Raises:
            InputDataError: a file is gone, or differs.
        """
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            for file, digest in zip(self._files, pool.map(self._digest, self._files), strict=True):
                if digest != file.sha256:
                    raise InputDataError(
                        f"checkpoint: {self.uri}/{file.name} differs from what was written; give another checkpoint"
                    )

    def _digest(self, file: PartFile) -> str:
        digest = hashlib.sha256()
        for chunk in self._storage.read_chunks(file.name):
            digest.update(chunk)
        return digest.hexdigest()

    def read_many(self, wanted: Sequence[Range]) -> Iterator[Tensor]:
        """Flat fp32 tensors in the order of `wanted`, many requests at a time.

        Raises:
            InputDataError: the checkpoint has no such parameter or kind, or a file is gone or cut off.
        """
        for batch in _batches(wanted):
            ranges = [list(self._byte_ranges(*item)) for item in batch]
            answers = iter(self._storage.read_ranges(list(itertools.chain(*ranges))))
            for (name, kind, _, numel), parts in zip(batch, ranges, strict=True):
                data = bytearray().join(itertools.islice(answers, len(parts)))
                if len(data) != numel * _ELEMENT_BYTES:
                    raise InputDataError(
                        f"checkpoint: {self.uri} has {len(data)} of {numel * _ELEMENT_BYTES} bytes of {name}|{kind}; "
                        "give another checkpoint"
                    )
                yield torch.frombuffer(data, dtype=torch.float32) if data else torch.empty(0)

    def _byte_ranges(self, name: str, kind: str, start: int, numel: int) -> Iterator[tuple[str, int, int]]:
        """(file, first byte, end) of all that a range consists of, in order, none above CHUNK_BYTES."""
        if (name, kind) not in self._pieces:
            raise InputDataError(
                f"checkpoint: {self.uri} has no {kind} of {name}; it has {', '.join(sorted(self.kinds))} "
                f"of {len(self.shapes)} parameters"
            )
        for file, piece in self._pieces[name, kind]:
            first, end = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            step = CHUNK_BYTES // _ELEMENT_BYTES
            for element in range(first, end, step):
                offsets = (e - piece.start for e in (element, min(element + step, end)))
                first_byte, end_byte = (piece.offset_bytes + _ELEMENT_BYTES * offset for offset in offsets)
                yield file, first_byte, end_byte


def open_checkpoint(uri: str, update: int | None = None) -> CheckpointReader | None:
    """The checkpoint after `update`; by default the newest that is whole, or None when there is none at all.

    Ranks may see different ones while another process writes: let one decide, and the others open that update.

    Raises:
        InputDataError: there is no such checkpoint or it is damaged; by default only if there are some and all are.
    """
    storage = open_storage(uri)
    updates = list_checkpoints(uri)
    if update is not None:
        if update not in updates:
            raise InputDataError(f"checkpoint: {storage.uri} has none of update {update}; it has {updates}")
        return _opened(storage, update)
    problems = []
    for number in reversed(updates):
        try:
            return _opened(storage, number)
        except InputDataError as error:
            logger.warning("%s; the one before it is looked at", error)
            problems.append(error)
    if problems:
        raise problems[0]
    return None


def list_checkpoints(uri: str) -> list[int]:
    """Updates of all committed checkpoints, in order."""
    return committed_updates(open_storage(uri).list("update_"))


def committed_updates(names: Iterable[str]) -> list[int]:
    """The same from a listing's names."""
    folders = [folder for folder, _, file in (name.rpartition("/") for name in names) if file == COMMIT_NAME]
    return sorted(update for folder in folders if (update := update_of(folder)) is not None)


def folder_name(update: int) -> str:
    return f"update_{update:08d}"


def update_of(name: str) -> int | None:
    """The update of a folder or of a file below it; None for what is no checkpoint's."""
    number = name.partition("/")[0].removeprefix("update_")
    return int(number) if number.isdecimal() else None


def damage(table: CheckpointTable, sizes: Mapping[str, int]) -> str:
    """What is wrong with a checkpoint whose folder has files of these sizes; empty when nothing is."""
    for file in table.files:
        if sizes.get(file.name) != file.size_bytes:
            return f"{file.name} has {sizes.get(file.name, 0)} of {file.size_bytes} bytes"
    pieces = _pieces(table)
    for name, kind in itertools.product(table.shapes, sorted({kind for _, kind in pieces})):
        covered = 0
        for _, piece in pieces.get((name, kind), ()):
            if piece.start != covered:
                return f"{name}|{kind} has a gap or an overlap at element {min(covered, piece.start)}"
            covered += piece.numel
        if covered != math.prod(table.shapes[name]):
            return f"{name}|{kind} has {covered} of {math.prod(table.shapes[name])} elements"
    return ""


def _opened(storage: Storage, update: int) -> CheckpointReader:
    folder = folder_name(update)
    data = storage.read_bytes(f"{folder}/{COMMIT_NAME}")
    try:
        table = CheckpointTable.model_validate_json(data)
    except pydantic.ValidationError as error:
        raise InputDataError(
            f"checkpoint: {storage.uri}/{folder}/{COMMIT_NAME} is of another version, {error.error_count()} fields "
            "cannot be read; give another checkpoint"
        ) from error
    sizes = {name.rpartition("/")[2]: size for name, size in storage.sizes(f"{folder}/").items()}
    if problem := damage(table, sizes):
        raise InputDataError(f"checkpoint: {storage.uri}/{folder} is damaged: {problem}; give another checkpoint")
    return CheckpointReader(storage.uri, table, hashlib.sha256(data).hexdigest())


def _pieces(table: CheckpointTable) -> dict[tuple[str, str], list[tuple[str, Piece]]]:
    """(parameter, kind) -> (file, piece) in the order of the elements."""
    found: dict[tuple[str, str], list[tuple[str, Piece]]] = {}
    for file in table.files:
        for piece in file.pieces:
            found.setdefault((piece.parameter, piece.kind), []).append((file.name, piece))
    for pieces in found.values():
        pieces.sort(key=lambda item: item[1].start)
    return found


def _batches(wanted: Sequence[Range]) -> Iterator[list[Range]]:
    """Cut so that what is in memory at a time is a few hundred MiB, unless one range alone is more."""
    batch, elements = list[Range](), 0
    for item in wanted:
        if batch and elements + item[3] > _BATCH_ELEMENTS:
            yield batch
            batch, elements = [], 0
        batch.append(item)
        elements += item[3]
    if batch:
        yield batch

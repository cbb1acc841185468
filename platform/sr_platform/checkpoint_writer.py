"""Snapshots of a train state -> checkpoint files, in the background: one writer per rank, rank 0's commits.

    writer = CheckpointWriter(uri, rank=rank, world_size=2, attempt="run7-attempt1", keep=2)
    writer.save(update, state.snapshot(), {"digest": "..."})    # training goes on
    writer.wait()                                               # what was saved counts from here on

Files and names: sr_platform.checkpoints. What goes wrong is raised as it was by the next `save`, `wait` or `close`. The
thread ends with the process, and what it has not committed by then does not count.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sr_platform.checkpoints import (
    COMMIT_NAME,
    CheckpointTable,
    PartFile,
    Piece,
    RankTable,
    committed_updates,
    damage,
    folder_name,
    update_of,
)
from sr_platform.errors import InputDataError, RequestError, StorageError
from sr_platform.storage import open_storage
from sr_platform.train_state import Fragment, Snapshot

PART_BYTES = 128 * 2**20
"""Of tensors in one file at most: a failed upload is sent again as a whole."""
_PARTS_AT_ONCE = 2
_DELETIONS_AT_ONCE = 16
_FIRST_POLL_S = 0.02
_LONGEST_POLL_S = 5.0

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointWriter:
    """Writes one rank's snapshots, one at a time, and on rank 0 commits them and deletes old checkpoints.

    The newest `keep` checkpoints stay, and those at multiples of `keep_every_updates`; newer ones than the one just
    committed, of a run that went further before, are left alone. `attempt` must be new each time the workers start.
    """

    def __init__(
        self,
        uri: str,
        *,
        rank: int,
        world_size: int,
        attempt: str,
        keep: int,
        keep_every_updates: int | None = None,
        commit_timeout_s: float = 1800.0,
    ) -> None:
        assert re.fullmatch(r"[\w.-]+", attempt), attempt
        self._storage, self._rank, self._world_size, self._attempt = open_storage(uri), rank, world_size, attempt
        self._keep, self._keep_every, self._timeout_s = keep, keep_every_updates, commit_timeout_s
        self._pending: Future[None] | None = None
        # Looked for now, before this attempt has files: a later look could take a newer attempt's for left over.
        self._left_over = self._find_left_over() if rank == 0 else set()

    def save(self, update: int, snapshot: Snapshot, meta: dict[str, Any]) -> None:
        """Hands a snapshot over and returns at once, unless the one before is still being written: then it waits.

        `meta` is JSON; rank 0's is kept. Raises what went wrong with the one before, and saves nothing then.
        """
        self.wait()
        future = self._pending = Future()

        def run() -> None:
            try:
                self._write(update, snapshot, meta)
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that trains
                future.set_exception(error)
            else:
                future.set_result(None)

        # A thread of our own: a pool's would keep a process alive that has failed and waits for other ranks' files.
        threading.Thread(target=run, name=f"checkpoint-{update}", daemon=True).start()

    def wait(self) -> None:
        """Until everything that was handed over is committed, by rank 0 for all ranks. Raises what went wrong.

        Raises:
            StorageError: storage still failed after its retries, or another rank's files or the commit did not come.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """The same as `wait`, at the end."""
        self.wait()

    def _write(self, update: int, snapshot: Snapshot, meta: dict[str, Any]) -> None:
        snapshot.wait()
        folder = folder_name(update)
        with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
            parts = enumerate(_parts(snapshot.fragments))
            files = tuple(pool.map(lambda part: self._write_part(folder, *part), parts))
        table = f"{folder}/{self._name(self._rank)}.json"
        self._storage.write_bytes_atomic(table, RankTable(files=files).model_dump_json().encode())
        if self._rank == 0:
            self._commit(update, snapshot, meta)
        else:
            self._poll(lambda: self._is_committed(update) or None, f"the commit of {folder} by rank 0")
        # By the rank that wrote it: to write again what seemed to fail would bring back what another rank removed.
        self._left_over.add(table)
        self._clean_up(update)

    def _write_part(self, folder: str, index: int, pieces: Sequence[_Pending]) -> PartFile:
        name = f"{self._name(self._rank)}.{index:03d}.safetensors"
        data, offsets = _pack(pieces)
        self._storage.write_bytes_atomic(f"{folder}/{name}", data)  # type: ignore[arg-type]
        return PartFile(
            name=name,
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            pieces=tuple(Piece(*p[:3], p.tensor.numel(), o) for p, o in zip(pieces, offsets, strict=True)),
        )

    def _commit(self, update: int, snapshot: Snapshot, meta: dict[str, Any]) -> None:
        folder = folder_name(update)
        tables = [f"{folder}/{self._name(rank)}.json" for rank in range(self._world_size)]

        def sizes_when_all_there() -> Mapping[str, int] | None:
            sizes = self._storage.sizes(f"{folder}/")
            return sizes if set(tables) <= sizes.keys() else None

        sizes = self._poll(sizes_when_all_there, f"the files of all {self._world_size} ranks in {folder}")
        parts = [RankTable.model_validate_json(data).files for data in self._storage.read_all(tables)]
        table = CheckpointTable(
            update=update,
            attempt=self._attempt,
            meta=meta,
            optimizer_steps=snapshot.optimizer_steps,
            loss_scaler=snapshot.loss_scaler,
            shapes=snapshot.shapes,
            files=tuple(file for files in parts for file in files),
        )
        problem = damage(table, {name.rpartition("/")[2]: size for name, size in sizes.items()})
        assert not problem, f"{folder}: {problem}"
        self._storage.write_bytes_atomic(f"{folder}/{COMMIT_NAME}", table.model_dump_json().encode())

    def _clean_up(self, update: int) -> None:
        """Deletes what is not needed once `update` is committed; what cannot be deleted is told and tried again."""
        try:
            if self._rank == 0:
                self._retire(update)
            self._delete_left_over(update)
        except (StorageError, RequestError) as error:
            logger.warning(
                "checkpoint: %s: what is not needed any more could not be removed: %s; it is tried again with the next",
                self._storage.uri,
                error,
            )

    def _retire(self, update: int) -> None:
        """Checkpoints up to `update` that the retention does not keep stop to count."""
        names = self._storage.list("update_")
        for old in [u for u in committed_updates(names) if u <= update][: -self._keep]:
            if not self._keep_every or old % self._keep_every:
                self._left_over.update(n for n in names if update_of(n) == old)
                self._storage.delete(f"{folder_name(old)}/{COMMIT_NAME}")

    def _delete_left_over(self, update: int) -> None:
        due = {name for name in self._left_over if (update_of(name) or 0) <= update}
        # Looked at again now: a process of a lost attempt may have committed its files meanwhile.
        in_use = {name for number in {update_of(name) or 0 for name in due} for name in self._committed_files(number)}
        with ThreadPoolExecutor(_DELETIONS_AT_ONCE) as pool:
            tuple(pool.map(self._storage.delete, sorted(due - in_use)))
        self._left_over -= due

    def _find_left_over(self) -> set[str]:
        """Files of attempts that ended before a commit, or before they had cleaned up after one.

        Those of a checkpoint are among them where another attempt's lie beside: they are sorted out on deletion.
        """
        names = [name for name in self._storage.list("update_") if update_of(name) is not None]
        ours = {name for name in names if name.partition("/")[2].startswith(f"{self._attempt}-")}
        # Other ranks of this attempt may be writing already; its rank 0 cannot have.
        assert not [n for n in ours if f"/{self._attempt}-00000-of-" in n], "an attempt has a new name"
        folders = [list(files) for _, files in itertools.groupby(names, update_of)]
        untidy = {name for files in folders if not _is_tidy(files) for name in files}
        return {name for name in untidy - ours if not name.endswith(f"/{COMMIT_NAME}")}

    def _is_committed(self, update: int) -> bool:
        """By this attempt."""
        table = self._committed(update)
        return table is not None and table.attempt == self._attempt

    def _committed_files(self, update: int) -> set[str]:
        """All that belongs to the checkpoint of an update; empty where there is none."""
        table = self._committed(update)
        names = (COMMIT_NAME, *(file.name for file in table.files)) if table else ()
        return {f"{folder_name(update)}/{name}" for name in names}

    def _committed(self, update: int) -> CheckpointTable | None:
        try:
            data = self._storage.read_bytes(f"{folder_name(update)}/{COMMIT_NAME}")
        except InputDataError:
            return None
        return CheckpointTable.model_validate_json(data)

    def _name(self, rank: int) -> str:
        return f"{self._attempt}-{rank:05d}-of-{self._world_size:05d}"

    def _poll(self, look: Callable[[], T | None], what: str) -> T:
        end_s, wait_s = time.monotonic() + self._timeout_s, _FIRST_POLL_S
        while (found := look()) is None:
            if time.monotonic() > end_s:
                raise StorageError(
                    f"checkpoint: {self._storage.uri}: {what} did not come within {self._timeout_s:.0f} s; "
                    "look for errors of the other workers"
                )
            time.sleep(wait_s)
            wait_s = min(1.5 * wait_s, _LONGEST_POLL_S)
        return found


class _Pending(NamedTuple):
    parameter: str
    kind: str
    start: int
    tensor: Tensor


def _is_tidy(files: Sequence[str]) -> bool:
    """A checkpoint, and nothing but its own files."""
    tables = [name for name in files if name.endswith(".json")]
    attempts = {name.rpartition("-of-")[0].rpartition("-")[0] for name in files if name not in tables}
    return [name.rpartition("/")[2] for name in tables] == [COMMIT_NAME] and len(attempts) <= 1


def _parts(fragments: Mapping[str, Fragment]) -> Iterator[list[_Pending]]:
    """All tensors, one after the other, cut into files of PART_BYTES."""
    most = room = PART_BYTES // 4
    part: list[_Pending] = []
    for name, fragment in fragments.items():
        for kind, tensor in fragment.tensors.items():
            first = 0
            while first < tensor.numel():
                piece = tensor[first : first + room]
                part.append(_Pending(name, kind, fragment.start + first, piece))
                first, room = first + piece.numel(), room - piece.numel()
                if not room:
                    yield part
                    part, room = [], most
    if part:
        yield part


def _pack(pieces: Sequence[_Pending]) -> tuple[bytearray, list[int]]:
    """A safetensors file, and where in it each tensor starts.

    The library's own `save` copies twice and lets no other thread of the process run meanwhile, which stops training
    for the time; this copies once and does.
    """
    ends = [0]
    header: dict[str, Any] = {"__metadata__": {f"{p.parameter}|{p.kind}": str(p.start) for p in pieces}}
    for piece in pieces:
        ends.append(ends[-1] + piece.tensor.nbytes)
        entry = {"dtype": "F32", "shape": [piece.tensor.numel()], "data_offsets": ends[-2:]}
        header[f"{piece.parameter}|{piece.kind}"] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    offsets = [8 + len(text) + start for start in ends[:-1]]
    data = bytearray(8 + len(text) + ends[-1])
    data[: 8 + len(text)] = len(text).to_bytes(8, "little") + text
    for piece, offset in zip(pieces, offsets, strict=True):
        torch.frombuffer(data, dtype=torch.float32, count=piece.tensor.numel(), offset=offset).copy_(piece.tensor)
    return data, offsets

"""One job at a time per folder: a mark in the folder itself, local or s3://, that its job keeps fresh.

    with owned("s3://bucket/run"):      # RequestError where another job works in it
        ...

The mark, `OWNER_NAME`, goes with the block. A job that was killed leaves it: on the same machine the next one sees that
the process is gone, and takes over at once; elsewhere it watches the mark, and takes over when nobody refreshes it.
Clocks of machines are never compared.
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pydantic

from sr_platform.config import StrictConfig
from sr_platform.errors import InputDataError, RequestError, StorageError
from sr_platform.storage import Storage, open_storage

OWNER_NAME = "owner.json"
REFRESH_S = 20.0
WATCH_S = 45.0
"""Two refreshments must fit in."""
_LOOK_S = 1.0
_SAME_TIME_S = 2.0
_SETTLE_S = 0.5
"""After which two jobs that started at the same moment see one and the same mark."""

logger = logging.getLogger(__name__)


class Mark(StrictConfig):
    """Who works in a folder."""

    job: str
    host: str
    machine: str
    """Processes whose `machine` is the same see each other by their numbers."""
    pid: int
    process_started: float
    since: str
    refreshed: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextmanager
def owned(uri: str) -> Iterator[None]:
    """Nobody else who asks works in the folder at `uri` during the block.

    Where another job takes over all the same, because this one could not refresh its mark for WATCH_S, the process ends
    at once with status 1, as if it were killed: whatever it did on its way out would disturb the other one.

    Raises:
        RequestError: another job works in it.
        StorageError: storage keeps failing at the start.
    """
    storage, mark = open_storage(uri), _new_mark()
    _wait_for_the_end_of_another(storage)
    _write(storage, mark)
    time.sleep(_SETTLE_S)
    _refuse_another(storage, mark)
    is_over = threading.Event()
    thread = threading.Thread(target=_keep, args=(storage, mark, is_over), name="ownership", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        _remove(storage, mark)


def _new_mark() -> Mark:
    return Mark(
        job=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        process_started=psutil.Process().create_time(),
        since=datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds"),
    )


def _machine() -> str:
    """Of one start of one machine, and of one container in it: a restarted container gives the same numbers again."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # not on Linux
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        parts += [boot, str(Path("/proc/self/ns/pid").readlink())]
    return " ".join(parts)


def _wait_for_the_end_of_another(storage: Storage) -> None:
    """Returns once no job refreshes the folder's mark. Raises RequestError when one does."""
    mark = _read(storage)
    lives = mark is not None and _lives(mark)
    if mark is None or lives is False:
        return
    if lives is None:
        logger.warning(
            "%s bears the mark of %s, which may have been killed; looking for %.0f s whether it lives",
            storage.uri,
            mark,
            WATCH_S,
        )
        now, end_s = _read(storage), time.monotonic() + WATCH_S
        while now == mark and time.monotonic() < end_s:
            time.sleep(_LOOK_S)
            now = _read(storage)
        if now is None or now == mark:
            logger.warning("%s: %s is gone; taking over", storage.uri, mark)
            return
        mark = now
    raise _taken(storage, mark)


def _lives(mark: Mark) -> bool | None:
    """Whether the process of a mark is there; None where that cannot be seen from here."""
    if mark.machine != _machine():
        return None
    try:
        process = psutil.Process(mark.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        # The number may belong to another process by now, but a clock that was set gives other times as well.
        return True if abs(process.create_time() - mark.process_started) < _SAME_TIME_S else None
    except psutil.NoSuchProcess:
        return False


def _keep(storage: Storage, mark: Mark, is_over: threading.Event) -> None:
    """Refreshes the mark until the block is over; ends the process when another job has taken the folder."""
    number = 0
    while not is_over.wait(REFRESH_S):
        number += 1
        try:
            found = _read(storage)
            if found is not None and found.job != mark.job:
                logger.critical("%s was taken over by %s; this job ends", storage.uri, found)
                os._exit(1)
            _write(storage, mark.model_copy(update={"refreshed": number}))
        except (StorageError, RequestError) as error:
            logger.warning("the mark of this job in %s could not be refreshed: %s", storage.uri, error)


def _refuse_another(storage: Storage, mark: Mark) -> None:
    found = _read(storage)
    if found is None or found.job != mark.job:
        raise _taken(storage, found)


def _remove(storage: Storage, mark: Mark) -> None:
    try:
        found = _read(storage)
        if found is not None and found.job == mark.job:
            storage.delete(OWNER_NAME)
    except (StorageError, RequestError) as error:
        logger.warning("the mark of this job stays in %s: %s", storage.uri, error)


def _taken(storage: Storage, mark: Mark | None) -> RequestError:
    return RequestError(
        f"job: {storage.uri} is worked on by {mark or 'another job'}; wait until it is done, stop it, or give "
        "another place"
    )


def _write(storage: Storage, mark: Mark) -> None:
    storage.write_bytes_atomic(OWNER_NAME, mark.model_dump_json().encode())


def _read(storage: Storage) -> Mark | None:
    try:
        data = storage.read_bytes(OWNER_NAME)
    except InputDataError:
        return None
    try:
        return Mark.model_validate_json(data)
    except pydantic.ValidationError as error:
        raise InputDataError(f"job: {storage.path(OWNER_NAME)} is no mark of a job; delete it") from error

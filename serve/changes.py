"""Who waits for something in the job database hears soon that somebody has written to it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress

from serve.database import Database

logger = logging.getLogger(__name__)

_PAUSE_S = 1.0


class ChangeFeed:
    """Calls `told` in the running event loop, soon after every change, until it is closed.

    A hint, no more: whoever waits looks by themselves now and then, for the database may be away meanwhile.
    """

    def __init__(self, database: Database, told: Callable[[], None]) -> None:
        self._database, self._told = database, told
        self._loop = asyncio.get_running_loop()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="changes", daemon=True).start()

    def close(self) -> None:
        """Nothing is told any more; the thread ends by itself."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                for _ in self._database.changes(self._ended):
                    self._tell()
            except Exception:
                logger.exception("changes: the job database does not tell of changes; it is asked again")
                self._ended.wait(_PAUSE_S)

    def _tell(self) -> None:
        if not self._ended.is_set():
            with suppress(RuntimeError):  # the loop has been closed, and this with it
                self._loop.call_soon_threadsafe(self._told)

"""What waits for the job database, SQLite or a real PostgreSQL server, hears of changes."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from typing import Any

import pytest

from serve.changes import ChangeFeed
from serve.jobs import JobStore

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Listener:
    """Counts what it is told, in the event loop's thread."""

    def __init__(self) -> None:
        self.thread, self.num_told, self._told = threading.get_ident(), 0, asyncio.Event()

    def told(self) -> None:
        assert threading.get_ident() == self.thread
        self.num_told += 1
        self._told.set()

    async def hears(self, timeout_s: float = 20.0) -> bool:
        """Whether it is told of something from now on."""
        self._told.clear()
        try:
            await asyncio.wait_for(self._told.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def calm(self) -> None:
        while await self.hears(0.2):
            pass


@asynccontextmanager
async def _listening(store: Any) -> AsyncIterator[Listener]:
    listener = Listener()
    feed = ChangeFeed(store, listener.told)
    try:
        assert await listener.hears(), "once at the beginning: nobody knows what was before"
        await listener.calm()
        yield listener
    finally:
        feed.close()


def _write(store: JobStore) -> None:
    store.report_replica("r", {})


@pytest.mark.parametrize("writer", ["the same store", "another"])
async def test_every_commit_is_told_whoever_has_written(database_url: str, writer: str) -> None:
    with closing(JobStore(database_url)) as store, closing(JobStore(database_url)) as another:
        async with _listening(store) as listener:
            for _ in range(3):
                heard = asyncio.create_task(listener.hears())
                await asyncio.sleep(0)
                await asyncio.to_thread(_write, store if writer == "the same store" else another)
                assert await heard
                await listener.calm()


async def test_nothing_is_told_of_what_is_only_read(database_url: str) -> None:
    with closing(JobStore(database_url)) as store:
        async with _listening(store) as listener:
            heard = asyncio.create_task(listener.hears(0.5))
            for _ in range(5):
                await asyncio.to_thread(store.backlog)
            assert not await heard


async def test_a_feed_that_is_closed_tells_nothing_and_keeps_no_thread(database_url: str) -> None:
    with closing(JobStore(database_url)) as store:
        async with _listening(store) as listener:
            pass
        num_told = listener.num_told
        await asyncio.to_thread(_write, store)
        ends_s = asyncio.get_running_loop().time() + 20
        while any(thread.name == "changes" for thread in threading.enumerate()):
            assert asyncio.get_running_loop().time() < ends_s
            await asyncio.sleep(0.02)
        assert listener.num_told == num_told


async def test_after_an_outage_it_is_told_and_changes_are_told_again(
    postgres: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(JobStore(postgres.new_database())) as store:
        async with _listening(store) as listener:
            heard = asyncio.create_task(listener.hears())
            await asyncio.to_thread(postgres.restart)
            assert await heard, "what was missed meanwhile has to be looked for"
            await listener.calm()
            heard = asyncio.create_task(listener.hears())
            await asyncio.sleep(0)
            await asyncio.to_thread(_write, store)
            assert await heard
    assert "it is asked again" in caplog.text
    assert {record.levelno for record in caplog.records if record.name == "serve.changes"} == {logging.ERROR}


async def test_a_loop_that_has_ended_is_told_nothing(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)

    def in_a_loop_of_its_own(told: Callable[[], None]) -> ChangeFeed:
        async def begin() -> ChangeFeed:
            return ChangeFeed(store, told)

        return asyncio.run(begin())

    feed = await asyncio.to_thread(in_a_loop_of_its_own, lambda: None)
    await asyncio.to_thread(_write, store)
    await asyncio.sleep(0.05)
    feed.close()
    assert not failures

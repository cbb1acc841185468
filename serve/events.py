"""A job's progress as server-sent events; all streams of a process share one watcher of the store.

It looks when somebody has written to the job database, and now and then without having heard of anything.

    event: progress      what has changed: state, queue position, step, and a preview when there is a new one
    event: done          the last one: done, failed, cancelled or expired, with the whole job

A stream begins with the current state, so that who comes back has missed nothing that still matters.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

from serve.changes import ChangeFeed
from serve.estimate import Rates
from serve.job_json import job_json, progress_of
from serve.jobs import Job, JobState, JobStore

logger = logging.getLogger(__name__)

ENDED = "ended"
"""Id of the last event: who comes back with it needs no further stream."""
LIVE = frozenset({JobState.QUEUED, JobState.RUNNING})
KEEP_ALIVE_S = 15.0
_RETRY_MS = 1000
# Between looks, however much is written.
_REST_S = 0.01


@dataclass(frozen=True)
class Sighting:
    """A job as the watcher saw it, None when it is gone, and the number of jobs before it."""

    job: Job | None
    position: int | None


class JobWatcher:
    """Looks at the jobs that somebody follows after every change in the store, at the latest every `poll_s`."""

    def __init__(self, store: JobStore, *, poll_s: float) -> None:
        self._store, self._poll_s = store, poll_s
        self._num_followers: Counter[str] = Counter()
        self._latest: dict[str, Sighting] = {}
        self._looked, self._changed = asyncio.Event(), asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    @property
    def num_streams(self) -> int:
        return self._num_followers.total()

    async def follow(self, job_id: str, *, idle_s: float) -> AsyncGenerator[Sighting | None, None]:
        """Every change the watcher sees, the state as it is now first; None when nothing changed for `idle_s`."""
        self._num_followers[job_id] += 1
        self._changed.set()
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        seen: Sighting | None = None
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(idle_s):
                        while self._latest.get(job_id) == seen:
                            await self._looked.wait()
                latest = self._latest.get(job_id)
                yield None if latest == seen else latest
                seen = latest
        finally:
            self._unfollow(job_id)

    def _unfollow(self, job_id: str) -> None:
        self._num_followers[job_id] -= 1
        if not self._num_followers[job_id]:
            del self._num_followers[job_id]
            self._latest.pop(job_id, None)

    async def _watch(self) -> None:
        feed = ChangeFeed(self._store, self._changed.set)
        try:
            while self._num_followers:
                self._changed.clear()
                await self._look_if_possible()
                await asyncio.sleep(_REST_S)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), self._poll_s)
        finally:
            feed.close()

    async def _look_if_possible(self) -> None:
        try:
            await self._look(list(self._num_followers))
        except Exception:
            # The streams outlive a database that is away for a while.
            logger.exception("events: the job database does not answer; it is asked again")
            await asyncio.sleep(self._poll_s)

    async def _look(self, job_ids: list[str]) -> None:
        seen = await asyncio.to_thread(self._seen, job_ids)
        self._latest |= {job_id: sighting for job_id, sighting in seen.items() if job_id in self._num_followers}
        looked, self._looked = self._looked, asyncio.Event()
        looked.set()

    def _seen(self, job_ids: Sequence[str]) -> dict[str, Sighting]:
        jobs = self._store.watch(job_ids)
        waiting = [job_id for job_id, job in jobs.items() if job.state is JobState.QUEUED]
        positions = self._store.queue_position(waiting) if waiting else {}
        return {job_id: Sighting(jobs.get(job_id), positions.get(job_id)) for job_id in job_ids}


async def event_stream(
    watcher: JobWatcher, job: Job, rates: Rates, *, last_event_id: str, longest_s: float, idle_s: float = KEEP_ALIVE_S
) -> AsyncGenerator[bytes, None]:
    """The events of `job` up to its end, or for `longest_s`; clients come back by themselves then."""
    ends_s, told, last = time.monotonic() + longest_s, "", job
    async with aclosing(watcher.follow(job.id, idle_s=idle_s)) as sightings:
        async for sighting in sightings:
            if sighting is None:
                yield b": still here\n\n"
            else:
                last = sighting.job or replace(last, state=JobState.EXPIRED)
                if last.state not in LIVE:
                    yield _event(last.state.value, ENDED, job_json(last, None, rates).model_dump_json())
                    return
                if (event_id := _id_of(last, sighting.position)) != told:
                    yield _event("progress", event_id, _progress(last, sighting.position, told or last_event_id))
                    told = event_id
            if time.monotonic() > ends_s:
                return


def _id_of(job: Job, position: int | None) -> str:
    """Changes with whatever a progress event tells; what lies before the last dash changes with the preview alone."""
    preview = f"{job.attempt}.{job.preview_step}" if job.preview else ""
    return f"{preview}-{job.attempt}.{job.phase}.{job.step}.{'' if position is None else position}"


def _progress(job: Job, position: int | None, told: str) -> str:
    told_preview, is_known, _ = told.partition("-")
    event = {
        "state": job.state.value,
        "phase": job.phase,
        "queue_position": position,
        "step": job.step,
        "num_steps": job.num_steps,
        "progress": progress_of(job),
    }
    if job.preview and not (is_known and told_preview == f"{job.attempt}.{job.preview_step}"):
        event["preview"] = f"data:image/webp;base64,{base64.b64encode(job.preview).decode()}"
    return json.dumps(event)


def _event(name: str, event_id: str, data: str) -> bytes:
    return f"event: {name}\nid: {event_id}\nretry: {_RETRY_MS}\ndata: {data}\n\n".encode()

"""A job's progress as server-sent events; all streams of a process share one poller of the store.

Nobody waits for an event much longer than they have waited already: a job that has just come is looked at again and
again, one that takes minutes only now and then.

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
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

from serve.estimate import Rates
from serve.job_json import job_json, progress_of
from serve.jobs import Job, JobState, JobStore

logger = logging.getLogger(__name__)

ENDED = "ended"
"""Id of the last event: who comes back with it needs no further stream."""
LIVE = frozenset({JobState.QUEUED, JobState.RUNNING})
KEEP_ALIVE_S = 15.0
_RETRY_MS = 1000
_SHARE_OF_WAIT = 0.05
_SOONEST_S = 0.02


@dataclass(frozen=True)
class Sighting:
    """A job as the poller saw it, None when it is gone, and the number of jobs before it."""

    job: Job | None
    position: int | None


class JobWatcher:
    """Looks at the jobs that somebody follows, at each after a twentieth of its age, at the latest every `poll_s`."""

    def __init__(self, store: JobStore, *, poll_s: float) -> None:
        self._store, self._poll_s = store, poll_s
        self._num_followers: Counter[str] = Counter()
        self._latest: dict[str, Sighting] = {}
        self._due_s: dict[str, float] = {}
        """When to look again, by the monotonic clock; 0 is at once."""
        self._looked, self._joined = asyncio.Event(), asyncio.Event()
        self._poller: asyncio.Task[None] | None = None

    @property
    def num_streams(self) -> int:
        return self._num_followers.total()

    async def follow(self, job_id: str, *, idle_s: float) -> AsyncGenerator[Sighting | None, None]:
        """Every change the poller sees, the state as it is now first; None when nothing changed for `idle_s`."""
        self._num_followers[job_id] += 1
        self._due_s[job_id] = 0.0
        self._joined.set()
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
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
            self._due_s.pop(job_id, None)

    async def _poll(self) -> None:
        while self._num_followers:
            self._joined.clear()
            # Those that are due a moment later come along.
            until_s = time.monotonic() + _SOONEST_S
            try:
                await self._look([job_id for job_id, due_s in self._due_s.items() if due_s <= until_s])
            except Exception:
                # The streams outlive a database that is away for a while.
                logger.exception("events: the job database does not answer; it is asked again")
                await asyncio.sleep(self._poll_s)
            pause_s = min(self._due_s.values(), default=0.0) - time.monotonic()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._joined.wait(), max(0.0, pause_s))

    def _pause_s(self, job: Job | None) -> float:
        """Until the next look at it. Clocks of machines differ a little, which makes it a little more or less."""
        age_s = 0.0 if job is None else time.time() - job.submitted_at
        return min(self._poll_s, max(_SOONEST_S, _SHARE_OF_WAIT * age_s))

    async def _look(self, job_ids: list[str]) -> None:
        jobs = await asyncio.to_thread(self._store.watch, job_ids)
        waiting = [job_id for job_id, job in jobs.items() if job.state is JobState.QUEUED]
        positions = await asyncio.to_thread(self._store.queue_position, waiting) if waiting else {}
        for job_id in job_ids:
            if job_id in self._num_followers:
                job = jobs.get(job_id)
                self._latest[job_id] = Sighting(job, positions.get(job_id))
                self._due_s[job_id] = time.monotonic() + self._pause_s(job)
        looked, self._looked = self._looked, asyncio.Event()
        looked.set()


async def event_stream(
    watcher: JobWatcher, job: Job, rates: Rates, *, last_event_id: str, longest_s: float, idle_s: float = KEEP_ALIVE_S
) -> AsyncGenerator[bytes, None]:
    """The events of `job` up to its end, or for `longest_s`; clients come back by themselves then."""
    yield f"retry: {_RETRY_MS}\n\n".encode()
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
    return f"event: {name}\nid: {event_id}\ndata: {data}\n\n".encode()

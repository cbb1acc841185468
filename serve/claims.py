"""Jobs taken from the store and worked off by one replica: leased, kept alive by a heartbeat, finished at most once.

A job belongs to the replica whose lease it carries. Renewing the lease, telling progress and hearing of cancellations
are one call a few times a second. A replica that lost its lease can no longer publish; the one that claims the job
next goes on from the latents that were stored last, and comes to the same picture.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat, PositiveInt

from serve.changes import ChangeFeed
from serve.job_run import JobRun, Surroundings
from serve.jobs import Heartbeat
from serve.measurements import count_takeover, observe_queue
from serve.tracing import Trace, entered, span
from sr_platform.config import StrictConfig

if TYPE_CHECKING:
    from serve.served_model import ServedModel

logger = logging.getLogger(__name__)


class ClaimConfig(StrictConfig):
    """How a replica takes jobs, and how soon others take over when it is gone."""

    poll_s: PositiveFloat = 0.5
    """Between looks for new jobs where no change in the job database is heard of."""
    heartbeat_s: PositiveFloat = 0.5
    """Between signs of life; progress and cancellations travel with them."""
    lease_s: PositiveFloat = 15.0
    """Without a sign of life for so long, a replica's jobs are taken by others."""
    snapshot_every_s: PositiveFloat = 10.0
    """Between copies of a job's latents in storage, from which another replica would go on."""
    max_jobs: PositiveInt = 24
    """Jobs in hand at most; how many pixels, the memory of the replica decides."""
    reserve: float = Field(default=0.1, ge=0, lt=1)
    """Share of the free memory that jobs leave to pictures whose senders wait on the connection."""


class JobRunner:
    """Claims jobs while the engine has room and runs each of them to its end, in the event loop it is started in.

    `model()` is the model that is served now, None while there is none; a job keeps the one it was started with.
    """

    def __init__(self, around: Surroundings, cfg: ClaimConfig, model: Callable[[], ServedModel | None]) -> None:
        self._around, self._cfg, self._model = around, cfg, model
        self._runs: dict[str, JobRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._feed: ChangeFeed | None = None
        self._wake = asyncio.Event()
        self._is_paused = False
        self._renewed_s = time.monotonic()

    @property
    def num_running(self) -> int:
        return len(self._runs)

    def start(self) -> None:
        """Begins to claim; call it in the event loop."""
        self._loops = [asyncio.create_task(loop()) for loop in (self._claims, self._heartbeats, self._snapshots)]
        self._feed = ChangeFeed(self._around.store, self._wake.set)

    async def pause(self) -> None:
        """Claims nothing more; returns when what is in hand is done."""
        self._is_paused = True
        while self._tasks:
            await asyncio.wait(self._tasks)

    def resume(self) -> None:
        self._is_paused = False
        self._wake.set()

    async def stop(self, grace_s: float) -> None:
        """Lets what is in hand end within `grace_s`; the rest goes back to the queue with its latents, for others."""
        self._is_paused = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        await asyncio.gather(*(self._guarded("handing over", run.hand_over) for run in list(self._runs.values())))
        for task in self._loops:
            task.cancel()
        if self._feed is not None:
            self._feed.close()

    async def _claims(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._cfg.poll_s)
            self._wake.clear()
            await self._guarded("claiming", self._claim_what_fits)

    async def _claim_what_fits(self) -> None:
        """One job at a time, so that each is measured against the room that the one before has left."""
        store, cfg = self._around.store, self._cfg
        while (room := await self._room()) is not None:
            jobs = await asyncio.to_thread(
                store.claim, self._around.owner, lease_s=cfg.lease_s, max_megapixels=room, max_jobs=1
            )
            if not jobs:
                return
            model = self._model()
            if model is None or self._is_paused:
                await asyncio.to_thread(store.release, jobs[0].id, self._around.owner, jobs[0].attempt)
                return
            run = self._runs[jobs[0].id] = JobRun(jobs[0], model, self._around)
            task = asyncio.create_task(self._run(run))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            # Its place in memory is taken before the next one is measured.
            while run.ticket is None and not task.done():
                await asyncio.sleep(0.005)

    async def _room(self) -> float | None:
        """Megapixels of results that may still be taken in hand; None when nothing is to be claimed."""
        model = self._model()
        if self._is_paused or model is None or len(self._runs) >= self._cfg.max_jobs:
            return None
        load = model.engine.load()
        if load.entries == 0 and load.failure is None:
            # What fits nowhere has to be claimed once, so that its owner is told.
            return math.inf if load.max_megapixels >= self._around.largest_megapixels() else load.free_megapixels
        free = load.free_megapixels * (1 - self._cfg.reserve)
        return free if free > 0 else None

    async def _run(self, run: JobRun) -> None:
        job = run.job
        observe_queue(job.megapixels, time.time() - job.submitted_at)
        if job.num_lost_attempts:
            count_takeover()
        try:
            with entered(Trace(job.trace_id), job_id=job.id), span("job", attempt=job.attempt):
                await self._guarded("ending a job", run.work)
        finally:
            # What could not be told keeps its lease until that runs out, and is taken up again then.
            self._runs.pop(job.id, None)
            self._wake.set()

    async def _heartbeats(self) -> None:
        while True:
            await asyncio.sleep(self._cfg.heartbeat_s)
            await self._guarded("a heartbeat", self._beat)
            if time.monotonic() - self._renewed_s > self._cfg.lease_s:
                # Others have these jobs by now; what is computed here could not be published.
                self._give_up(list(self._runs), "its lease could not be renewed")

    async def _snapshots(self) -> None:
        """Apart from the heartbeat, which must not wait for a storage that is slow."""
        while True:
            await asyncio.sleep(self._cfg.heartbeat_s)
            await self._guarded("storing latents", self._store_snapshots)

    async def _guarded(self, what: str, step: Callable[[], Awaitable[None]]) -> None:
        """A database or storage that is away for a while must not end the loops."""
        try:
            await step()
        except Exception:
            logger.exception("claims: %s failed on %s", what, self._around.owner)

    async def _beat(self) -> None:
        started_s = time.monotonic()
        beat = await asyncio.to_thread(self._tell, list(self._runs.values()))
        self._renewed_s = started_s
        for job_id in beat.cancelled:
            if (run := self._runs.get(job_id)) is not None:
                run.cancel()
        self._give_up(beat.lost, "another replica has it")

    def _tell(self, runs: Sequence[JobRun]) -> Heartbeat:
        """In a thread: previews have to be encoded."""
        return self._around.store.heartbeat(self._around.owner, [run.progress() for run in runs], self._cfg.lease_s)

    def _give_up(self, job_ids: Iterable[str], why: str) -> None:
        for job_id in job_ids:
            run = self._runs.get(job_id)
            if run is not None and not run.is_lost:
                logger.warning("claims: job %s is given up: %s", job_id, why)
                run.give_up()

    async def _store_snapshots(self) -> None:
        now_s = time.monotonic()
        for run in list(self._runs.values()):
            if now_s - run.snapshot_at_s > self._cfg.snapshot_every_s:
                await asyncio.to_thread(run.store_snapshot)

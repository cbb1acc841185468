"""What gateways do beside answering: deliver webhooks, remove jobs that have expired, and files without a job.

Every gateway runs the loop. Webhooks are leased one by one; of the removals one gateway at a time has the lease.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from contextlib import suppress
from types import TracebackType
from typing import Any

from pydantic import Field, NonNegativeFloat, PositiveFloat

from serve.estimate import Rates
from serve.job_json import WebhookEvent, job_json, timestamp
from serve.jobs import JobStore, Webhook
from serve.measurements import count_webhook
from serve.tracing import Trace, entered
from serve.webhooks import WebhookSender
from sr_platform.config import StrictConfig
from sr_platform.storage import Storage

logger = logging.getLogger(__name__)

_LEASE = "housekeeping"
_JOBS_AT_ONCE = 100
_WEBHOOKS_AT_ONCE = 16


class HousekeepingConfig(StrictConfig):
    """How often gateways look for something to deliver or to remove."""

    every_s: PositiveFloat = 1.0
    """Between looks for webhooks that are due."""
    expire_every_s: PositiveFloat = 30.0
    """Between looks for jobs that have expired."""
    sweep_every_s: PositiveFloat = 1800.0
    """Between looks through the storage for files without a job."""
    orphans_last_s: NonNegativeFloat = Field(default=3600.0)
    """Files without a job stay so long: a job is being accepted while its picture is stored."""


class Housekeeper:
    """`async with housekeeper:` runs the loop."""

    def __init__(
        self, cfg: HousekeepingConfig, store: JobStore, storage: Storage, webhooks: WebhookSender, rates: Rates
    ) -> None:
        self._cfg, self._store, self._storage, self._webhooks, self._rates = cfg, store, storage, webhooks, rates
        self._owner = uuid.uuid4().hex
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Housekeeper:
        loops = [(self.expire, self._cfg.expire_every_s), (self.sweep, self._cfg.sweep_every_s)]
        if self._webhooks.is_on:
            loops.append((self.deliver, self._cfg.every_s))
        self._tasks = [asyncio.create_task(self._repeat(step, every_s)) for step, every_s in loops]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task

    async def deliver(self) -> int:
        """Sends the webhooks that are due; returns how many were."""
        lease_s = 3 * self._webhooks.timeout_s
        due = await asyncio.to_thread(self._store.due_webhooks, self._owner, lease_s, _WEBHOOKS_AT_ONCE)
        await asyncio.gather(*(self._deliver_one(webhook) for webhook in due))
        return len(due)

    async def expire(self) -> int:
        """Fails jobs whose time is over, and removes those that have ended and expired; returns how many were removed.

        Files go first, so that a kill in between leaves nothing unseen.
        """
        if not await self._has_lease(self._cfg.expire_every_s):
            return 0
        num_removed = 0
        while num_overdue := await asyncio.to_thread(self._store.end_overdue, _JOBS_AT_ONCE):
            logger.warning(
                "housekeeping: %d jobs that no replica has worked off in their time have failed", num_overdue
            )
        while jobs := await asyncio.to_thread(self._store.expired, _JOBS_AT_ONCE):
            for job in jobs:
                await asyncio.to_thread(self._storage.delete_all, f"jobs/{job.id}/")
                await asyncio.to_thread(self._store.forget, job.id)
                logger.info("housekeeping: job %s has expired", job.id)
            num_removed += len(jobs)
        return num_removed

    async def sweep(self) -> int:
        """Removes files that belong to no job and are old enough; returns the number of jobs they were meant for."""
        if not await self._has_lease(self._cfg.sweep_every_s):
            return 0
        names = await asyncio.to_thread(self._storage.list, "jobs/")
        found = sorted({name.split("/")[1] for name in names})
        youngest = time.time() - self._cfg.orphans_last_s
        old = [job_id for job_id in found if created_at(job_id) < youngest]
        num_removed = 0
        for start in range(0, len(old), _JOBS_AT_ONCE):
            ids = old[start : start + _JOBS_AT_ONCE]
            known = await asyncio.to_thread(self._store.watch, ids)
            for job_id in sorted(set(ids) - known.keys()):
                await asyncio.to_thread(self._storage.delete_all, f"jobs/{job_id}/")
                logger.info("housekeeping: files of %s, which is no job, were removed", job_id)
                num_removed += 1
        return num_removed

    async def _repeat(self, step: Any, every_s: float) -> None:
        while True:
            try:
                await step()
            except Exception:
                # Nothing that is away for a while may end the loop.
                logger.exception("housekeeping: %s failed; it is tried again in %g s", step.__name__, every_s)
            await asyncio.sleep(every_s)

    async def _has_lease(self, every_s: float) -> bool:
        lease_s = max(60.0, 2 * every_s)
        return await asyncio.to_thread(self._store.take_lease, _LEASE, self._owner, lease_s)

    async def _deliver_one(self, webhook: Webhook) -> None:
        job = await asyncio.to_thread(self._store.get, webhook.job_id, None)
        if job is None:  # expired meanwhile
            await asyncio.to_thread(self._store.webhook_failed, webhook.id, None)
            return
        event = WebhookEvent(
            type=f"job.{job.state.value}",
            timestamp=timestamp(job.ended_at or time.time()),
            data=job_json(job, None, self._rates),
        )
        with entered(Trace(job.trace_id), job_id=job.id):
            sent = await self._webhooks.deliver(
                webhook.url, webhook_id=webhook.id, key_id=job.key_id, body=event.model_dump_json().encode()
            )
            retry_at = None if sent.is_final else self._webhooks.retry_at(webhook.attempt, time.time())
            if sent.is_done:
                await asyncio.to_thread(self._store.webhook_done, webhook.id)
            else:
                await asyncio.to_thread(self._store.webhook_failed, webhook.id, retry_at)
            outcome = "delivered" if sent.is_done else "given-up" if retry_at is None else "retried"
            count_webhook(outcome)
            logger.info("webhooks: attempt %d was %s: %s", webhook.attempt, outcome, sent.detail)


def created_at(job_id: str) -> float:
    """Seconds since the epoch at which `new_job_id` made this id; infinity for what is no id of a job."""
    try:
        parsed = uuid.UUID(hex=job_id)
    except ValueError:
        return math.inf
    return (parsed.int >> 80) / 1000 if parsed.version == 7 else math.inf

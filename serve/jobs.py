"""The job store: every job that was accepted, until it has ended, once, and expired.

    store = JobStore("sqlite:///out/serve/jobs.db")                        the processes of one machine
    store = JobStore("postgresql://user:password@host/database")          those of many

Safe from any thread and any number of processes. Every method is one transaction: it has happened, for everybody,
when it returns, and not at all when it raises (`sqlalchemy.exc.DBAPIError` where the database does not answer).
"""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import BindParameter, Select, and_, bindparam, case, delete, func, or_, select, update
from sqlalchemy.sql import ColumnElement

from serve.database import insert_of, now_of
from serve.job_claims import JobClaims
from serve.job_records import (
    Backlog,
    Heartbeat,
    Job,
    JobState,
    KeyReused,
    NewJob,
    Progress,
    ResultFile,
    Webhook,
    new_job_id,
)
from serve.job_rows import END_ONE, IS_IT, IS_LOST, IS_WAITING, LIVE, end, job_of, row_of
from serve.job_tables import jobs
from serve.key_records import ApiKey, KeyLimits, KeyRecords, Verdict
from serve.problems import Problem
from serve.service_records import ServiceRecords


class JobStore(JobClaims, KeyRecords, ServiceRecords):
    """Jobs, keys, replicas, webhooks: all a service keeps in its database.

    `max_lost_attempts`: a job whose replica was lost so often while it worked on it is failed.
    `patience_s`: a job that fits into no replica's room beside others is passed over for so long.
    """

    def __init__(self, url: str, *, max_lost_attempts: int = 5, patience_s: float = 30.0) -> None:
        assert max_lost_attempts >= 1
        super().__init__(url)
        self._max_lost_attempts, self._patience_s = max_lost_attempts, patience_s
        self._largest_room = {}

    def submit(self, new: NewJob) -> tuple[Job, bool]:
        """The accepted job, and whether it is new: of all requests with one Idempotency-Key one makes a job.

        Raises:
            KeyReused: the key made a job before, of another request.
        """
        while True:
            with self._writing() as transaction:
                accepting = _accepting(insert_of(transaction))
                row = transaction.execute(accepting, row_of(new, now_of(transaction))).one_or_none()
            if row is not None:
                return job_of(row), True
            assert new.idempotency_key is not None
            before = self.find(new.key_id, new.idempotency_key)
            if before is None:  # it has just expired
                continue
            if before.request_digest != new.request_digest:
                raise KeyReused(f"job {before.id} was made with this key, of another request")
            return before, False

    def find(self, key_id: str, idempotency_key: str) -> Job | None:
        """The job that this Idempotency-Key has made."""
        return next(iter(self._found(_OF_IDEMPOTENCY_KEY, key_id_=key_id, idempotency_key_=idempotency_key)), None)

    def get(self, job_id: str, key_id: str | None) -> Job | None:
        """The job, if it is the key's; with None, whosever it is."""
        found = self._found(_ONE, job_id_=job_id)
        return next((job for job in found if key_id is None or job.key_id == key_id), None)

    def watch(self, job_ids: Sequence[str]) -> dict[str, Job]:
        """Those of the jobs that are there, by id."""
        return {job.id: job for job in self._found(_SEVERAL, job_ids_=job_ids)}

    def list(
        self, key_id: str, *, state: JobState | None = None, limit: int = 100, before: str | None = None
    ) -> builtins.list[Job]:
        """Jobs of a key, the newest first, those with ids smaller than `before`."""
        wanted = select(jobs).where(jobs.c.key_id == key_id).order_by(jobs.c.id.desc()).limit(limit)
        if state is not None:
            wanted = wanted.where(jobs.c.state == state)
        if before is not None:
            wanted = wanted.where(jobs.c.id < before)
        with self._reading() as transaction:
            return [job_of(row) for row in transaction.execute(wanted)]

    def queue_position(self, job_ids: Sequence[str]) -> dict[str, int]:
        """How many jobs wait before each of these; those that do not wait are left out."""
        with self._reading() as transaction:
            rows = transaction.execute(_PLACES, {"job_ids_": job_ids}).all()
        return {row.id: row.place - 1 for row in rows}

    def request_cancel(self, job_id: str, key_id: str | None) -> Job | None:
        """The job after it: cancelled if it waited or its replica is gone, running and flagged if it runs.

        One that has ended stays as it is. None when the key has no such job.
        """
        which = jobs.c.id == job_id
        mine = which if key_id is None else which & (jobs.c.key_id == key_id)
        with self._writing() as transaction:
            found = transaction.execute(select(jobs).where(mine).with_for_update()).one_or_none()
            if found is None:
                return None
            now_s = now_of(transaction)
            if found.state == JobState.QUEUED or (found.state == JobState.RUNNING and found.lease_until < now_s):
                ended = end(transaction, END_ONE, {"job_id_": job_id}, JobState.CANCELLED, now_s)
                assert ended is not None
                return job_of(ended)
            if found.state == JobState.RUNNING:
                flagged = update(jobs).where(which).values(cancel_requested=True).returning(*jobs.c)
                found = transaction.execute(flagged).one()
            return job_of(found)

    def backlog(self, key_id: str | None = None) -> Backlog:
        """What has not ended, of one key or of all."""
        with self._reading() as transaction:
            waits = transaction.execute(_BACKLOG if key_id is None else _BACKLOG_OF_KEY, {"key_id_": key_id})
            num_queued, num_live, megapixels, work, oldest = waits.one()
            age_s = 0.0 if oldest is None else max(0.0, now_of(transaction) - oldest)
        return Backlog(int(num_queued), int(num_live - num_queued), float(megapixels), max(0.0, float(work)), age_s)

    def end_overdue(self, limit: int = 100) -> int:
        """Fails jobs that nobody has worked off in their time; how many there were. They are told like other ends."""
        with self._writing() as transaction:
            now_s = now_of(transaction)
            overdue = select(jobs.c.id).where(jobs.c.expires_at <= now_s, or_(IS_WAITING, IS_LOST)).limit(limit)
            chosen = transaction.execute(overdue.with_for_update(skip_locked=True), {"now_s_": now_s})
            ids = chosen.scalars().all()
            for job_id in ids:
                detail = "job: no replica has worked it off in its time; send the picture again later"
                body = Problem(503, "waited-too-long", detail).body(f"/v1/jobs/{job_id}")
                end(transaction, END_ONE, {"job_id_": job_id}, JobState.FAILED, now_s, problem=body)
        return len(ids)

    def expired(self, limit: int = 100) -> builtins.list[Job]:
        """Jobs that have ended and whose time is over: their files can be removed."""
        with self._reading() as transaction:
            is_over = and_(jobs.c.expires_at <= now_of(transaction), jobs.c.state.not_in(LIVE))
            wanted = select(jobs).where(is_over).order_by(jobs.c.expires_at).limit(limit)
            return [job_of(row) for row in transaction.execute(wanted)]

    def forget(self, job_id: str) -> None:
        """Removes the job, and a webhook that was not heard. Its files have to be removed before."""
        with self._writing() as transaction:
            transaction.execute(delete(jobs).where(jobs.c.id == job_id))

    def _found(self, wanted: Select[Any], **values: Any) -> builtins.list[Job]:
        with self._reading() as transaction:
            return [job_of(row) for row in transaction.execute(wanted, values)]


@functools.cache
def _accepting(insert: Callable[..., Any]) -> Any:
    by_key = [jobs.c.key_id, jobs.c.idempotency_key]
    return insert(jobs).on_conflict_do_nothing(index_elements=by_key).returning(*jobs.c)


def _waiting(*conditions: ColumnElement[bool]) -> Select[Any]:
    """Jobs that wait, jobs that have not ended, their megapixels, the work that is left, the time of the oldest."""
    share_left = 1.0 - jobs.c.step * 1.0 / func.coalesce(func.nullif(jobs.c.num_steps, 0), 1)
    columns = (
        func.coalesce(func.sum(case((IS_WAITING, 1), else_=0)), 0),
        func.count(),
        func.coalesce(func.sum(jobs.c.megapixels), 0.0),
        func.coalesce(func.sum(case((IS_WAITING, jobs.c.work), else_=jobs.c.work * share_left)), 0.0),
        func.min(case((IS_WAITING, jobs.c.submitted_at))),
    )
    return select(*columns).where(jobs.c.state.in_(LIVE), *conditions)


def _places() -> Select[Any]:
    order = (jobs.c.priority.desc(), jobs.c.submitted_at, jobs.c.id)
    place = func.row_number().over(order_by=order).label("place")
    queue = select(jobs.c.id, place).where(IS_WAITING).subquery()
    return select(queue.c.id, queue.c.place).where(queue.c.id.in_(_JOB_IDS))


_JOB_IDS: BindParameter[Any] = bindparam("job_ids_", expanding=True)
_IS_OF_KEY = jobs.c.key_id == bindparam("key_id_")
_ONE = select(jobs).where(IS_IT)
_SEVERAL = select(jobs).where(jobs.c.id.in_(_JOB_IDS))
_OF_IDEMPOTENCY_KEY = select(jobs).where(_IS_OF_KEY, jobs.c.idempotency_key == bindparam("idempotency_key_"))
_BACKLOG, _BACKLOG_OF_KEY = _waiting(), _waiting(_IS_OF_KEY)
_PLACES = _places()

__all__ = [
    "ApiKey",
    "Backlog",
    "Heartbeat",
    "Job",
    "JobState",
    "JobStore",
    "KeyLimits",
    "KeyReused",
    "NewJob",
    "Progress",
    "ResultFile",
    "Verdict",
    "Webhook",
    "new_job_id",
]

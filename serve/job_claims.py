"""The side of replicas: claim jobs, keep them by a heartbeat, and end each of them once.

A job is its owner's for as long as the lease lasts, and longer where nobody else claims it. Every claim begins another
attempt, and only the attempt that holds a job is heard. What has to be fair is decided here:

- Jobs of replicas that are gone come first, then those of the highest priority, then the oldest.
- A job that does not fit into a replica's room is passed over, so that it blocks nobody. When it has waited for
  `patience_s`, one replica that it would fit into keeps its room for it: that replica claims nothing behind it until
  its room is large enough.
- A job whose replica was lost `max_lost_attempts` times is failed: whatever kills replicas must not go on for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Row, and_, bindparam, case, exists, func, or_, select, update
from sqlalchemy.sql import ColumnElement

from serve.database import Database, now_of
from serve.job_records import Heartbeat, Job, JobState, Progress, ResultFile
from serve.job_rows import IS_WAITING, end, held_by, is_lost, job_of
from serve.job_tables import jobs
from serve.problems import Problem

_ORDER = (jobs.c.priority.desc(), jobs.c.submitted_at, jobs.c.id)
_ENDED_AT_ONCE = 100


class JobClaims(Database):
    """What replicas do with jobs."""

    _patience_s: float
    _max_lost_attempts: int
    _largest_room: dict[str, float]

    def claim(self, owner: str, *, lease_s: float, max_megapixels: float, max_jobs: int) -> list[Job]:
        """Up to `max_jobs` jobs of at most `max_megapixels` together, held by `owner` for `lease_s` seconds.

        How large an owner's room was at most since it had nothing in hand tells what would fit into it.
        """
        with self._reading() as transaction:
            now_s = now_of(transaction)
            capacity = self._capacity(transaction, owner, max_megapixels)
            too_large = self._waited_long_enough(transaction, owner, max_megapixels, capacity, now_s)
            fits = and_(jobs.c.megapixels <= max_megapixels, _before(too_large))
            if not _any(transaction, and_(_free(now_s), fits), self._abandoned(now_s)) and too_large is None:
                return []
        with self._writing() as transaction:
            now_s = now_of(transaction)
            self._end_abandoned(transaction, now_s)
            if too_large is not None:
                _reserve(transaction, too_large.id, owner, now_s, lease_s)
            return _claimed(transaction, owner, fits, now_s, lease_s, max_megapixels, max_jobs)

    def heartbeat(self, owner: str, progress: Sequence[Progress], lease_s: float) -> Heartbeat:
        """Renews the leases of the jobs in `progress` and tells how far they are."""
        with self._writing() as transaction:
            lease_until = now_of(transaction) + lease_s
            for has_preview in (True, False):
                told = [_values(one) for one in progress if (one.preview is not None) is has_preview]
                if told:
                    values = {"owner_": owner, "lease_until_": lease_until}
                    transaction.execute(_progress_statement(has_preview), [{**one, **values} for one in told])
            wanted = select(jobs.c.id, jobs.c.attempt, jobs.c.cancel_requested).where(_is_in_hand_of(owner))
            held = transaction.execute(wanted).all()
        lost = {(one.job_id, one.attempt) for one in progress} - {(row.id, row.attempt) for row in held}
        return Heartbeat({row.id for row in held if row.cancel_requested}, {job_id for job_id, _ in lost})

    def finish(
        self,
        job_id: str,
        owner: str,
        attempt: int,
        *,
        result: ResultFile,
        model_version: str | None,
        manifest_digest: str | None,
        device_seconds: float,
    ) -> bool:
        """The job is done; False when it is not this attempt's any more. Saying the same again changes nothing."""
        return self._end(
            job_id,
            owner,
            attempt,
            JobState.DONE,
            result=asdict(result),
            model_version=model_version,
            manifest_digest=manifest_digest,
            device_seconds=device_seconds,
            step=jobs.c.num_steps,
        )

    def fail(self, job_id: str, owner: str, attempt: int, problem: dict[str, Any]) -> bool:
        """The job has failed, `problem` (problem JSON) says why; False when it is not this attempt's any more."""
        return self._end(job_id, owner, attempt, JobState.FAILED, problem=problem)

    def cancelled(self, job_id: str, owner: str, attempt: int) -> bool:
        """The job has ended because somebody wanted it to; False when it is not this attempt's any more."""
        return self._end(job_id, owner, attempt, JobState.CANCELLED)

    def release(self, job_id: str, owner: str, attempt: int) -> bool:
        """Gives a job back, to its place in the queue; one that is to be cancelled ends. False as for `finish`."""
        held = held_by(job_id, owner, attempt)
        queued = {
            "state": JobState.QUEUED,
            "phase": JobState.QUEUED,
            "owner": None,
            "lease_until": None,
            "preview": None,
        }
        with self._writing() as transaction:
            given_back = transaction.execute(update(jobs).where(held, ~jobs.c.cancel_requested).values(queued))
            if given_back.rowcount:
                return True
            return end(transaction, held, JobState.CANCELLED, now_of(transaction)) is not None

    def _end(self, job_id: str, owner: str, attempt: int, state: JobState, **outcome: Any) -> bool:
        with self._writing() as transaction:
            held = held_by(job_id, owner, attempt)
            if end(transaction, held, state, now_of(transaction), **outcome) is not None:
                return True
            # The answer of the first time may have been lost on its way.
            said_before = and_(
                jobs.c.id == job_id, jobs.c.owner == owner, jobs.c.attempt == attempt, jobs.c.state == state
            )
            return _any(transaction, said_before)

    def _capacity(self, transaction: Connection, owner: str, room: float) -> float:
        """A room that is small although nothing is in hand does not grow: nothing is kept waiting for it."""
        largest = max(room, self._largest_room.get(owner, 0.0))
        is_busy = room < largest and _any(transaction, _is_in_hand_of(owner))
        self._largest_room[owner] = largest if is_busy else room
        return self._largest_room[owner]

    def _waited_long_enough(
        self, transaction: Connection, owner: str, room: float, capacity: float, now_s: float
    ) -> Row[Any, Any, Any] | None:
        """The first job too large for `room` now, but not for the owner, and for which nobody else keeps room."""
        if capacity <= room:
            return None
        is_for_us = or_(jobs.c.reserved_by.is_(None), jobs.c.reserved_by == owner, jobs.c.reserved_until < now_s)
        fits_later = and_(jobs.c.megapixels > room, jobs.c.megapixels <= capacity)
        statement = (
            select(jobs.c.id, jobs.c.priority, jobs.c.submitted_at)
            .where(_free(now_s), fits_later, is_for_us, jobs.c.submitted_at < now_s - self._patience_s)
            .order_by(*_ORDER)
            .limit(1)
        )
        return transaction.execute(statement).one_or_none()

    def _abandoned(self, now_s: float) -> ColumnElement[bool]:
        """Of replicas that are gone, and not to be given to another one."""
        is_given_up = jobs.c.num_lost_attempts + 1 >= self._max_lost_attempts
        return and_(is_lost(now_s), or_(jobs.c.cancel_requested, is_given_up))

    def _end_abandoned(self, transaction: Connection, now_s: float) -> None:
        statement = select(jobs.c.id, jobs.c.num_lost_attempts, jobs.c.cancel_requested).where(self._abandoned(now_s))
        for row in transaction.execute(statement.limit(_ENDED_AT_ONCE).with_for_update(skip_locked=True)).all():
            if row.cancel_requested:
                end(transaction, jobs.c.id == row.id, JobState.CANCELLED, now_s)
                continue
            num_lost = row.num_lost_attempts + 1
            problem = Problem(500, "replicas-lost", f"job: {num_lost} replicas were lost while they worked on it")
            body = problem.body(f"/v1/jobs/{row.id}")
            end(transaction, jobs.c.id == row.id, JobState.FAILED, now_s, problem=body, num_lost_attempts=num_lost)


def _is_in_hand_of(owner: str) -> ColumnElement[bool]:
    return and_(jobs.c.owner == owner, jobs.c.state == JobState.RUNNING)


def _free(now_s: float) -> ColumnElement[bool]:
    return or_(IS_WAITING, is_lost(now_s))


def _before(row: Row[Any, Any, Any] | None) -> ColumnElement[bool]:
    """In the order of the queue; everything where there is no `row`."""
    if row is None:
        return jobs.c.id.is_not(None)
    is_older = or_(
        jobs.c.submitted_at < row.submitted_at, and_(jobs.c.submitted_at == row.submitted_at, jobs.c.id < row.id)
    )
    return or_(jobs.c.priority > row.priority, and_(jobs.c.priority == row.priority, is_older))


def _any(transaction: Connection, *conditions: ColumnElement[bool]) -> bool:
    found = or_(*(exists().where(condition) for condition in conditions))
    return bool(transaction.execute(select(found)).scalar_one())


def _reserve(transaction: Connection, job_id: str, owner: str, now_s: float, lease_s: float) -> None:
    is_free = or_(jobs.c.reserved_by.is_(None), jobs.c.reserved_by == owner, jobs.c.reserved_until < now_s)
    statement = update(jobs).where(jobs.c.id == job_id, jobs.c.state.in_((JobState.QUEUED, JobState.RUNNING)), is_free)
    transaction.execute(statement.values(reserved_by=owner, reserved_until=now_s + lease_s))


def _claimed(
    transaction: Connection,
    owner: str,
    fits: ColumnElement[bool],
    now_s: float,
    lease_s: float,
    room: float,
    max_jobs: int,
) -> list[Job]:
    found: list[Job] = []
    # Two queries, each along an index; the first finds nothing as a rule.
    for which in (is_lost(now_s), IS_WAITING):
        wanted = select(jobs.c.id, jobs.c.megapixels).where(which, fits).order_by(*_ORDER).limit(max_jobs - len(found))
        for row in transaction.execute(wanted.with_for_update(skip_locked=True)).all():
            if row.megapixels <= room:
                found.append(_take(transaction, row.id, owner, now_s, lease_s))
                room -= row.megapixels
    return found


def _take(transaction: Connection, job_id: str, owner: str, now_s: float, lease_s: float) -> Job:
    values = {
        "state": JobState.RUNNING,
        "phase": "encode",
        "step": 0,
        "preview": None,
        "preview_step": 0,
        "owner": owner,
        "attempt": jobs.c.attempt + 1,
        "num_lost_attempts": jobs.c.num_lost_attempts + case((jobs.c.state == JobState.RUNNING, 1), else_=0),
        "lease_until": now_s + lease_s,
        "reserved_by": None,
        "reserved_until": None,
        "started_at": func.coalesce(jobs.c.started_at, now_s),
    }
    statement = update(jobs).where(jobs.c.id == job_id).values(values).returning(*jobs.c)
    return job_of(transaction.execute(statement).one())


def _values(progress: Progress) -> dict[str, Any]:
    return {f"{name}_": value for name, value in vars(progress).items()}


def _progress_statement(has_preview: bool) -> Any:
    """For any number of jobs; the names of its values end in an underscore."""
    names = ["phase", "step", "num_steps", "lease_until", *(["preview", "preview_step"] if has_preview else [])]
    mine = and_(
        jobs.c.id == bindparam("job_id_"),
        jobs.c.owner == bindparam("owner_"),
        jobs.c.attempt == bindparam("attempt_"),
        jobs.c.state == JobState.RUNNING,
    )
    return update(jobs).where(mine).values({name: bindparam(f"{name}_") for name in names})

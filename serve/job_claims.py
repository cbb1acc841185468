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

from sqlalchemy import Connection, Double, Row, Select, Update, and_, bindparam, case, exists, func, or_, select, update
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.dml import ReturningUpdate

from serve.database import Database, now_of
from serve.job_records import Heartbeat, Job, JobState, Progress, ResultFile
from serve.job_rows import END_HELD, END_ONE, IS_HELD, IS_IT, IS_LOST, IS_WAITING, NOW_S, end, job_of
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
            values: dict[str, Any] = {
                "now_s_": now_of(transaction),
                "room_": max_megapixels,
                "max_lost_": self._max_lost_attempts,
            }
            capacity = self._capacity(transaction, owner, max_megapixels)
            too_large = self._waited_long_enough(transaction, owner, max_megapixels, capacity, values["now_s_"])
            fits = _FITS if too_large is None else and_(_FITS, _before(too_large))
            look = _LOOK if too_large is None else _looking(fits)
            is_any_waiting, is_any_lost = transaction.execute(look, values).one()
            if not is_any_waiting and not is_any_lost and too_large is None:
                return []
        with self._writing() as transaction:
            values |= {"now_s_": now_of(transaction), "owner_": owner, "lease_s_": lease_s}
            if too_large is not None:
                _reserve(transaction, too_large.id, owner, values["now_s_"], lease_s)
            if is_any_lost:
                _end_abandoned(transaction, values)
                return _claimed(transaction, [_choosing(IS_LOST, fits), _choosing(IS_WAITING, fits)], values, max_jobs)
            return _claimed(
                transaction, [_CHOOSE if too_large is None else _choosing(IS_WAITING, fits)], values, max_jobs
            )

    def heartbeat(self, owner: str, progress: Sequence[Progress], lease_s: float) -> Heartbeat:
        """Renews the leases of the jobs in `progress` and tells how far they are."""
        with self._writing() as transaction:
            lease_until = now_of(transaction) + lease_s
            for statement, has_preview in ((_TELL_PREVIEW, True), (_TELL, False)):
                told = [_values(one) for one in progress if (one.preview is not None) is has_preview]
                if told:
                    values = {"owner_": owner, "lease_until_": lease_until}
                    transaction.execute(statement, [{**one, **values} for one in told])
            held = transaction.execute(_IN_HAND, {"owner_": owner}).all()
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
        )

    def fail(self, job_id: str, owner: str, attempt: int, problem: dict[str, Any]) -> bool:
        """The job has failed, `problem` (problem JSON) says why; False when it is not this attempt's any more."""
        return self._end(job_id, owner, attempt, JobState.FAILED, problem=problem)

    def cancelled(self, job_id: str, owner: str, attempt: int) -> bool:
        """The job has ended because somebody wanted it to; False when it is not this attempt's any more."""
        return self._end(job_id, owner, attempt, JobState.CANCELLED)

    def release(self, job_id: str, owner: str, attempt: int) -> bool:
        """Gives a job back, to its place in the queue; one that is to be cancelled ends. False as for `finish`."""
        attempt_of = _attempt(job_id, owner, attempt)
        with self._writing() as transaction:
            if transaction.execute(_GIVE_BACK, attempt_of).rowcount:
                return True
            return end(transaction, END_HELD, attempt_of, JobState.CANCELLED, now_of(transaction)) is not None

    def _end(self, job_id: str, owner: str, attempt: int, state: JobState, **outcome: Any) -> bool:
        attempt_of = _attempt(job_id, owner, attempt)
        with self._writing() as transaction:
            if end(transaction, END_HELD, attempt_of, state, now_of(transaction), **outcome) is not None:
                return True
            # The answer of the first time may have been lost on its way.
            said_before = transaction.execute(_SAID_BEFORE, {**attempt_of, "state_": state})
            return bool(said_before.scalar_one())

    def _capacity(self, transaction: Connection, owner: str, room: float) -> float:
        """A room that is small although nothing is in hand does not grow: nothing is kept waiting for it."""
        largest = max(room, self._largest_room.get(owner, 0.0))
        is_busy = room < largest and transaction.execute(_IN_HAND, {"owner_": owner}).first() is not None
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
            .where(or_(IS_WAITING, IS_LOST), fits_later, is_for_us, jobs.c.submitted_at < now_s - self._patience_s)
            .order_by(*_ORDER)
            .limit(1)
        )
        return transaction.execute(statement, {"now_s_": now_s}).one_or_none()


def _attempt(job_id: str, owner: str, attempt: int) -> dict[str, Any]:
    """Parameters of IS_HELD."""
    return {"job_id_": job_id, "owner_": owner, "attempt_": attempt}


def _end_abandoned(transaction: Connection, values: dict[str, Any]) -> None:
    now_s = values["now_s_"]
    for row in transaction.execute(_CHOOSE_ABANDONED, values).all():
        it = {"job_id_": row.id}
        if row.cancel_requested:
            end(transaction, END_ONE, it, JobState.CANCELLED, now_s)
            continue
        num_lost = row.num_lost_attempts + 1
        problem = Problem(500, "replicas-lost", f"job: {num_lost} replicas were lost while they worked on it")
        body = problem.body(f"/v1/jobs/{row.id}")
        end(transaction, END_ONE, it, JobState.FAILED, now_s, problem=body, num_lost=1)


def _before(row: Row[Any, Any, Any]) -> ColumnElement[bool]:
    """In the order of the queue."""
    is_older = or_(
        jobs.c.submitted_at < row.submitted_at, and_(jobs.c.submitted_at == row.submitted_at, jobs.c.id < row.id)
    )
    return or_(jobs.c.priority > row.priority, and_(jobs.c.priority == row.priority, is_older))


def _reserve(transaction: Connection, job_id: str, owner: str, now_s: float, lease_s: float) -> None:
    is_free = or_(jobs.c.reserved_by.is_(None), jobs.c.reserved_by == owner, jobs.c.reserved_until < now_s)
    statement = update(jobs).where(jobs.c.id == job_id, jobs.c.state.in_((JobState.QUEUED, JobState.RUNNING)), is_free)
    transaction.execute(statement.values(reserved_by=owner, reserved_until=now_s + lease_s))


def _claimed(
    transaction: Connection, choices: Sequence[Select[Any]], values: dict[str, Any], max_jobs: int
) -> list[Job]:
    """By each of the choices in turn; a choice for each kind of job, so that each query goes along an index."""
    found: list[Job] = []
    room = values["room_"]
    for choice in choices:
        for row in transaction.execute(choice, {**values, "max_jobs_": max_jobs - len(found)}).all():
            if row.megapixels <= room:
                taken = transaction.execute(_TAKE, {**values, "job_id_": row.id}).one()
                found.append(job_of(taken))
                room -= row.megapixels
    return found


def _looking(fits: ColumnElement[bool]) -> Any:
    """Whether there is a job to be taken that waits, and whether there is one that was lost or is to be given up."""
    return select(exists().where(IS_WAITING, fits), exists().where(IS_LOST, or_(fits, _IS_GIVEN_UP)))


def _choosing(which: ColumnElement[bool], fits: ColumnElement[bool]) -> Select[Any]:
    wanted = select(jobs.c.id, jobs.c.megapixels).where(which, fits).order_by(*_ORDER).limit(bindparam("max_jobs_"))
    return wanted.with_for_update(skip_locked=True)


def _taking() -> ReturningUpdate[Any]:
    values = {
        "state": JobState.RUNNING,
        "phase": "encode",
        "step": 0,
        "preview": None,
        "preview_step": 0,
        "owner": bindparam("owner_"),
        "attempt": jobs.c.attempt + 1,
        "num_lost_attempts": jobs.c.num_lost_attempts + case((jobs.c.state == JobState.RUNNING, 1), else_=0),
        "lease_until": NOW_S + bindparam("lease_s_", type_=Double),
        "reserved_by": None,
        "reserved_until": None,
        "started_at": func.coalesce(jobs.c.started_at, NOW_S),
    }
    return update(jobs).where(IS_IT).values(values).returning(*jobs.c)


def _telling(*names: str) -> Update:
    return update(jobs).where(IS_HELD).values({name: bindparam(f"{name}_") for name in names})


def _values(progress: Progress) -> dict[str, Any]:
    return {f"{name}_": value for name, value in vars(progress).items()}


_FITS = jobs.c.megapixels <= bindparam("room_", type_=Double)
_IS_GIVEN_UP = or_(jobs.c.cancel_requested, jobs.c.num_lost_attempts + 1 >= bindparam("max_lost_"))
_LOOK = _looking(_FITS)
_CHOOSE = _choosing(IS_WAITING, _FITS)
_CHOOSE_ABANDONED = (
    select(jobs.c.id, jobs.c.num_lost_attempts, jobs.c.cancel_requested)
    .where(IS_LOST, _IS_GIVEN_UP)
    .limit(_ENDED_AT_ONCE)
    .with_for_update(skip_locked=True)
)
_TAKE = _taking()
_TELL = _telling("phase", "step", "num_steps", "lease_until")
_TELL_PREVIEW = _telling("phase", "step", "num_steps", "lease_until", "preview", "preview_step")
_IN_HAND = select(jobs.c.id, jobs.c.attempt, jobs.c.cancel_requested).where(
    jobs.c.owner == bindparam("owner_"), jobs.c.state == JobState.RUNNING
)
_GIVE_BACK = (
    update(jobs)
    .where(IS_HELD, ~jobs.c.cancel_requested)
    .values(state=JobState.QUEUED, phase=JobState.QUEUED, owner=None, lease_until=None, preview=None)
)
_SAID_BEFORE = select(
    exists().where(
        IS_IT,
        jobs.c.owner == bindparam("owner_"),
        jobs.c.attempt == bindparam("attempt_"),
        jobs.c.state == bindparam("state_"),
    )
)

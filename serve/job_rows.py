"""Between rows of the table `jobs` and the objects of `job_records`, and the one statement that ends a job."""

from __future__ import annotations

import uuid
from typing import Any

from sqlalchemy import Connection, Row, and_, insert, update
from sqlalchemy.sql import ColumnElement

from serve.job_records import Job, JobState, NewJob, ResultFile
from serve.job_tables import jobs, webhooks

LIVE = (JobState.QUEUED, JobState.RUNNING)
IS_WAITING = jobs.c.state == JobState.QUEUED


def row_of(new: NewJob, now_s: float) -> dict[str, Any]:
    """The row of a job that is accepted now."""
    width, height = new.input_size_px
    given = {name: value for name, value in vars(new).items() if name != "input_size_px"}
    return {
        **given,
        "submitted_at": now_s,
        "expires_at": now_s + (new.expires_at - new.submitted_at),
        "input_width": width,
        "input_height": height,
        "state": JobState.QUEUED,
        "phase": JobState.QUEUED,
        "step": 0,
        "num_steps": int(new.request.get("num_inference_steps", 1)),
        "preview_step": 0,
        "attempt": 0,
        "num_lost_attempts": 0,
        "cancel_requested": False,
    }


def job_of(row: Row[Any]) -> Job:
    """The job in a whole row."""
    values = {name: value for name, value in row._mapping.items() if name not in _NOT_TOLD}
    size_px = (row.input_width, row.input_height)
    result = None if row.result is None else _result_of(row.result)
    return Job(**{**values, "state": JobState(row.state), "input_size_px": size_px, "result": result})


def held_by(job_id: str, owner: str, attempt: int) -> ColumnElement[bool]:
    """The job, as long as it runs in this very attempt."""
    return and_(jobs.c.id == job_id, jobs.c.owner == owner, jobs.c.attempt == attempt, jobs.c.state == JobState.RUNNING)


def is_lost(now_s: float) -> ColumnElement[bool]:
    """Running, by a replica that is not heard of any more."""
    return and_(jobs.c.state == JobState.RUNNING, jobs.c.lease_until < now_s)


def end(
    transaction: Connection, which: ColumnElement[bool], state: JobState, now_s: float, **outcome: Any
) -> Row[Any] | None:
    """Ends the one job `which` names, if it has not ended, and leaves its webhook in the same transaction.

    Returns its row; None when there was none. The time after which it expires begins again.
    """
    values = {
        "state": state,
        "phase": state,
        "ended_at": now_s,
        "expires_at": now_s + jobs.c.expires_at - jobs.c.submitted_at,
        "preview": None,
        "lease_until": None,
        "reserved_by": None,
        "reserved_until": None,
        **outcome,
    }
    statement = update(jobs).where(which, jobs.c.state.in_(LIVE)).values(values).returning(*jobs.c)
    row = transaction.execute(statement).one_or_none()
    if row is not None and row.webhook_url is not None:
        webhook = {"id": f"msg_{uuid.uuid4().hex}", "job_id": row.id, "url": row.webhook_url, "attempt": 0}
        transaction.execute(insert(webhooks).values(**webhook, due_at=now_s))
    return row


def _result_of(stored: dict[str, Any]) -> ResultFile:
    return ResultFile(**{**stored, "size_px": tuple(stored["size_px"])})


_NOT_TOLD = frozenset({"input_width", "input_height", "owner", "lease_until", "reserved_by", "reserved_until"})

"""Between rows of the table `jobs` and the objects of `job_records`, and the statements that end a job."""

from __future__ import annotations

import uuid
from typing import Any

from sqlalchemy import Connection, Double, Row, and_, bindparam, case, insert, or_, update
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.dml import ReturningUpdate

from serve.job_records import Job, JobState, NewJob, ResultFile
from serve.job_tables import jobs, webhooks

# Statements are built once and executed with parameters: to build one takes ten times as long as to execute it. The
# names of parameters end in an underscore, for those of columns are SQLAlchemy's own.
LIVE = (JobState.QUEUED, JobState.RUNNING)
NOW_S = bindparam("now_s_", type_=Double)
_STATE = bindparam("state_", type_=jobs.c.state.type)
_OUTCOME = ("result", "problem", "model_version", "manifest_digest", "device_seconds")

IS_WAITING = jobs.c.state == JobState.QUEUED
IS_LOST = and_(jobs.c.state == JobState.RUNNING, jobs.c.lease_until < NOW_S)
"""Running, by a replica that is not heard of any more."""
IS_IT = jobs.c.id == bindparam("job_id_")
IS_HELD = and_(
    IS_IT,
    jobs.c.owner == bindparam("owner_"),
    jobs.c.attempt == bindparam("attempt_"),
    jobs.c.state == JobState.RUNNING,
)
"""As long as the job runs in this very attempt."""


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


def _ending(which: ColumnElement[bool]) -> ReturningUpdate[Any]:
    values = {
        "state": _STATE,
        "phase": _STATE,
        "ended_at": NOW_S,
        # The time after which it expires begins again.
        "expires_at": NOW_S + jobs.c.expires_at - jobs.c.submitted_at,
        "step": case((_STATE == JobState.DONE, jobs.c.num_steps), else_=jobs.c.step),
        "cancel_requested": or_(jobs.c.cancel_requested, _STATE == JobState.CANCELLED),
        "num_lost_attempts": jobs.c.num_lost_attempts + bindparam("num_lost_"),
        "preview": None,
        "lease_until": None,
        "reserved_by": None,
        "reserved_until": None,
        **{name: bindparam(f"{name}_", type_=jobs.c[name].type) for name in _OUTCOME},
    }
    return update(jobs).where(which, jobs.c.state.in_(LIVE)).values(values).returning(*jobs.c)


END_ONE = _ending(IS_IT)
"""Ends a job, whoever has it."""
END_HELD = _ending(IS_HELD)
"""Ends a job that runs in one attempt."""


def end(
    transaction: Connection,
    ending: ReturningUpdate[Any],
    which: dict[str, Any],
    state: JobState,
    now_s: float,
    *,
    num_lost: int = 0,
    **outcome: Any,
) -> Row[Any] | None:
    """Ends the one job that `which` names, if it has not ended, and leaves its webhook in the same transaction.

    `which` are the parameters of END_ONE or END_HELD. Returns the job's row; None when there was none.
    """
    values = {f"{name}_": outcome.pop(name, None) for name in _OUTCOME}
    assert not outcome, outcome
    values |= {**which, "state_": state, "now_s_": now_s, "num_lost_": num_lost}
    row = transaction.execute(ending, values).one_or_none()
    if row is not None and row.webhook_url is not None:
        webhook = {"id": f"msg_{uuid.uuid4().hex}", "job_id": row.id, "url": row.webhook_url, "attempt": 0}
        transaction.execute(insert(webhooks).values(**webhook, due_at=now_s))
    return row


def _result_of(stored: dict[str, Any]) -> ResultFile:
    return ResultFile(**{**stored, "size_px": tuple(stored["size_px"])})


_NOT_TOLD = frozenset({"input_width", "input_height", "owner", "lease_until", "reserved_by", "reserved_until"})

"""What the job store hands out and takes in: jobs, their states, progress, results, and what waits. Holds no SQL."""

from __future__ import annotations

import secrets
import threading
import time
import uuid
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class JobState(StrEnum):
    """Of a job. Queued and running jobs go on; all others have ended."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    """Removed; told to those who still follow the job, and stored nowhere."""


class KeyReused(ValueError):  # noqa: N818 - what happened, not how it is told
    """An Idempotency-Key came again with another request."""


@dataclass(frozen=True)
class ResultFile:
    """A restored picture in storage; `size_px` is (width, height)."""

    name: str
    media_type: str
    size_bytes: int
    sha256: str
    size_px: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to be accepted. Its input is in storage already."""

    id: str
    key_id: str
    idempotency_key: str | None
    request_digest: str
    """Equal for equal requests."""
    request: dict[str, Any]
    """Fields of an `UpscaleRequest`."""
    input_name: str
    input_size_px: tuple[int, int]
    """(width, height), upright."""
    megapixels: float
    """Of the result."""
    num_tiles: int
    work: float
    """Megapixels x denoising steps."""
    estimated_s: float
    """Seconds of one device."""
    priority: int
    """9 is served before 0."""
    webhook_url: str | None
    trace_id: str
    expires_at: float
    """When it has failed, if nobody has worked it off; once it has ended, when it is removed: as long after its end."""
    submitted_at: float
    """Both in seconds since the epoch. The store counts by its own clock; what lies between the two is kept."""


@dataclass(frozen=True, kw_only=True)
class Job(NewJob):
    """A job as it is now. All times are in seconds since the epoch."""

    state: JobState
    phase: str
    """queued, encode, denoise, ..., and at the end the state."""
    step: int
    num_steps: int
    preview: bytes | None = field(repr=False)
    """A small WebP of a running job."""
    preview_step: int
    attempt: int
    """Grows with every claim; 0 before the first. What an older attempt says is not heard."""
    num_lost_attempts: int
    """Claims whose replica was not heard of again."""
    cancel_requested: bool
    started_at: float | None
    """Of the first attempt."""
    ended_at: float | None
    result: ResultFile | None
    problem: dict[str, Any] | None
    device_seconds: float | None
    model_version: str | None
    manifest_digest: str | None


@dataclass(frozen=True)
class Progress:
    """How far an attempt has come; without a `preview` the one before stays."""

    job_id: str
    attempt: int
    phase: str
    step: int
    num_steps: int
    preview: bytes | None
    preview_step: int


@dataclass(frozen=True)
class Heartbeat:
    """What a replica hears when it gives a sign of life."""

    cancelled: set[str]
    """Its jobs that somebody wants to be cancelled."""
    lost: set[str]
    """Jobs it told progress of and that are not its own any more."""


@dataclass(frozen=True)
class Backlog:
    """Jobs that have not ended."""

    num_queued: int
    num_running: int
    megapixels: float
    """Of the results of all of them."""
    work: float
    """Megapixel-steps still to be done."""
    oldest_queued_s: float
    """Age of the oldest job that waits; 0 when none does."""


@dataclass(frozen=True)
class Webhook:
    """The end of a job, to be told to `url`; `attempt` counts from 1."""

    id: str
    job_id: str
    url: str
    attempt: int


_ids_lock = threading.Lock()
_last_id_time = 0


def new_job_id() -> str:
    """UUIDv7 (RFC 9562, method 3) in 32 hex digits: ids sort by time, those of one process strictly."""
    global _last_id_time
    with _ids_lock:
        milliseconds, rest_ns = divmod(time.time_ns(), 1_000_000)
        now = milliseconds << 12 | (rest_ns << 12) // 1_000_000
        _last_id_time = max(now, _last_id_time + 1)
        time_and_fraction = _last_id_time
    upper = (time_and_fraction >> 12) << 16 | 0x7 << 12 | time_and_fraction & 0xFFF
    return uuid.UUID(int=upper << 64 | 0b10 << 62 | secrets.randbits(62)).hex

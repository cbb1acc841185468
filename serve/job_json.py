"""A job as clients see it: the JSON of every jobs endpoint, of the last event of a stream, and of webhooks."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, Field

from serve.estimate import Estimate, Rates, price_of
from serve.jobs import Job, JobState

_ID = "0198c9a2f3b47c10a1b2c3d4e5f60718"
_SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


class PictureSize(BaseModel):
    """In pixels, upright."""

    width: int = Field(examples=[640])
    height: int = Field(examples=[480])


class ResultJson(PictureSize):
    """The restored picture: where it is, and what it must be when it has arrived."""

    url: str = Field(examples=[f"/v1/jobs/{_ID}/result"])
    media_type: str = Field(examples=["image/png"])
    bytes: int = Field(examples=[9_437_184], description="Size of the file")
    sha256: str = Field(examples=[_SHA256], description="Of the file, in hex; also its ETag")


class EstimateJson(BaseModel):
    """What the job was expected to take when it was accepted."""

    megapixels: float = Field(examples=[4.9152], description="Of the result")
    tiles: int = Field(examples=[12], description="In which the picture is restored")
    device_seconds: float = Field(examples=[98.304], description="Of one device")
    price: float = Field(examples=[0.08192])
    currency: str = Field(examples=["USD"], description="ISO 4217")


class CostJson(BaseModel):
    """What the job took, measured."""

    device_seconds: float = Field(examples=[91.2])
    price: float = Field(examples=[0.076])
    currency: str = Field(examples=["USD"])


class LinksJson(BaseModel):
    """Where to go on."""

    self: str = Field(examples=[f"/v1/jobs/{_ID}"])
    events: str = Field(examples=[f"/v1/jobs/{_ID}/events"])
    result: str = Field(examples=[f"/v1/jobs/{_ID}/result"])
    cancel: str = Field(examples=[f"/v1/jobs/{_ID}"], description="With DELETE")


class JobJson(BaseModel):
    """A job, from its acceptance to its expiry. Times are RFC 3339 in UTC."""

    id: str = Field(examples=[_ID])
    state: JobState = Field(examples=["running"])
    phase: str = Field(examples=["denoise"], description="What is being done: queued, encode, denoise, decode, ...")
    priority: int = Field(examples=[5])
    queue_position: int | None = Field(examples=[None], description="Jobs before it; null when it does not wait")
    step: int = Field(examples=[7], description="Denoising steps done")
    num_steps: int = Field(examples=[20])
    progress: float = Field(examples=[0.35], description="0 to 1")
    submitted_at: str = Field(examples=["2026-01-31T12:00:00.000Z"])
    started_at: str | None = Field(examples=["2026-01-31T12:00:01.250Z"])
    ended_at: str | None = Field(examples=[None])
    expires_at: str = Field(examples=["2026-02-01T12:00:00.000Z"], description="Then job and files are removed")
    input: PictureSize
    result: ResultJson | None = Field(description="Of a job that is done")
    problem: dict[str, Any] | None = Field(examples=[None], description="Problem JSON of a job that failed")
    estimate: EstimateJson
    cost: CostJson | None = Field(description="Of a job that is done")
    model_version: str | None = Field(examples=["faithdiff-nano/3"])
    manifest_digest: str | None = Field(examples=["sha256:5f70bf18a086007016e948b04aed3b82"])
    request: dict[str, Any] = Field(examples=[{"scale": 4, "num_inference_steps": 20, "output_format": "png"}])
    links: LinksJson


class JobPage(BaseModel):
    """Some of a key's jobs, the newest first."""

    jobs: list[JobJson]
    next_cursor: str | None = Field(
        examples=[_ID], description="Pass it as `cursor` for the next ones; null at the end"
    )


class WebhookEvent(BaseModel):
    """What a webhook brings."""

    type: str = Field(examples=["job.done"], description="job.done, job.failed or job.cancelled")
    timestamp: str = Field(examples=["2026-01-31T12:01:32.500Z"], description="When the job ended")
    data: JobJson


def job_json(job: Job, position: int | None, rates: Rates) -> JobJson:
    """`job` as clients see it; `position` counts the jobs before it in the queue."""
    width, height = job.input_size_px
    return JobJson(
        id=job.id,
        state=job.state,
        phase=job.phase,
        priority=job.priority,
        queue_position=position if job.state is JobState.QUEUED else None,
        step=job.step,
        num_steps=job.num_steps,
        progress=progress_of(job),
        submitted_at=timestamp(job.submitted_at),
        started_at=None if job.started_at is None else timestamp(job.started_at),
        ended_at=None if job.ended_at is None else timestamp(job.ended_at),
        expires_at=timestamp(job.expires_at),
        input=PictureSize(width=width, height=height),
        result=_result(job),
        problem=job.problem,
        estimate=_estimate(job, rates),
        cost=_cost(job, rates),
        model_version=job.model_version,
        manifest_digest=job.manifest_digest,
        request=job.request,
        links=_links(job.id),
    )


def estimate_json(estimate: Estimate) -> EstimateJson:
    """The part of an estimate that a job carries."""
    return EstimateJson(
        megapixels=estimate.megapixels,
        tiles=estimate.num_tiles,
        device_seconds=estimate.device_seconds,
        price=estimate.price,
        currency=estimate.currency,
    )


def progress_of(job: Job) -> float:
    """0 to 1."""
    if job.state is JobState.DONE:
        return 1.0
    return round(min(1.0, job.step / max(1, job.num_steps)), 4)


def timestamp(time_s: float) -> str:
    """RFC 3339 in UTC, of seconds since the epoch."""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _result(job: Job) -> ResultJson | None:
    if job.result is None:
        return None
    width, height = job.result.size_px
    return ResultJson(
        url=_links(job.id).result,
        media_type=job.result.media_type,
        bytes=job.result.size_bytes,
        sha256=job.result.sha256,
        width=width,
        height=height,
    )


def _estimate(job: Job, rates: Rates) -> EstimateJson:
    return EstimateJson(
        megapixels=job.megapixels,
        tiles=job.num_tiles,
        device_seconds=job.estimated_s,
        price=price_of(job.estimated_s, rates),
        currency=rates.currency,
    )


def _cost(job: Job, rates: Rates) -> CostJson | None:
    if job.device_seconds is None:
        return None
    return CostJson(
        device_seconds=round(job.device_seconds, 3),
        price=price_of(job.device_seconds, rates),
        currency=rates.currency,
    )


def _links(job_id: str) -> LinksJson:
    path = f"/v1/jobs/{job_id}"
    return LinksJson(self=path, events=f"{path}/events", result=f"{path}/result", cancel=path)

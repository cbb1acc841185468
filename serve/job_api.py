"""The jobs endpoints: accept, look at, list, follow, fetch, cancel. A key sees its own jobs and no others."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from typing import Annotated, Any
from weakref import WeakValueDictionary

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.responses import StreamingResponse

from serve.access import Access, Caller, caller_of
from serve.estimate import Estimate, Rates
from serve.events import ENDED, LIVE, JobWatcher, event_stream
from serve.form import JobRequest
from serve.intake import Intake, Upload
from serve.job_json import JobJson, JobPage, job_json
from serve.jobs import Job, JobState, JobStore, KeyReused, NewJob, new_job_id
from serve.metrics import note_size
from serve.openapi import TRACEPARENT, Responses, form_body, picture_responses, problems
from serve.problems import Problem
from serve.results import result_response
from serve.webhooks import WebhookSender
from sr_platform.storage import Storage

_ID = re.compile(r"[0-9a-f-]{8,64}")
_IDEMPOTENCY_KEY = re.compile(r'"?([!#-\[\]-~]{1,255})"?')
_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_LONGEST_STREAM_S = 900.0


class JobEndpoints:
    """The endpoints, as methods."""

    def __init__(
        self,
        store: JobStore,
        storage: Storage,
        *,
        intake: Intake,
        access: Access,
        webhooks: WebhookSender,
        watcher: JobWatcher,
        rates: Rates,
        ttl_s: float,
    ) -> None:
        self._store, self._storage, self._intake, self._access = store, storage, intake, access
        self._webhooks, self._watcher, self._rates = webhooks, watcher, rates
        self._ttl_s = ttl_s
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def submit(self, request: Request) -> Response:
        """Accepts a picture: the answer is the job, which from then on cannot be lost."""
        caller, idempotency_key = caller_of(request), _idempotency_key(request)
        async with self._intake.upload(request, JobRequest) as upload:
            if upload.wanted.webhook_url is not None:
                self._webhooks.check(upload.wanted.webhook_url)
            expected = await self._intake.estimate(upload.size_px, upload.wanted)
            note_size(request, expected.megapixels)
            new = self._new_job(request, caller, idempotency_key, upload, expected)
            job, is_new, position = await self._accept(caller, new, upload.data)
        headers = {"Location": f"/v1/jobs/{job.id}"}
        if not is_new:
            headers["Idempotency-Replayed"] = "true"
        return _json(job_json(job, position, self._rates), 202, headers)

    async def get(self, request: Request, job_id: str) -> JobJson:
        """One job, as it is now."""
        return await self._view(await self._job(request, job_id))

    async def page(
        self,
        request: Request,
        state: JobState | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        cursor: Annotated[
            str | None, Query(pattern=r"^[0-9a-f-]{8,64}$", description="`next_cursor` of a page")
        ] = None,
    ) -> JobPage:
        """The caller's jobs, the newest first."""
        found = await asyncio.to_thread(
            self._store.list, caller_of(request).key_id, state=state, limit=limit + 1, before=cursor
        )
        jobs = found[:limit]
        positions = await self._positions(jobs)
        return JobPage(
            jobs=[job_json(job, positions.get(job.id), self._rates) for job in jobs],
            next_cursor=jobs[-1].id if len(found) > limit else None,
        )

    async def cancel(self, request: Request, job_id: str) -> Response:
        """Cancels a job: at once when it waits (200), after the current step when it runs (202)."""
        job = await self._job(request, job_id)
        after = await asyncio.to_thread(self._store.request_cancel, job.id, caller_of(request).key_id)
        if after is None:
            raise _no_such_job()
        if after.state is JobState.RUNNING:
            return _json(await self._view(after), 202)
        if after.state is not JobState.CANCELLED:
            detail = f"job: it is {after.state.value} and cannot be cancelled any more"
            raise Problem(409, "already-ended", detail)
        return _json(await self._view(after), 200)

    async def events(self, request: Request, job_id: str) -> Response:
        """Server-sent events: `progress` with every change, and at the end `done`, `failed`, `cancelled` or `expired`.

        The current state is sent first. A client that comes back after the last event is answered 204.
        """
        job = await self._job(request, job_id)
        last_event_id = request.headers.get("last-event-id", "")
        if last_event_id == ENDED and job.state not in LIVE:
            return Response(status_code=204)
        stream = event_stream(self._watcher, job, self._rates, last_event_id=last_event_id, longest_s=_LONGEST_STREAM_S)
        return StreamingResponse(stream, media_type="text/event-stream", headers=_STREAM_HEADERS)

    async def result(self, request: Request, job_id: str) -> Response:
        """The restored picture; parts of it with Range, nothing when If-None-Match names its ETag."""
        return await result_response(request, await self._job(request, job_id), self._storage)

    def _new_job(
        self,
        request: Request,
        caller: Caller,
        idempotency_key: str | None,
        upload: Upload[JobRequest],
        expected: Estimate,
    ) -> NewJob:
        job_id, now_s, wanted = new_job_id(), time.time(), upload.wanted
        return NewJob(
            id=job_id,
            key_id=caller.key_id,
            idempotency_key=idempotency_key,
            request_digest=_digest(upload),
            request=wanted.upscale_request().model_dump(mode="json"),
            input_name=f"jobs/{job_id}/input",
            input_size_px=upload.size_px,
            megapixels=expected.megapixels,
            num_tiles=expected.num_tiles,
            work=expected.work,
            estimated_s=expected.device_seconds,
            priority=wanted.priority,
            webhook_url=wanted.webhook_url,
            trace_id=request.state.trace_id,
            expires_at=now_s + self._ttl_s,
            submitted_at=now_s,
        )

    async def _accept(self, caller: Caller, new: NewJob, data: bytes) -> tuple[Job, bool, int | None]:
        """The row, whether it is new, its place. Repeated requests wait for each other: only the first is counted."""
        if new.idempotency_key is None:
            return await asyncio.to_thread(self._accept_now, caller, new, data)
        name = f"{caller.key_id} {new.idempotency_key}"
        turn = self._turns.setdefault(name, asyncio.Lock())
        async with turn:
            return await asyncio.to_thread(self._accept_now, caller, new, data)

    def _accept_now(self, caller: Caller, new: NewJob, data: bytes) -> tuple[Job, bool, int | None]:
        """All that blocks, in one thread: to change threads takes about as long as a look into the database."""
        job, is_new = self._store_and_submit(caller, new, data)
        return job, is_new, self._store.queue_position([job.id]).get(job.id)

    def _store_and_submit(self, caller: Caller, new: NewJob, data: bytes) -> tuple[Job, bool]:
        """The input is in storage before there is a row that needs it."""
        replayed = self._replayed(new)
        if replayed is not None:
            return replayed, False
        self._intake.check_room(caller.key_id, new.megapixels)
        self._access.take_now(caller, new.megapixels)
        self._storage.write_bytes_atomic(new.input_name, data)
        try:
            job, is_new = self._store.submit(new)
        except KeyReused as error:
            self._storage.delete(new.input_name)
            raise _key_reused() from error
        if not is_new:
            self._storage.delete(new.input_name)
        return job, is_new

    def _replayed(self, new: NewJob) -> Job | None:
        """The job that this key has made before: repeating a request costs nothing."""
        if new.idempotency_key is None:
            return None
        job = self._store.find(new.key_id, new.idempotency_key)
        if job is not None and job.request_digest != new.request_digest:
            raise _key_reused()
        return job

    async def _job(self, request: Request, job_id: str) -> Job:
        """The caller's job. Whose it is otherwise, nobody learns: Problem 404."""
        if not _ID.fullmatch(job_id):
            raise _no_such_job()
        job = await asyncio.to_thread(self._store.get, job_id, caller_of(request).key_id)
        if job is None:
            raise _no_such_job()
        return job

    async def _view(self, job: Job) -> JobJson:
        return job_json(job, (await self._positions([job])).get(job.id), self._rates)

    async def _positions(self, jobs: list[Job]) -> dict[str, int]:
        waiting = [job.id for job in jobs if job.state is JobState.QUEUED]
        return await asyncio.to_thread(self._store.queue_position, waiting) if waiting else {}


def add_job_routes(router: APIRouter, jobs: JobEndpoints) -> None:
    """`jobs` on the paths of the contract, documented."""
    accepted: Responses = {
        202: {"model": JobJson, "description": "Accepted, or accepted before", "headers": _SUBMIT_HEADERS}
    }
    router.post(
        "/v1/jobs",
        status_code=202,
        tags=["jobs"],
        responses={**problems(400, 408, 413, 415, 422, 429, 503), **accepted},
        openapi_extra={**form_body(JobRequest), "parameters": _SUBMIT_PARAMETERS},
    )(jobs.submit)
    router.get("/v1/jobs", tags=["jobs"], responses=problems(422, 503))(jobs.page)
    path = "/v1/jobs/{job_id}"
    router.get(path, tags=["jobs"], responses=problems(404, 503))(jobs.get)
    cancelled: Responses = {
        200: {"model": JobJson, "description": "Cancelled"},
        202: {"model": JobJson, "description": "It ends after the current step"},
    }
    router.delete(path, tags=["jobs"], responses={**problems(404, 409, 503), **cancelled})(jobs.cancel)
    router.get(
        f"{path}/events",
        tags=["jobs"],
        response_class=StreamingResponse,
        responses={**problems(404, 503), **_EVENT_STREAM},
        openapi_extra={"parameters": [_header("Last-Event-ID", "Id of the last event that has arrived", ENDED)]},
    )(jobs.events)
    router.get(
        f"{path}/result",
        tags=["jobs"],
        response_class=Response,
        responses={**problems(404, 409, 410, 412, 416, 503), **picture_responses(200, 206), **_NOT_MODIFIED},
        openapi_extra={"parameters": _RESULT_PARAMETERS},
    )(jobs.result)
    router.head(path, include_in_schema=False)(jobs.get)
    router.head(f"{path}/result", include_in_schema=False)(jobs.result)


def _idempotency_key(request: Request) -> str | None:
    """With or without the quotes of a structured header. Raises Problem 422."""
    sent = request.headers.get("idempotency-key")
    if sent is None:
        return None
    found = _IDEMPOTENCY_KEY.fullmatch(sent)
    if found is None:
        reason = "it must be 1 to 255 visible ASCII characters, such as a UUID"
        errors = [{"field": "Idempotency-Key", "detail": reason}]
        raise Problem(422, "invalid-fields", f"Idempotency-Key: {reason}", errors=errors)
    return found[1]


def _digest(upload: Upload[JobRequest]) -> str:
    """Of the picture's bytes and every field: what makes two requests the same."""
    fields = json.dumps(upload.wanted.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(hashlib.sha256(upload.data).digest() + fields.encode()).hexdigest()


def _key_reused() -> Problem:
    detail = "job: this Idempotency-Key was sent with another picture or other fields; take a new one"
    return Problem(422, "idempotency-key-reused", detail)


def _no_such_job() -> Problem:
    return Problem(404, "no-such-job", "job: there is none of this id, or it has expired; check the id and the key")


def _json(view: JobJson, status: int, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(view.model_dump(mode="json"), status, headers)


def _header(name: str, description: str, example: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": description,
        "schema": {"type": "string"},
        "example": example,
    }


_SUBMIT_PARAMETERS = [
    {
        **_header("Idempotency-Key", "Requests with the same key make one job", "8e03978e-40d5-43e8-bc93-6894a57f9324"),
        "schema": {"type": "string", "pattern": "^[!#-\\[\\]-~]{1,255}$"},
    },
    _header("traceparent", "W3C Trace Context; its trace id is that of the job", TRACEPARENT),
]
_SUBMIT_HEADERS = {
    "Location": {"description": "Path of the job", "schema": {"type": "string"}},
    "Idempotency-Replayed": {"description": "true when the job was there already", "schema": {"type": "string"}},
}
_RESULT_PARAMETERS = [
    _header("Range", "One range of bytes", "bytes=0-1048575"),
    _header("If-Range", "ETag that the range belongs to", '"9f86d081884c7d65"'),
    _header("If-None-Match", "ETags the client has", '"9f86d081884c7d65"'),
    _header("If-Match", "ETags the client wants", '"9f86d081884c7d65"'),
]
_NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "The client has it"}}
_EVENT = {
    "type": "object",
    "required": ["event", "id", "data"],
    "properties": {
        "event": {"enum": ["progress", "done", "failed", "cancelled", "expired"]},
        "id": {"type": "string"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "description": "Of progress: state, phase, queue_position, step, num_steps, progress, and preview, a data "
            "URL, when there is a new one. Of all others the job.",
        },
    },
}
_EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events; comment lines keep the connection alive",
        "content": {
            "text/event-stream": {
                "schema": _EVENT,
                "example": 'event: progress\nid: -1.denoise.7.\nretry: 1000\ndata: {"state": "running", "step": 7}\n\n',
            }
        },
    },
    204: {"description": "The last event has been sent before"},
}

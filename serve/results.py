"""A stored result over HTTP: whole or a part of it, once or again. RFC 9110: Range, If-Range, ETag, preconditions."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from email.utils import format_datetime

from fastapi import Request, Response
from starlette.responses import StreamingResponse

from serve.jobs import Job, JobState, ResultFile
from serve.problems import Problem
from sr_platform.errors import InputDataError
from sr_platform.storage import Storage

_CHUNK_BYTES = 1024**2
_RANGE = re.compile(r"bytes\s*=\s*(?:(\d{1,18})\s*-\s*(\d{0,18})|-\s*(\d{1,18}))\s*", re.ASCII)
_ENTITY_TAG = re.compile(r'(?:W/)?"[^"]*"')
_SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/tiff": "tif"}


async def result_response(request: Request, job: Job, storage: Storage) -> Response:
    """200, 206 or 304 for the result of `job`.

    Raises:
        Problem: 409 it is not done; 410 it is gone; 412 a precondition; 416 the range lies behind the end.
    """
    result = _result_of(job)
    headers = _headers(job, result)
    if (wanted := request.headers.get("if-match")) and not _matches(wanted, headers["ETag"], weak=False):
        raise Problem(412, "precondition-failed", f"result: If-Match is {wanted[:200]}; its ETag is {headers['ETag']}")
    if (known := request.headers.get("if-none-match")) and _matches(known, headers["ETag"], weak=True):
        return Response(status_code=304, headers=headers)
    part = _wanted_part(request, result, headers)
    start, end = part or (0, result.size_bytes)
    first = await _read(storage, result, start, min(end, start + _CHUNK_BYTES))
    headers["Content-Length"] = str(end - start)
    if part:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{result.size_bytes}"
    return StreamingResponse(
        _chunks(storage, result, first, start, end if request.method != "HEAD" else start),
        status_code=206 if part else 200,
        headers=headers,
        media_type=result.media_type,
    )


def _result_of(job: Job) -> ResultFile:
    if job.result is not None and job.state is JobState.DONE:
        return job.result
    if job.state in (JobState.QUEUED, JobState.RUNNING):
        raise Problem(409, "not-done", f"job: it is {job.state.value}; come again when it is done", retry_after_s=1)
    if job.state is JobState.FAILED:
        raise Problem(409, "job-failed", f"job: it failed: {(job.problem or {}).get('detail', 'see its problem')}")
    raise Problem(410, "no-result", f"job: it is {job.state.value} and has no result; send the picture again")


def _headers(job: Job, result: ResultFile) -> dict[str, str]:
    lineage = {"X-Model-Version": job.model_version or "none", "X-Manifest-Digest": job.manifest_digest or "none"}
    ended = datetime.fromtimestamp(job.ended_at or job.submitted_at, UTC)
    return {
        "ETag": f'"{result.sha256}"',
        "Last-Modified": format_datetime(ended, usegmt=True),
        "Accept-Ranges": "bytes",
        # Only for the key that made it, and it never changes.
        "Cache-Control": "private, max-age=3600, immutable",
        "Vary": "Authorization",
        "Content-Disposition": f'attachment; filename="{job.id}.{_SUFFIXES.get(result.media_type, "bin")}"',
        **{name: value.encode("ascii", "backslashreplace").decode() for name, value in lineage.items()},
    }


def _wanted_part(request: Request, result: ResultFile, headers: dict[str, str]) -> tuple[int, int] | None:
    """(start, end) in bytes, end exclusive; None for the whole file. Several ranges at once are answered whole."""
    wanted = request.headers.get("range")
    condition = request.headers.get("if-range", "").strip()
    if wanted is None or (condition and condition not in (headers["ETag"], headers["Last-Modified"])):
        return None
    found = _RANGE.fullmatch(wanted.strip())
    if found is None:
        return None
    size_bytes = result.size_bytes
    if found[3] is not None:
        start, end = max(0, size_bytes - int(found[3])), size_bytes
    else:
        start, end = int(found[1]), min(size_bytes, int(found[2]) + 1) if found[2] else size_bytes
        if found[2] and int(found[2]) < int(found[1]):
            return None  # not a range at all, says RFC 9110
    if start >= end:
        raise Problem(
            416,
            "range-not-satisfiable",
            f"result: got range {wanted[:200]!r}; it has {size_bytes} bytes",
            headers={"Content-Range": f"bytes */{size_bytes}"},
        )
    return start, end


def _matches(listed: str, etag: str, *, weak: bool) -> bool:
    if listed.strip() == "*":
        return True
    tags = _ENTITY_TAG.findall(listed)
    return etag in [tag.removeprefix("W/") if weak else tag for tag in tags]


async def _read(storage: Storage, result: ResultFile, start: int, end: int) -> bytes:
    try:
        data = await asyncio.to_thread(storage.read_range, result.name, start, end)
    except InputDataError as error:
        raise Problem(410, "no-result", "job: its result was removed; send the picture again") from error
    assert len(data) == end - start, f"{result.name}: {len(data)} bytes at {start}, {end - start} were written"
    return data


async def _chunks(storage: Storage, result: ResultFile, first: bytes, start: int, end: int) -> AsyncIterator[bytes]:
    if start < end:
        yield first
    for begin in range(start + len(first), end, _CHUNK_BYTES):
        yield await _read(storage, result, begin, min(end, begin + _CHUNK_BYTES))

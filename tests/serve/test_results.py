from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.anyio

FIELDS = {"scale": "2", "num_inference_steps": "2"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def _done(client: Any, worker: Any, png: bytes) -> str:
    """Path of the result of a job that is done."""
    job = (await client.post("/v1/jobs", files={"picture": png}, data=FIELDS)).json()
    worker.work_off()
    return str(job["links"]["result"])


@pytest.fixture
def worker(store: Any, storage: Any) -> Any:
    from fake_worker import FakeWorker

    return FakeWorker(store, storage, step_s=0.0)


async def test_a_result_carries_what_it_is_and_where_it_comes_from(connect: Any, worker: Any, png: bytes) -> None:
    async with connect() as client:
        path = await _done(client, worker, png)
        answer = await client.get(path)
        head = await client.head(path)
        job = (await client.get(path.removesuffix("/result"))).json()
    assert answer.status_code == head.status_code == 200
    assert hashlib.sha256(answer.content).hexdigest() == job["result"]["sha256"]
    assert len(answer.content) == job["result"]["bytes"] == int(answer.headers["content-length"])
    assert answer.headers["etag"] == f'"{job["result"]["sha256"]}"'
    assert answer.headers["content-type"] == job["result"]["media_type"] == "image/png"
    assert answer.headers["x-model-version"] == job["model_version"] == "fake/1"
    assert answer.headers["x-manifest-digest"] == "sha256:fa4e"
    assert answer.headers["content-disposition"] == f'attachment; filename="{job["id"]}.png"'
    assert "private" in answer.headers["cache-control"]
    assert head.content == b""
    same = ("content-length", "etag", "content-type", "accept-ranges", "last-modified")
    assert {name: head.headers[name] for name in same} == {name: answer.headers[name] for name in same}


@pytest.mark.parametrize(("wanted", "start", "end"), [
    ("bytes=0-0", 0, 1), ("bytes=10-19", 10, 20), ("bytes=100-", 100, None), ("bytes=-7", -7, None),
    ("bytes=0-999999999", 0, None), ("bytes=-999999999", 0, None), ("bytes = 3 - 5", 3, 6),
])  # fmt: skip
async def test_a_part_is_that_part(
    connect: Any, worker: Any, png: bytes, wanted: str, start: int, end: int | None
) -> None:
    async with connect() as client:
        path = await _done(client, worker, png)
        whole = (await client.get(path)).content
        answer = await client.get(path, headers={"Range": wanted})
    first = start % len(whole)
    part = whole[first:end]
    assert answer.status_code == 206
    assert answer.content == part
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(part) - 1}/{len(whole)}"


@pytest.mark.parametrize("wanted", ["bytes=5-3", "bytes=a-b", "items=0-1", "bytes=0-1,4-5", "bytes=", "bytes=-", "x"])
async def test_what_is_no_single_range_is_answered_whole(connect: Any, worker: Any, png: bytes, wanted: str) -> None:
    async with connect() as client:
        path = await _done(client, worker, png)
        assert (await client.get(path, headers={"Range": wanted})).status_code == 200


@pytest.mark.parametrize("wanted", ["bytes=999999999-", "bytes=-0", "bytes=999999998-999999999"])
async def test_a_range_behind_the_end_is_a_problem_that_tells_the_size(
    connect: Any, worker: Any, png: bytes, wanted: str
) -> None:
    async with connect() as client:
        path = await _done(client, worker, png)
        size_bytes = len((await client.get(path)).content)
        answer = await client.get(path, headers={"Range": wanted})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{size_bytes}"
    assert answer.json()["type"] == "urn:faithdiff:problem:range-not-satisfiable"


async def test_preconditions_are_honoured(connect: Any, worker: Any, png: bytes) -> None:
    async with connect() as client:
        path = await _done(client, worker, png)
        first = await client.get(path)
        etag, modified = first.headers["etag"], first.headers["last-modified"]

        async def status(**headers: str) -> int:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            return int((await client.get(path, headers=sent)).status_code)

        for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            answer = await client.get(path, headers={"If-None-Match": known})
            assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
        assert await status(If_None_Match='"other"') == 200
        assert await status(If_Match=etag) == await status(If_Match="*") == 200
        assert await status(If_Match='"other"') == await status(If_Match=f"W/{etag}") == 412
        assert await status(Range="bytes=0-3", If_Range=etag) == 206
        assert await status(Range="bytes=0-3", If_Range=modified) == 206
        assert await status(Range="bytes=0-3", If_Range='"other"') == 200
        assert await status(Range="bytes=0-3", If_Range=f"W/{etag}") == 200
        assert await status(Range="bytes=999999999-", If_Range='"other"') == 200


async def test_a_large_result_comes_whole_and_in_parts(
    connect: Any, store: Any, storage: Any, worker: Any, to_file: Any
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    async with connect() as client:
        path = await _done(client, worker, to_file(noise, "PNG"))
        whole = (await client.get(path)).content
        assert len(whole) > 2 * 1024**2
        assert hashlib.sha256(whole).hexdigest() == (await client.get(path)).headers["etag"].strip('"')
        part = await client.get(path, headers={"Range": f"bytes=1000-{len(whole) - 1000}"})
    assert part.content == whole[1000 : len(whole) - 999]


async def test_a_job_without_a_result_says_why(connect: Any, store: Any, storage: Any, worker: Any, png: bytes) -> None:
    async with connect() as client:
        job = (await client.post("/v1/jobs", files={"picture": png})).json()
        waiting = await client.get(job["links"]["result"])
        await client.delete(job["links"]["self"])
        cancelled = await client.get(job["links"]["result"])
        failing = (await client.post("/v1/jobs", files={"picture": png}, data={"prompt": "fail"})).json()
        worker.work_off()
        failed = await client.get(failing["links"]["result"])
        path = await _done(client, worker, png)
        storage.delete_all(f"jobs/{path.split('/')[3]}/")
        removed = await client.get(path)
    kinds = [answer.json()["type"].rpartition(":")[2] for answer in (waiting, cancelled, failed, removed)]
    assert kinds == ["not-done", "no-result", "job-failed", "no-result"]
    assert [answer.status_code for answer in (waiting, cancelled, failed, removed)] == [409, 410, 409, 410]
    assert "retry-after" in waiting.headers


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.from_regex(r"bytes=(\d{0,4}-\d{0,4},?){1,2}", fullmatch=True))
def test_any_range_is_the_bytes_it_names_or_an_error(wanted: str) -> None:
    from starlette.requests import Request

    from serve.jobs import ResultFile
    from serve.problems import Problem
    from serve.results import _wanted_part

    result = ResultFile("r", "image/png", 1000, "0", (1, 1))
    request = Request({"type": "http", "headers": [(b"range", wanted.encode())]})
    part: tuple[int, int] | None = None
    with suppress(Problem):  # 416
        part = _wanted_part(request, result, {})
    if part is not None:
        start, end = part
        assert 0 <= start < end <= 1000

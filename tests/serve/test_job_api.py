from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import httpx
import pytest

from serve.access import AccessConfig
from serve.gateway import GatewayConfig
from serve.intake import IntakeConfig
from serve.jobs import JobState, KeyLimits

pytestmark = pytest.mark.anyio

MEGAPIXELS = 32 * 24 * 16 / 1e6
"""Of the result of the fixture `png` at the default scale of 4."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def worker(store: Any, storage: Any) -> Any:
    from fake_worker import FakeWorker

    return FakeWorker(store, storage, step_s=0.0)


def _kind(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return str(answer.json()["type"]).rpartition(":")[2]


async def test_a_job_goes_from_accepted_to_done(connect: Any, storage: Any, worker: Any, png: bytes) -> None:
    fields = {"scale": "3", "num_inference_steps": "4", "prompt": "A cat.", "output_format": "webp", "priority": "7"}
    async with connect() as client:
        answer = await client.post("/v1/jobs", files={"picture": png}, data=fields)
        job = answer.json()
        assert answer.status_code == 202
        assert answer.headers["location"] == job["links"]["self"] == f"/v1/jobs/{job['id']}"
        assert (job["state"], job["queue_position"], job["priority"], job["progress"]) == ("queued", 0, 7, 0.0)
        assert job["input"] == {"width": 32, "height": 24}
        assert job["request"]["prompt"] == "A cat."
        assert (job["result"], job["problem"], job["cost"]) == (None, None, None)
        assert storage.read_bytes(f"jobs/{job['id']}/input") == png
        assert worker.work_off() == 1
        job = (await client.get(job["links"]["self"])).json()
        assert (job["state"], job["progress"], job["step"], job["queue_position"]) == ("done", 1.0, 4, None)
        assert (job["result"]["width"], job["result"]["height"]) == (96, 72)
        assert job["result"]["media_type"] == "image/webp"
        assert job["cost"]["device_seconds"] >= 0
        assert (job["model_version"], job["manifest_digest"]) == ("fake/1", "sha256:fa4e")
        for name in ("submitted_at", "started_at", "ended_at", "expires_at"):
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", job[name])
        assert job["submitted_at"] <= job["started_at"] <= job["ended_at"] < job["expires_at"]
        assert (await client.get(job["result"]["url"])).content[8:12] == b"WEBP"


async def test_a_retry_storm_with_one_key_makes_one_job(
    serving: Any, store: Any, storage: Any, working: Any, png: bytes
) -> None:
    sent = {"Idempotency-Key": '"8e03978e-40d5-43e8-bc93-6894a57f9324"'}
    with serving() as url, working() as worker:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            storm = [client.post("/v1/jobs", files={"picture": png}, headers=sent) for _ in range(24)]
            answers = await asyncio.gather(*storm)
            (job_id,) = {answer.json()["id"] for answer in answers}
            assert {answer.status_code for answer in answers} == {202}
            assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
            assert len((await client.get("/v1/jobs")).json()["jobs"]) == 1
            await _ended(client, job_id)
            late = await client.post("/v1/jobs", files={"picture": png}, headers=sent)
            assert (late.json()["state"], late.headers["idempotency-replayed"]) == ("done", "true")
            assert worker.num_finished == 1
    assert {name.split("/")[1] for name in storage.list("jobs/")} == {job_id}


async def test_of_a_storm_only_one_request_is_counted(connect: Any, store: Any, png: bytes) -> None:
    _, token = store.create_key("a", limits=KeyLimits(megapixels_per_day=1.5 * MEGAPIXELS))
    async with connect(GatewayConfig(access=AccessConfig(mode="keys")), key=token) as client:
        sent = {"Idempotency-Key": "one"}
        storm = [client.post("/v1/jobs", files={"picture": png}, headers=sent) for _ in range(12)]
        assert {answer.status_code for answer in await asyncio.gather(*storm)} == {202}
        assert (await client.get("/v1/usage")).json()["today"]["requests"] == 1


async def _ended(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    ends_s = time.monotonic() + 20
    while (job := (await client.get(f"/v1/jobs/{job_id}")).json())["state"] in ("queued", "running"):
        assert time.monotonic() < ends_s
        await asyncio.sleep(0.02)
    return dict(job)


async def test_any_gateway_knows_the_jobs_of_every_other(serving: Any, working: Any, png: bytes) -> None:
    sent = {"Idempotency-Key": "one"}
    with serving() as first, serving() as second, working():
        async with httpx.AsyncClient(timeout=60) as client:
            storm = [client.post(f"{url}/v1/jobs", files={"picture": png}, headers=sent) for url in (first, second) * 6]
            (job_id,) = {answer.json()["id"] for answer in await asyncio.gather(*storm)}
            for url in (first, second):
                events = (await client.get(f"{url}/v1/jobs/{job_id}/events")).text
                assert "event: done" in events
            results = [await client.get(f"{url}/v1/jobs/{job_id}/result") for url in (first, second)]
    assert results[0].content == results[1].content
    assert results[0].headers["etag"] == results[1].headers["etag"]


async def test_one_key_with_another_body_is_refused(connect: Any, store: Any, storage: Any, png: bytes) -> None:
    sent = {"Idempotency-Key": "one"}
    async with connect() as client:
        job = (await client.post("/v1/jobs", files={"picture": png}, headers=sent)).json()
        for changed in ({"data": {"seed": "1"}}, {"data": {"priority": "1"}}, {"files": {"picture": png + b"\0"}}):
            again = await client.post("/v1/jobs", **{"files": {"picture": png}, **changed}, headers=sent)
            assert _kind(again, 422) == "idempotency-key-reused"
        for wrong in ("", "a b", "x" * 256, '"', "\t"):
            answer = await client.post("/v1/jobs", files={"picture": png}, headers={"Idempotency-Key": wrong})
            assert _kind(answer, 422) == "invalid-fields"
            assert answer.json()["errors"][0]["field"] == "Idempotency-Key"
    assert storage.list("jobs/") == [f"jobs/{job['id']}/input"]


async def test_a_job_is_accepted_only_with_a_whole_picture(connect: Any, storage: Any, store: Any, png: bytes) -> None:
    async with connect() as client:
        for broken, status in ((png[: len(png) // 2], 422), (b"GIF89a", 415), (b"", 415)):
            _kind(await client.post("/v1/jobs", files={"picture": broken}), status)
        _kind(await client.post("/v1/jobs", files={"picture": png}, data={"priority": "10"}), 422)
        answer = await client.post("/v1/jobs", files={"picture": png}, data={"webhook_url": "http://10.0.0.1/"})
        assert answer.json()["errors"][0]["field"] == "webhook_url"
        assert (await client.get("/v1/jobs")).json() == {"jobs": [], "next_cursor": None}
    assert storage.list("") == []


async def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_soon(
    connect: Any, store: Any, worker: Any, png: bytes
) -> None:
    async with connect() as client:
        first, second = [(await client.post("/v1/jobs", files={"picture": png})).json() for _ in range(2)]
        (running,) = store.claim("replica", lease_s=60, max_megapixels=1e6, max_jobs=1)
        waiting = second if running.id == first["id"] else first
        answer = await client.delete(waiting["links"]["cancel"])
        assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
        assert (await client.delete(waiting["links"]["cancel"])).status_code == 200
        answer = await client.delete(f"/v1/jobs/{running.id}")
        assert (answer.status_code, answer.json()["state"]) == (202, "running")
        assert store.heartbeat("replica", [], 60).cancelled == {running.id}
        assert store.cancelled(running.id, "replica", running.attempt)
        assert (await client.get(f"/v1/jobs/{running.id}")).json()["state"] == "cancelled"
        done = (await client.post("/v1/jobs", files={"picture": png})).json()
        worker.work_off()
        assert _kind(await client.delete(done["links"]["cancel"]), 409) == "already-ended"


async def test_jobs_are_listed_newest_first_page_by_page(connect: Any, worker: Any, png: bytes) -> None:
    async with connect() as client:
        ids = [(await client.post("/v1/jobs", files={"picture": png})).json()["id"] for _ in range(5)]
        found: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            page = (await client.get("/v1/jobs", params={"limit": 2, **cursor})).json()
            assert len(page["jobs"]) <= 2
            found += [job["id"] for job in page["jobs"]]
            if page["next_cursor"] is None:
                break
            cursor = {"cursor": page["next_cursor"]}
        assert found == ids[::-1]
        await client.delete(f"/v1/jobs/{ids[0]}")
        (cancelled,) = (await client.get("/v1/jobs", params={"state": "cancelled"})).json()["jobs"]
        assert cancelled["id"] == ids[0]
        positions = {job["id"]: job["queue_position"] for job in (await client.get("/v1/jobs")).json()["jobs"]}
        assert positions == {ids[0]: None, ids[1]: 0, ids[2]: 1, ids[3]: 2, ids[4]: 3}
        for wrong in ({"state": "lost"}, {"limit": 0}, {"limit": 101}, {"cursor": "'; drop"}, {"limit": "x"}):
            _kind(await client.get("/v1/jobs", params=wrong), 422)


@pytest.mark.parametrize(
    "job_id", ["0" * 32, "x", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%00", "'%20or%201=1", "a" * 5000]
)
async def test_what_is_no_job_is_a_404(connect: Any, job_id: str) -> None:
    async with connect() as client:
        for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/events", f"/v1/jobs/{job_id}/result"):
            _kind(await client.get(path), 404)
        _kind(await client.delete(f"/v1/jobs/{job_id}"), 404)


async def test_a_failed_job_tells_its_problem(connect: Any, worker: Any, png: bytes) -> None:
    async with connect() as client:
        job = (await client.post("/v1/jobs", files={"picture": png}, data={"prompt": "fail"})).json()
        worker.work_off()
        job = (await client.get(job["links"]["self"])).json()
    assert job["state"] == JobState.FAILED
    assert job["problem"]["type"] == "urn:faithdiff:problem:refused-by-model"
    assert job["problem"]["instance"] == job["links"]["self"]
    assert job["result"] is None


async def test_a_full_queue_answers_503_and_when_to_come_again(connect: Any, worker: Any, png: bytes) -> None:
    worker.report(rate=MEGAPIXELS * 20 / 10)  # ten seconds for one picture
    cfg = GatewayConfig(intake=IntakeConfig(max_queued_megapixels=2.5 * MEGAPIXELS))
    async with connect(cfg) as client:
        sent = {"Idempotency-Key": "first"}
        answers = [await client.post("/v1/jobs", files={"picture": png}, headers=sent)]
        answers += [await client.post("/v1/jobs", files={"picture": png}) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [202, 202, 503]
        assert _kind(answers[2], 503) == "queue-full"
        assert 4 <= int(answers[2].headers["retry-after"]) <= 6  # until half a picture is worked off
        # What was accepted before is answered however full it is.
        assert (await client.post("/v1/jobs", files={"picture": png}, headers=sent)).status_code == 202
        worker.work_off()
        assert (await client.post("/v1/jobs", files={"picture": png})).status_code == 202


async def test_one_key_cannot_fill_the_queue(connect: Any, store: Any, png: bytes) -> None:
    tokens = [store.create_key(name, limits=KeyLimits())[1] for name in ("greedy", "other")]
    cfg = GatewayConfig(
        access=AccessConfig(mode="keys"), intake=IntakeConfig(max_queued_megapixels_per_key=1.5 * MEGAPIXELS)
    )
    async with connect(cfg, key=tokens[0]) as greedy, connect(cfg, key=tokens[1]) as other:
        assert (await greedy.post("/v1/jobs", files={"picture": png})).status_code == 202
        refused = await greedy.post("/v1/jobs", files={"picture": png})
        assert _kind(refused, 429) == "key-queue-full"
        assert int(refused.headers["retry-after"]) >= 1
        assert (await other.post("/v1/jobs", files={"picture": png})).status_code == 202


async def test_a_picture_larger_than_the_queue_is_let_in_alone(connect: Any, png: bytes) -> None:
    cfg = GatewayConfig(intake=IntakeConfig(max_queued_megapixels=MEGAPIXELS / 2))
    async with connect(cfg) as client:
        assert (await client.post("/v1/jobs", files={"picture": png})).status_code == 202


async def test_a_trace_that_came_with_the_request_is_that_of_the_job(connect: Any, store: Any, png: bytes) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    async with connect() as client:
        sent = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
        answer = await client.post("/v1/jobs", files={"picture": png}, headers=sent)
    assert answer.headers["traceparent"].split("-")[1] == trace_id
    assert store.get(answer.json()["id"], None).trace_id == trace_id


async def test_an_outage_of_the_database_is_a_503(connect: Any, store: Any, png: bytes, monkeypatch: Any) -> None:
    from sqlalchemy.exc import OperationalError

    def is_away(*_: Any, **__: Any) -> None:
        raise OperationalError("select secret", {}, Exception("password=hush"))

    async with connect() as client:
        monkeypatch.setattr(store, "submit", is_away)
        answer = await client.post("/v1/jobs", files={"picture": png})
    assert _kind(answer, 503) == "outage"
    assert "retry-after" in answer.headers
    assert "hush" not in answer.text

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from serve.estimate import Rates
from serve.events import JobWatcher, event_stream
from serve.gateway import GatewayConfig
from serve.jobs import JobState

pytestmark = pytest.mark.anyio

CFG = GatewayConfig(events_poll_s=0.02)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Event:
    name: str
    id: str
    data: dict[str, Any]


async def _events(client: httpx.AsyncClient, path: str, last_event_id: str = "") -> AsyncIterator[Event]:
    """Of a real stream, parsed as the standard says."""
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    async with client.stream("GET", path, headers=headers, timeout=30) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        fields: dict[str, str] = {}
        async for line in answer.aiter_lines():
            if line:
                name, _, value = line.partition(":")
                fields[name] = value.removeprefix(" ")
            elif "data" in fields:
                yield Event(fields["event"], fields["id"], json.loads(fields["data"]))
                fields = {}


async def test_a_stream_tells_everything_from_the_queue_to_the_end(serving: Any, working: Any, png: bytes) -> None:
    with serving(CFG) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            job = (await client.post("/v1/jobs", files={"picture": png})).json()
            events: list[Event] = []
            with working(step_s=0.03):
                async for event in _events(client, job["links"]["events"]):
                    events.append(event)
            whole = (await client.get(job["links"]["self"])).json()
    *progress, last = events
    assert (last.name, last.id, last.data) == ("done", "ended", whole)
    assert {event.name for event in progress} == {"progress"}
    assert progress[0].data["state"] in ("queued", "running")
    steps = [event.data["step"] for event in progress]
    assert steps == sorted(steps)
    assert len(set(steps)) > 3
    assert {event.data["num_steps"] for event in progress if event.data["state"] == "running"} == {20}
    previews = [event.data["preview"] for event in progress if "preview" in event.data]
    assert previews
    for preview in previews:
        assert base64.b64decode(preview.removeprefix("data:image/webp;base64,"))[8:12] == b"WEBP"


async def test_who_comes_back_gets_the_current_state_first_and_no_preview_twice(
    serving: Any, store: Any, working: Any, png: bytes
) -> None:
    with serving(CFG) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            job = (await client.post("/v1/jobs", files={"picture": png})).json()
            path = job["links"]["events"]
            first = await anext(aiter(_events(client, path)))
            assert first.data | {"preview": None} == {
                "state": "queued", "phase": "queued", "queue_position": 0, "step": 0,
                "num_steps": first.data["num_steps"], "progress": 0.0, "preview": None,
            }  # fmt: skip
            again = await anext(aiter(_events(client, path, first.id)))
            assert again == first
            (claimed,) = store.claim("r", lease_s=60, max_megapixels=1e6, max_jobs=1)
            from serve.jobs import Progress

            store.heartbeat("r", [Progress(claimed.id, claimed.attempt, "denoise", 3, 20, b"webp", 3)], 60)
            seen = await anext(aiter(_events(client, path, first.id)))
            assert (seen.data["step"], "preview" in seen.data) == (3, True)
            unchanged = await anext(aiter(_events(client, path, seen.id)))
            assert (unchanged.data["step"], "preview" in unchanged.data) == (3, False)
            store.heartbeat("r", [Progress(claimed.id, claimed.attempt, "denoise", 4, 20, b"webp2", 4)], 60)
            newer = await anext(aiter(_events(client, path, seen.id)))
            assert (newer.data["step"], "preview" in newer.data) == (4, True)


@pytest.mark.parametrize("end", ["done", "failed", "cancelled"])
async def test_a_stream_of_a_job_that_has_ended_is_its_last_event(
    connect: Any, store: Any, storage: Any, png: bytes, end: str
) -> None:
    from fake_worker import FakeWorker

    async with connect(CFG) as client:
        prompt = {"prompt": "fail" if end == "failed" else ""}
        job = (await client.post("/v1/jobs", files={"picture": png}, data=prompt)).json()
        if end == "cancelled":
            await client.delete(job["links"]["cancel"])
        FakeWorker(store, storage, step_s=0.0).work_off()
        (event,) = [event async for event in _events(client, job["links"]["events"])]
        assert (event.name, event.data["state"], event.id) == (end, end, "ended")
        again = await client.get(job["links"]["events"], headers={"Last-Event-ID": "ended"})
        assert (again.status_code, again.content) == (204, b"")


async def test_a_job_that_is_removed_meanwhile_has_expired(connect: Any, store: Any, png: bytes) -> None:
    async with connect(CFG) as client:
        job = store.get((await client.post("/v1/jobs", files={"picture": png})).json()["id"], None)
    watcher = JobWatcher(store, poll_s=0.01)
    stream = event_stream(watcher, job, Rates(), last_event_id="", longest_s=20, idle_s=5)
    events = [await anext(stream)]
    store.forget(job.id)
    events += [event async for event in stream]
    assert events[-1].startswith(b"event: expired\nid: ended\nretry: 1000\n")
    assert json.loads(events[-1].split(b"data: ")[1])["id"] == job.id


class CountingStore:
    """Counts the queries of pollers."""

    def __init__(self, store: Any) -> None:
        self.store, self.num_looks, self.asked = store, 0, set[int]()
        self.changes = store.changes

    def watch(self, job_ids: Any) -> Any:
        self.num_looks += 1
        self.asked.add(len(job_ids))
        return self.store.watch(job_ids)

    def queue_position(self, job_ids: Any) -> Any:
        return self.store.queue_position(job_ids)


async def test_all_streams_of_a_process_share_one_poller(connect: Any, store: Any, png: bytes) -> None:
    async with connect(CFG) as client:
        jobs = [store.get((await client.post("/v1/jobs", files={"picture": png})).json()["id"], None) for _ in range(3)]
    counting = CountingStore(store)
    watcher = JobWatcher(counting, poll_s=0.05)  # type: ignore[arg-type]
    streams = [
        event_stream(watcher, jobs[i % 3], Rates(), last_event_id="", longest_s=0.5, idle_s=0.2) for i in range(30)
    ]

    async def drained(stream: AsyncIterator[bytes]) -> list[bytes]:
        return [event async for event in stream]

    told = await asyncio.gather(*(drained(stream) for stream in streams))
    assert all(any(event.startswith(b"event: progress") for event in events) for events in told)
    assert all(b": still here\n\n" in events for events in told)
    assert counting.num_looks < 30
    assert max(counting.asked) == 3
    assert watcher.num_streams == 0
    await asyncio.sleep(0.2)
    num_looks = counting.num_looks
    await asyncio.sleep(0.2)
    assert counting.num_looks == num_looks, "nobody watches any more"


async def test_a_stream_tells_a_change_though_it_would_look_only_later(
    connect: Any, store: Any, storage: Any, png: bytes
) -> None:
    from fake_worker import FakeWorker

    async with connect(CFG) as client:
        job = store.get((await client.post("/v1/jobs", files={"picture": png})).json()["id"], None)
    stream = event_stream(JobWatcher(store, poll_s=60.0), job, Rates(), last_event_id="", longest_s=20, idle_s=20)
    async with asyncio.timeout(20):
        assert (await anext(stream)).startswith(b"event: progress")
        await asyncio.to_thread(FakeWorker(store, storage, step_s=0.0).work_off)
        assert [event async for event in stream][-1].startswith(b"event: done")


async def test_who_begins_to_follow_need_not_wait_for_the_next_look(connect: Any, store: Any, png: bytes) -> None:
    async with connect(CFG) as client:
        jobs = [store.get((await client.post("/v1/jobs", files={"picture": png})).json()["id"], None) for _ in range(2)]
    watcher = JobWatcher(store, poll_s=60.0)
    async with asyncio.timeout(20):
        for job in jobs:
            stream = event_stream(watcher, job, Rates(), last_event_id="", longest_s=20, idle_s=20)
            assert (await anext(stream)).startswith(b"event: progress")


async def test_a_stream_outlives_a_database_that_is_away(
    connect: Any, store: Any, png: bytes, monkeypatch: Any
) -> None:
    async with connect(CFG) as client:
        job = store.get((await client.post("/v1/jobs", files={"picture": png})).json()["id"], None)
    watch, num_failures = store.watch, 0

    def unsteady(job_ids: Any) -> Any:
        nonlocal num_failures
        num_failures += 1
        if num_failures < 4:
            raise RuntimeError("away")
        return watch(job_ids)

    monkeypatch.setattr(store, "watch", unsteady)
    stream = event_stream(JobWatcher(store, poll_s=0.01), job, Rates(), last_event_id="", longest_s=20, idle_s=20)
    assert (await anext(stream)).startswith(b"event: progress")
    assert num_failures == 4
    await stream.aclose()


async def test_a_client_that_goes_away_leaves_nothing_behind(serving: Any, store: Any, png: bytes) -> None:
    with serving(CFG) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            job = (await client.post("/v1/jobs", files={"picture": png})).json()
            stream = _events(client, job["links"]["events"])
            await anext(aiter(stream))
            await stream.aclose()
            assert (await client.get("/healthz")).status_code == 200
            assert store.get(job["id"], None).state is JobState.QUEUED

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from prometheus_client.parser import text_string_to_metric_families

from serve import measurements
from serve.measurements import cause_of, size_class
from serve.metrics import MetricsConfig, install_metrics, note_size
from serve.problems import Problem, install_handlers

TOKEN = "scrape-me-9f31"  # noqa: S105
WITH_TOKEN = {"token_sha256": hashlib.sha256(TOKEN.encode()).hexdigest()}


@dataclass
class FakeBacklog:
    num_queued: int = 3
    num_running: int = 2
    megapixels: float = 12.5
    work: float = 250.0
    oldest_queued_s: float = 41.0


def small_api(cfg: MetricsConfig | None = None, **sources: Any) -> FastAPI:
    """Routes as the gateway has them, counted."""
    api = FastAPI()
    install_handlers(api)

    @api.post("/v1/upscale")
    async def upscale(request: Request, megapixels: float) -> str:
        note_size(request, megapixels)
        return "a picture"

    @api.get("/v1/jobs/{job_id}")
    async def job(job_id: str) -> str:
        raise Problem(404, "no-such-job", job_id)

    @api.get("/v1/jobs/{job_id}/events")
    async def events(job_id: str) -> StreamingResponse:
        async def stream() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b": still here\n\n"
                await asyncio.sleep(0.1)

        return StreamingResponse(stream(), media_type="text/event-stream")

    @api.get("/broken")
    async def broken() -> str:
        raise RuntimeError("nobody foresaw this")

    install_metrics(api, cfg or MetricsConfig(), process="gateway", **sources)
    return api


@asynccontextmanager
async def client_of(api: FastAPI, host: str = "127.0.0.1") -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(api, raise_app_exceptions=False, client=(host, 4711))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def value(text: str, name: str, **labels: str) -> float:
    """Of the one series of that name with (at least) these labels."""
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, f"{name} {labels}: {len(found)} series"
    return found[0]


async def scrape(client: httpx.AsyncClient, **kwargs: Any) -> str:
    response = await client.get("/metrics", **kwargs)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return response.text


@pytest.mark.parametrize(("megapixels", "name"), [
    (0.1, "small"), (1.0, "small"), (1.1, "medium"), (8.0, "medium"), (31.0, "large"), (500.0, "huge"),
])  # fmt: skip
def test_size_classes_by_megapixels_of_the_result(megapixels: float, name: str) -> None:
    assert size_class(megapixels) == name


def test_a_cause_is_the_last_part_of_a_problems_type() -> None:
    assert cause_of(Problem(422, "refused-by-model", "no").body("/")) == "refused-by-model"
    assert cause_of(None) == "none"


async def _difference(api: FastAPI, calls: list[tuple[str, str]], name: str, **labels: str) -> float:
    """How much a series grows by these calls; what is not there yet is zero."""
    async with client_of(api) as client:
        before = await scrape(client)
        for method, path in calls:
            await client.request(method, path)
        after = await scrape(client)
    is_new = f"{name}{{" not in before or not _has(before, name, labels)
    return value(after, name, **labels) - (0.0 if is_new else value(before, name, **labels))


def _has(text: str, name: str, labels: Mapping[str, str]) -> bool:
    families = text_string_to_metric_families(text)
    return any(s.name == name and labels.items() <= s.labels.items() for family in families for s in family.samples)


@pytest.mark.parametrize(("calls", "labels"), [
    ([("POST", "/v1/upscale?megapixels=4")] * 2, {"route": "/v1/upscale", "status": "200"}),
    ([("GET", "/v1/jobs/a"), ("GET", "/v1/jobs/b")], {"route": "/v1/jobs/{job_id}", "status": "404"}),
    ([("GET", "/broken")] * 2, {"route": "/broken", "status": "500"}),
    ([("GET", "/wp-admin.php"), ("GET", "/../etc/passwd")], {"route": "unknown", "status": "404"}),
])  # fmt: skip
def test_requests_are_counted_by_pattern_and_status_not_by_path(
    calls: list[tuple[str, str]], labels: dict[str, str]
) -> None:
    assert asyncio.run(_difference(small_api(), calls, "faithdiff_requests_total", **labels)) == 2


def test_latency_is_counted_by_the_size_of_the_result() -> None:
    calls = [("POST", "/v1/upscale?megapixels=4")] * 2 + [("POST", "/v1/upscale?megapixels=0.2")]
    for size, grows in (("medium", 2), ("small", 1), ("huge", 0)):
        name, labels = "faithdiff_request_seconds_count", {"route": "/v1/upscale", "size_class": size}
        assert asyncio.run(_difference(small_api(), calls, name, **labels)) == grows


def test_a_stream_of_events_counts_up_to_its_first_byte() -> None:
    grown = _difference(
        small_api(), [("GET", "/v1/jobs/a/events")], "faithdiff_request_seconds_sum", route="/v1/jobs/{job_id}/events"
    )
    assert 0 < asyncio.run(grown) < 0.25


def test_what_the_database_and_serve_know_is_read_at_each_scrape() -> None:
    states = {"RUNNING": 2, "STARTING": 1}
    api = small_api(backlog=FakeBacklog, replica_states=lambda: states)

    async def twice() -> tuple[str, str]:
        async with client_of(api) as client:
            first = await scrape(client)
            states["RUNNING"] = 0
            return first, await scrape(client)

    first, second = asyncio.run(twice())
    assert value(first, "faithdiff_jobs", state="queued") == 3
    assert value(first, "faithdiff_queued_megapixels") == 12.5
    assert value(first, "faithdiff_oldest_queued_seconds") == 41.0
    assert value(first, "faithdiff_store_up") == 1
    assert value(first, "faithdiff_replicas", state="running") == 2
    assert value(second, "faithdiff_replicas", state="running") == 0
    assert value(second, "faithdiff_replicas", state="starting") == 1


def test_a_database_that_is_away_is_told_and_the_rest_still_shown() -> None:
    def away() -> FakeBacklog:
        raise ConnectionError("postgresql://me:hunter2@db is away")

    async def one() -> str:
        async with client_of(small_api(backlog=FakeBacklog)) as client:
            await scrape(client)
        async with client_of(small_api(backlog=away)) as client:
            return await scrape(client)

    text = asyncio.run(one())
    assert value(text, "faithdiff_store_up") == 0
    assert "faithdiff_jobs{" not in text
    assert "faithdiff_queued_megapixels NaN" in text
    assert "faithdiff_steps_total" in text
    assert "hunter2" not in text


@pytest.mark.parametrize(("cfg", "host", "headers", "status"), [
    ({}, "127.0.0.1", {}, 200),
    ({}, "::1", {}, 200),
    ({}, "10.0.0.7", {}, 403),
    ({}, "127.0.0.1", {"X-Forwarded-For": "10.0.0.7"}, 403),
    ({}, "10.0.0.7", {"Authorization": f"Bearer {TOKEN}"}, 403),
    (WITH_TOKEN, "10.0.0.7", {"Authorization": f"Bearer {TOKEN}"}, 200),
    (WITH_TOKEN, "127.0.0.1", {}, 401),
    (WITH_TOKEN, "127.0.0.1", {"Authorization": "Bearer other"}, 401),
    (WITH_TOKEN, "127.0.0.1", {"Authorization": TOKEN}, 401),
])  # fmt: skip
def test_only_this_machine_or_the_token_may_read(
    cfg: dict[str, Any], host: str, headers: dict[str, str], status: int
) -> None:
    async def ask() -> httpx.Response:
        async with client_of(small_api(MetricsConfig.model_validate(cfg)), host) as client:
            return await client.get("/metrics", headers=headers)

    response = asyncio.run(ask())
    assert response.status_code == status
    assert TOKEN not in response.text
    if status != 200:
        assert response.headers["content-type"] == "application/problem+json"
        assert "faithdiff_steps" not in response.text


def test_every_function_counts_what_it_says() -> None:
    async def scraped() -> str:
        async with client_of(small_api()) as client:
            return await scrape(client)

    before = asyncio.run(scraped())
    measurements.count_upload(1000)
    measurements.count_refusal("queue-full")
    measurements.count_webhook("delivered")
    measurements.count_takeover()
    measurements.observe_queue(0.5, 2.0)
    measurements.observe_end("done", megapixels=2.0, seconds=9.0)
    measurements.observe_end("failed", megapixels=2.0, seconds=1.0, cause="refused-by-model")
    measurements.observe_device("denoise", 1.5)
    measurements.observe_pass(6, 8, 0.2)
    measurements.count_step(1.5)
    measurements.set_load({"denoise": 2}, megapixels=4.0, free_megapixels=60.0)
    measurements.set_gpu_memory(used_bytes=10, total_bytes=80)
    measurements.set_cold_start(download_s=1.0, load_s=2.0, compile_s=3.0)
    measurements.set_model("models:/faithdiff@champion", "7")
    measurements.set_model("models:/faithdiff@champion", "8")
    after = asyncio.run(scraped())
    grown = {
        ("faithdiff_upload_bytes_total", ""): 1000,
        ("faithdiff_webhooks_total", "delivered"): 1,
        ("faithdiff_takeovers_total", ""): 1,
        ("faithdiff_queue_seconds_count", "small"): 1,
        ("faithdiff_picture_seconds_sum", "medium"): 9.0,
        ("faithdiff_pictures_total", "done"): 1,
        ("faithdiff_pixels_total", ""): 2e6,
        ("faithdiff_device_seconds_total", "denoise"): 1.5,
        ("faithdiff_steps_total", ""): 1,
        ("faithdiff_megapixel_steps_total", ""): 1.5,
        ("faithdiff_batch_tiles_total", ""): 6,
        ("faithdiff_batch_slots_total", ""): 8,
        ("faithdiff_pass_seconds_count", ""): 1,
    }
    names = {
        "faithdiff_webhooks_total": "outcome",
        "faithdiff_pictures_total": "state",
        "faithdiff_device_seconds_total": "phase",
    }
    for (name, label), expected in grown.items():
        labels = {names.get(name, "size_class"): label} if label else {}
        assert value(after, name, **labels) - value(before, name, **labels) == pytest.approx(expected), name
    assert value(after, "faithdiff_pictures_total", cause="refused-by-model") >= 1
    assert value(after, "faithdiff_refusals_total", reason="queue-full") >= 1
    assert value(after, "faithdiff_entries", phase="denoise") == 2
    assert value(after, "faithdiff_entries", phase="decode") == 0
    assert value(after, "faithdiff_cold_start_seconds", part="compile") == 3.0
    assert value(after, "faithdiff_model_info") == 1
    assert value(after, "faithdiff_model_info", version="8") == 1


def test_counting_is_never_in_the_way_of_a_step() -> None:
    """A step takes milliseconds at least; the bound leaves a loaded machine a factor of ten."""
    times_s = []
    for _ in range(2000):
        start_s = time.perf_counter()
        measurements.observe_device("denoise", 0.2)
        measurements.observe_pass(6, 8, 0.2)
        measurements.count_step(1.5)
        times_s.append(time.perf_counter() - start_s)
    assert sorted(times_s)[1000] < 100e-6

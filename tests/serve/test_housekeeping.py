from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import http.server
import json
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from serve.estimate import Rates
from serve.gateway import GatewayConfig
from serve.housekeeping import Housekeeper, HousekeepingConfig, created_at
from serve.job_tables import jobs
from serve.jobs import JobStore, new_job_id
from serve.webhooks import WebhookConfig, WebhookSender

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Hooks(http.server.ThreadingHTTPServer):
    """A real server of a client; fails as often as `num_failures` says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hook)
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.num_failures = 0
        self.host = f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.host}/hook"


class _Hook(http.server.BaseHTTPRequestHandler):
    server: Hooks

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(({**self.headers}, body))
        self.send_response(500 if len(self.server.received) <= self.server.num_failures else 204)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hooks() -> Iterator[Hooks]:
    server = Hooks()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _config(hooks: Hooks, tmp_path: Path, **settings: Any) -> GatewayConfig:
    (tmp_path / "secret").write_text("a secret of more than sixteen bytes")
    webhooks = WebhookConfig(
        allowed_hosts=(hooks.host,), private_hosts=(hooks.host,), secret_path=tmp_path / "secret",
        retry_delays_s=(0.05, 0.05, 0.05),
    )  # fmt: skip
    return GatewayConfig(webhooks=webhooks, housekeeping=HousekeepingConfig(every_s=0.05, **settings))


async def test_a_webhook_tells_the_end_of_a_job_again_and_again_until_heard(
    serving: Any, working: Any, hooks: Hooks, tmp_path: Path, png: bytes
) -> None:
    hooks.num_failures = 2
    with serving(_config(hooks, tmp_path)) as url, working():
        async with httpx.AsyncClient(base_url=url) as client:
            fields = {"webhook_url": hooks.url, "num_inference_steps": "2"}
            job = (await client.post("/v1/jobs", files={"picture": png}, data=fields)).json()
            await _until(lambda: len(hooks.received) == 3)
            document = (await client.get("/openapi.json")).json()
            secret = (await client.get("/v1/webhook-secret")).json()["secret"]
            await asyncio.sleep(0.3)
            whole = (await client.get(job["links"]["self"])).json()
    assert len(hooks.received) == 3, "what was heard is not told again"
    assert len({headers["webhook-id"] for headers, _ in hooks.received}) == 1
    for headers, body in hooks.received:
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        key = base64.b64decode(secret.removeprefix("whsec_"))
        expected = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"
    event = json.loads(hooks.received[-1][1])
    assert "job-ended" in document["webhooks"]
    assert event == {"type": "job.done", "timestamp": whole["ended_at"], "data": whole}


async def test_a_webhook_nobody_hears_is_given_up(
    serving: Any, working: Any, hooks: Hooks, tmp_path: Path, png: bytes
) -> None:
    hooks.num_failures = 99
    with serving(_config(hooks, tmp_path)) as url, working():
        async with httpx.AsyncClient(base_url=url) as client:
            fields = {"webhook_url": hooks.url, "num_inference_steps": "1", "prompt": "fail"}
            await client.post("/v1/jobs", files={"picture": png}, data=fields)
            await _until(lambda: len(hooks.received) == 4)
            await asyncio.sleep(0.4)
    assert len(hooks.received) == 4, "once, and again after each of three waits"
    assert json.loads(hooks.received[0][1])["type"] == "job.failed"


async def test_two_gateways_tell_a_webhook_once(
    store: Any, storage: Any, connect: Any, hooks: Hooks, tmp_path: Path, png: bytes
) -> None:
    cfg = _config(hooks, tmp_path)
    async with connect(cfg) as client:
        for _ in range(5):
            fields = {"webhook_url": hooks.url}
            job = (await client.post("/v1/jobs", files={"picture": png}, data=fields)).json()
            await client.delete(job["links"]["cancel"])
    keepers = [Housekeeper(cfg.housekeeping, store, storage, WebhookSender(cfg.webhooks), Rates()) for _ in range(3)]
    await asyncio.gather(*(keeper.deliver() for keeper in keepers))
    assert len({headers["webhook-id"] for headers, _ in hooks.received}) == len(hooks.received) == 5
    assert {json.loads(body)["type"] for _, body in hooks.received} == {"job.cancelled"}


async def test_jobs_expire_with_their_files(connect: Any, store: Any, storage: Any, png: bytes) -> None:
    from fake_worker import FakeWorker

    async with connect() as client:
        short, lasting = [(await client.post("/v1/jobs", files={"picture": png})).json() for _ in range(2)]
        FakeWorker(store, storage, step_s=0.0).work_off()
        assert len(storage.list("jobs/")) == 4
        with store._writing() as transaction:
            transaction.execute(update(jobs).where(jobs.c.id == short["id"]).values(expires_at=time.time()))
        keeper, other = (_keeper(store, storage) for _ in range(2))
        assert await keeper.expire() == 1
        assert await other.expire() == 0, "one gateway has the lease"
        assert (await client.get(short["links"]["self"])).status_code == 404
        assert (await client.get(lasting["links"]["result"])).status_code == 200
    assert {name.split("/")[1] for name in storage.list("jobs/")} == {lasting["id"]}


async def test_a_job_nobody_works_off_in_its_time_fails(connect: Any, store: Any, storage: Any, png: bytes) -> None:
    async with connect(GatewayConfig(job_ttl_s=0.1)) as client:
        job = (await client.post("/v1/jobs", files={"picture": png})).json()
        await asyncio.sleep(0.1)
        assert await _keeper(store, storage).expire() == 0
        job = (await client.get(job["links"]["self"])).json()
    assert (job["state"], job["problem"]["title"]) == ("failed", "Waited too long")
    assert storage.list("jobs/") == [f"jobs/{job['id']}/input"]


async def test_files_without_a_job_are_removed_when_they_are_old(
    connect: Any, store: Any, storage: Any, png: bytes
) -> None:
    old = uuid.UUID(int=(int((time.time() - 3700) * 1000) << 80) | (7 << 76) | (2 << 62)).hex
    young = new_job_id()
    for name in (f"jobs/{old}/input", f"jobs/{old}/result-1", f"jobs/{young}/input", "jobs/strange/file", "other/file"):
        storage.write_bytes_atomic(name, b"x")
    async with connect() as client:
        job = (await client.post("/v1/jobs", files={"picture": png})).json()
    assert await _keeper(store, storage).sweep() == 1
    kept = [f"jobs/{young}/input", f"jobs/{job['id']}/input", "jobs/strange/file", "other/file"]
    assert storage.list("") == sorted(kept)
    assert await _keeper(store, storage, orphans_last_s=0).sweep() == 0, "another gateway has the lease"


def test_ids_tell_when_they_were_made() -> None:
    assert abs(created_at(new_job_id()) - time.time()) < 1
    for strange in ("x", "", "0" * 32, uuid.uuid4().hex):
        assert created_at(strange) == float("inf")


async def test_the_loop_goes_on_after_failures(store: Any, storage: Any, monkeypatch: Any) -> None:
    num_calls = 0

    def fails(*_: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        raise RuntimeError("away")

    monkeypatch.setattr(store, "expired", fails)
    async with _keeper(store, storage, expire_every_s=0.01):
        await _until(lambda: num_calls >= 3)


def _keeper(store: JobStore, storage: Any, **settings: Any) -> Housekeeper:
    return Housekeeper(HousekeepingConfig(**settings), store, storage, WebhookSender(WebhookConfig()), Rates())


async def _until(is_true: Any, timeout_s: float = 20.0) -> None:
    ends_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < ends_s
        await asyncio.sleep(0.01)

"""Jobs under load, behind HAProxy as on a cluster, while replicas, gateways and nodes are killed and the application is
restarted; clients count.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(1500)]

NUM_JOBS, NUM_CLIENTS = 200, 16
SIDES_PX = (32, 32, 48, 64, 32, 96)
STEPS = {32: 8, 48: 8, 64: 10, 96: 12}


class Listener:
    """A webhook receiver: which ids have come for which job."""

    def __init__(self) -> None:
        self.ids: dict[str, set[str]] = {}
        listener = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                listener.ids.setdefault(body["data"]["id"], set()).add(self.headers["webhook-id"])
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Service:
    """The application on a cluster of a head without CPUs and two nodes that can be killed."""

    def __init__(self, folder: Path, hook_port: int) -> None:
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        self.nodes = [self.cluster.add_node(num_cpus=3) for _ in range(2)]
        ray.init(address=self.cluster.address, namespace="chaos", log_to_driver=False)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port: int = listener.getsockname()[1]
        secret = folder / "secret"
        secret.write_bytes(b"a secret of sixteen bytes or more")
        hook_host = f"127.0.0.1:{hook_port}"
        self.cfg = {
            "restorer": {
                "num_replicas": 2,
                "num_cpus": 1,
                "tile_px": 64,
                "drain_s": 10,
                "engine": {"memory_bytes": 1_500_000_000},
                "claims": {"lease_s": 6, "heartbeat_s": 0.3, "poll_s": 0.2, "snapshot_every_s": 0.5},
                "spread": {"above_megapixels": 0.008},
            },
            "gateway": {
                "num_replicas": 2,
                "store_url": f"sqlite:///{folder}/jobs.db",
                "storage_uri": str(folder / "files"),
                "events_poll_s": 0.2,
                "webhooks": {
                    "allowed_hosts": [hook_host],
                    "private_hosts": [hook_host],
                    "secret_path": str(secret),
                    "retry_delays_s": [0.5] * 20,
                },
            },
        }
        serve.start(
            proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": self.port, "request_timeout_s": 300}
        )
        self.deploy()

    def deploy(self) -> None:
        from ray import serve

        from serve.app import ServeConfig, build_app

        serve.run(build_app(ServeConfig.model_validate(self.cfg)), name="faithdiff", route_prefix="/")

    def restart(self) -> None:
        from ray import serve

        serve.delete("faithdiff")
        self.deploy()

    def kill_one(self, deployment: str) -> None:
        import ray

        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        found = sorted(name for name in names if f"faithdiff#{deployment}#" in name)
        if found:
            ray.kill(ray.get_actor(found[0], namespace="serve"))

    def kill_a_node(self) -> None:
        """And adds another in its place, as an autoscaler would."""
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=3))

    def num_taken_over(self) -> int:
        """Jobs that more than one attempt was made at."""
        from serve.jobs import JobStore

        store = JobStore(self.cfg["gateway"]["store_url"])
        jobs = store.list("anybody", limit=NUM_JOBS)
        return sum(job.attempt > 1 for job in jobs)

    def close(self) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.server.shutdown()


@pytest.fixture
def service(
    tmp_path: Path, listener: Listener, haproxy_variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    for name, value in haproxy_variables.items():
        monkeypatch.setenv(name, value)
    made = Service(tmp_path, listener.port)
    yield made
    made.close()


def _png(side_px: int) -> bytes:
    buffer = BytesIO()
    pixels = np.random.default_rng(side_px).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Client:
    """Sends a job until it is accepted and asks until it has ended, as often as it takes."""

    def __init__(self, url: str, hook: str) -> None:
        self._http, self._hook = httpx.Client(base_url=url, timeout=30), hook
        self.num_retries = 0
        self.sent_twice: list[str] = []

    def run(self, number: int) -> dict[str, Any]:
        side_px, key = SIDES_PX[number % len(SIDES_PX)], str(uuid.uuid4())
        fields = {"scale": "1", "num_inference_steps": str(STEPS[side_px]), "webhook_url": self._hook}
        request = {"files": {"picture": _png(side_px)}, "data": fields, "headers": {"Idempotency-Key": key}}
        job_id = self._until(202, "POST", "/v1/jobs", **request).json()["id"]
        if number % 5 == 0:  # an impatient client
            assert self._until(202, "POST", "/v1/jobs", **request).json()["id"] == job_id
        while (job := self._until(200, "GET", f"/v1/jobs/{job_id}").json())["state"] in ("queued", "running"):
            time.sleep(0.2)
        if job["state"] == "done":
            content = self._until(200, "GET", f"/v1/jobs/{job_id}/result").content
            job["pixels"] = hashlib.sha256(np.asarray(Image.open(BytesIO(content))).tobytes()).hexdigest()
        return {**job, "side_px": side_px}

    def _until(self, status: int, method: str, path: str, **request: Any) -> httpx.Response:
        ends_s = time.monotonic() + 600
        while True:
            try:
                answer = self._http.request(method, path, **request)
            except httpx.HTTPError:
                answer = None
            if answer is not None and answer.status_code == status:
                return answer
            # While there is no application, Serve itself answers 404 to everything.
            assert answer is None or answer.status_code in (404, 429, 500, 502, 503, 504), answer.text
            assert time.monotonic() < ends_s, (method, path, answer and answer.text)
            self.num_retries += 1
            time.sleep(0.5)


def test_no_accepted_job_is_lost_or_done_twice_whatever_is_killed(
    service: Service, listener: Listener, capsys: pytest.CaptureFixture[str]
) -> None:
    hook = f"http://127.0.0.1:{listener.port}/"
    client = Client(f"http://127.0.0.1:{service.port}", hook)
    blows = ["replica", "gateway", "node", "application", "replica", "gateway", "node", "replica"]
    draws, struck, is_over = np.random.default_rng(7), Counter[str](), threading.Event()
    start_s = time.monotonic()

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        jobs = [pool.submit(client.run, number) for number in range(NUM_JOBS)]
        for blow in blows:
            is_over.wait(float(draws.uniform(6, 14)))
            if all(job.done() for job in jobs):
                break
            struck[blow] += 1
            if blow == "replica":
                service.kill_one("Restorer")
            elif blow == "gateway":
                service.kill_one("Gateway")
            elif blow == "node":
                service.kill_a_node()
            else:
                service.restart()
        ended = [job.result() for job in jobs]

    states = Counter(job["state"] for job in ended)
    with capsys.disabled():
        print(f"\n{len(ended)} jobs in {time.monotonic() - start_s:.0f} s, {dict(states)}, struck {dict(struck)}, ")
        print(f"{client.num_retries} requests repeated, {service.num_taken_over()} jobs taken over")
    assert struck.keys() >= {"replica", "gateway", "node", "application"}
    assert states == {"done": NUM_JOBS}, [job["problem"] for job in ended if job["state"] != "done"]
    assert len({job["id"] for job in ended}) == NUM_JOBS
    for side_px in set(SIDES_PX):
        assert len({job["pixels"] for job in ended if job["side_px"] == side_px}) == 1, side_px
    ends_s = time.monotonic() + 60
    while len(listener.ids) < NUM_JOBS and time.monotonic() < ends_s:
        time.sleep(0.5)
    assert {len(listener.ids.get(job["id"], ())) for job in ended} == {1}, "each job has ended once, and told so"

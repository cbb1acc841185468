"""The application on a real Ray Serve: HTTP in, pictures out, jobs through deaths and restarts."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from faithdiff import FaithDiffPipeline

pytestmark = pytest.mark.ray

TILE_PX = 64
FIELDS = {"scale": "2", "num_inference_steps": "6", "seed": "11", "prompt": "A red brick house."}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _settings(folder: Path) -> dict[str, Any]:
    return {
        "restorer": {
            "num_replicas": 2,
            "num_cpus": 0.5,
            "tile_px": TILE_PX,
            "drain_s": 10,
            "report_every_s": 0.5,
            "engine": {"memory_bytes": 1_500_000_000, "max_entries": 12},
            "claims": {"lease_s": 3, "heartbeat_s": 0.2, "poll_s": 0.2, "snapshot_every_s": 0.5},
            "spread": {"above_megapixels": 0.03},
        },
        "gateway": {
            "limits": {"max_input_px": 100_000},
            "store_url": f"sqlite:///{folder}/jobs.db",
            "storage_uri": str(folder / "files"),
            "events_poll_s": 0.1,
        },
    }


@pytest.fixture(scope="module")
def deploy(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], None]]:
    """Deploys the application; again, when it is there, after taking it down."""
    from ray import serve

    from serve.app import ServeConfig, build_app

    cfg = ServeConfig.model_validate(_settings(tmp_path_factory.mktemp("service")))

    def run() -> None:
        serve.run(build_app(cfg), name="faithdiff", route_prefix="/")

    yield run
    serve.shutdown()


@pytest.fixture(scope="module")
def service(deploy: Callable[[], None]) -> Iterator[httpx.Client]:
    from ray import serve

    port = _free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 300})
    deploy()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def pipeline() -> FaithDiffPipeline:
    return FaithDiffPipeline.from_pretrained("nano")


def _picture(height: int = 20, width: int = 28) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _png(picture: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _direct(pipeline: FaithDiffPipeline, picture: np.ndarray, fields: dict[str, str] = FIELDS) -> np.ndarray:
    settings = {name: value if name == "prompt" else int(value) for name, value in fields.items()}
    return pipeline(picture, tile_px=TILE_PX, **settings).array


def _problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    return problem


def _submit(service: httpx.Client, picture: np.ndarray, fields: dict[str, str] = FIELDS) -> str:
    answer = service.post("/v1/jobs", files={"picture": _png(picture)}, data=fields)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def _ended(service: httpx.Client, job_id: str) -> dict[str, Any]:
    ends_s = time.monotonic() + 150
    while (job := service.get(f"/v1/jobs/{job_id}").json())["state"] in ("queued", "running"):
        assert time.monotonic() < ends_s, job
        time.sleep(0.1)
    return dict(job)


def _result(service: httpx.Client, job_id: str) -> np.ndarray:
    job = _ended(service, job_id)
    assert job["state"] == "done", job
    return np.asarray(Image.open(BytesIO(service.get(job["result"]["url"]).content)))


def _restorers() -> list[Any]:
    import ray

    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return [ray.get_actor(name, namespace="serve") for name in names if "faithdiff#Restorer#" in name]


def _await_replicas(service: httpx.Client, number: int) -> None:
    ends_s = time.monotonic() + 120
    while len(_restorers()) < number or service.get("/readyz").status_code != 200:
        assert time.monotonic() < ends_s, "no new replica"
        time.sleep(0.3)


def test_a_picture_is_restored_over_http_exactly_as_by_the_pipeline(
    service: httpx.Client, pipeline: FaithDiffPipeline
) -> None:
    response = service.post("/v1/upscale", files={"picture": ("a.png", _png(_picture()))}, data=FIELDS)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-model-version"] == "nano"
    assert response.headers["x-manifest-digest"] == "none"
    assert np.array_equal(np.asarray(Image.open(BytesIO(response.content))), _direct(pipeline, _picture()))


def test_health_readiness_models_metrics_and_the_page_answer(service: httpx.Client) -> None:
    assert service.get("/healthz").json() == {"status": "ok"}
    assert service.get("/readyz").json() == {"status": "ready", "model_version": "nano", "has_captioner": False}
    ends_s = time.monotonic() + 30
    while (model := service.get("/v1/models").json()["models"][0])["num_replicas"] < 2:
        assert time.monotonic() < ends_s
        time.sleep(0.2)
    assert model["model"] == "nano"
    assert model["load_s"] > 0
    metrics = service.get("/metrics").text
    assert 'faithdiff_replicas{state="running"} 2.0' in metrics
    assert "faithdiff_cold_start_seconds" in metrics
    assert "text/html" in service.get("/").headers["content-type"]


def test_bad_requests_are_problems(service: httpx.Client) -> None:
    png = _png(_picture())
    _problem(service.post("/v1/upscale", files={"picture": b"hello"}), 415)
    _problem(service.post("/v1/upscale", files={"picture": png[:500]}), 422)
    _problem(service.post("/v1/upscale", files={"picture": _png(np.zeros((1001, 100, 3), np.uint8))}), 413)
    _problem(service.post("/v1/jobs", files={"picture": png}, data={"scale": "99"}), 422)
    _problem(service.post("/v1/upscale", content=png, headers={"content-type": "image/png"}), 415)
    _problem(service.post("/v1/upscale", json={"scale": 2}), 415)
    _problem(service.get("/v1/nothing"), 404)
    _problem(service.post("/v1/upscale", files={"picture": b"\0" * (40 * 1024**2)}), 413)


def test_a_job_is_the_same_alone_and_among_eight_others(service: httpx.Client, pipeline: FaithDiffPipeline) -> None:
    alone = _result(service, _submit(service, _picture()))
    with ThreadPoolExecutor(9) as pool:
        ids = list(pool.map(lambda i: _submit(service, _picture(20 + i, 28 + i)), range(9)))
    assert np.array_equal(alone, _direct(pipeline, _picture()))
    assert np.array_equal(_result(service, ids[0]), alone)
    assert all(_ended(service, job_id)["state"] == "done" for job_id in ids)


def test_a_picture_that_two_replicas_share_is_the_same(service: httpx.Client, pipeline: FaithDiffPipeline) -> None:
    """192 x 192 px of result are above the size from which pictures are spread; metrics say that both have worked."""

    def tiles() -> dict[str, float]:
        lines = [line for line in service.get("/metrics").text.splitlines() if line.startswith("faithdiff_batch_tiles")]
        return {
            line.split("replica=")[1].split('"')[1]: float(line.split()[-1]) for line in lines if "Restorer" in line
        }

    _await_replicas(service, 2)
    time.sleep(2.5)  # replicas share what they have counted every two seconds
    before, picture = tiles(), _picture(96, 96)
    fields = {**FIELDS, "num_inference_steps": "12"}
    expected = _direct(pipeline, picture, fields)
    # On a busy machine a picture may be done before the other replica has encoded it, too.
    for _ in range(5):
        assert np.array_equal(_result(service, _submit(service, picture, fields)), expected)
        time.sleep(2.5)
        worked = {name: count - before.get(name, 0.0) for name, count in tiles().items()}
        if sum(count > 0 for count in worked.values()) == 2:
            return
    raise AssertionError(f"one replica did it all: {worked}")


def test_events_tell_of_progress_and_end(service: httpx.Client) -> None:
    job_id = _submit(service, _picture(48, 48), {**FIELDS, "num_inference_steps": "20"})
    with service.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
        names = [line.removeprefix("event: ") for line in stream.iter_lines() if line.startswith("event: ")]
    assert names[-1] == "done"
    assert "progress" in names[:-1]


def test_a_cancelled_job_ends_and_frees_the_replica(service: httpx.Client) -> None:
    job_id = _submit(service, _picture(80, 80), {**FIELDS, "num_inference_steps": "200"})
    while service.get(f"/v1/jobs/{job_id}").json()["step"] < 1:
        time.sleep(0.05)
    assert service.delete(f"/v1/jobs/{job_id}").status_code == 202
    assert _ended(service, job_id)["state"] == "cancelled"
    assert _ended(service, _submit(service, _picture()))["state"] == "done"


def test_a_replica_that_dies_loses_neither_a_job_nor_an_open_request(
    service: httpx.Client, pipeline: FaithDiffPipeline
) -> None:
    import ray

    _await_replicas(service, 2)
    picture, fields = _picture(48, 48), {**FIELDS, "num_inference_steps": "25"}
    with ThreadPoolExecutor(4) as pool:
        ids = [_submit(service, picture, fields) for _ in range(2)]
        posts = [
            pool.submit(service.post, "/v1/upscale", files={"picture": _png(picture)}, data=fields) for _ in range(4)
        ]
        while not any(service.get(f"/v1/jobs/{job_id}").json()["step"] > 3 for job_id in ids):
            time.sleep(0.05)
        ray.kill(_restorers()[0])
        answers = [post.result() for post in posts]
    expected = _direct(pipeline, picture, fields)
    assert [answer.status_code for answer in answers] == [200] * 4
    for answer in answers:
        assert np.array_equal(np.asarray(Image.open(BytesIO(answer.content))), expected)
    for job_id in ids:
        assert np.array_equal(_result(service, job_id), expected)


def test_jobs_outlive_the_application(
    service: httpx.Client, deploy: Callable[[], None], pipeline: FaithDiffPipeline
) -> None:
    from ray import serve

    picture, fields = _picture(48, 48), {**FIELDS, "num_inference_steps": "30"}
    ids = [_submit(service, picture, fields) for _ in range(3)]
    while not any(service.get(f"/v1/jobs/{job_id}").json()["step"] > 2 for job_id in ids):
        time.sleep(0.05)
    serve.delete("faithdiff")
    deploy()
    expected = _direct(pipeline, picture, fields)
    for job_id in ids:
        assert np.array_equal(_result(service, job_id), expected)

"""The application on a real Ray Serve: HTTP in, PNG out."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from faithdiff import FaithDiffPipeline

pytestmark = pytest.mark.ray


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def service(local_ray: None) -> Iterator[httpx.Client]:
    from ray import serve

    from serve.app import ServeConfig, build_app

    port = _free_port()
    cfg = {"restorer": {"num_cpus": 0.5, "max_waiting": 1}, "gateway": {"limits": {"max_input_px": 10_000}}}
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_app(ServeConfig.model_validate(cfg)), name="faithdiff", route_prefix="/")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield client
    serve.shutdown()


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 28, 3), dtype=np.uint8)


def _png(picture: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    return problem


def test_a_picture_is_restored_over_http_exactly_as_by_the_pipeline(service: httpx.Client, picture: np.ndarray) -> None:
    fields = {"scale": "3", "prompt": "A red brick house.", "num_inference_steps": "2", "seed": "11"}
    response = service.post("/v1/upscale", files={"picture": ("a.png", _png(picture))}, data=fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-model-version"] == "nano"
    assert response.headers["x-manifest-digest"] == "none"
    restored = Image.open(BytesIO(response.content))
    assert restored.size == (28 * 3, 20 * 3)
    direct = FaithDiffPipeline.from_pretrained("nano")(
        picture, scale=3, prompt="A red brick house.", num_inference_steps=2, seed=11
    )
    assert np.abs(np.asarray(restored).astype(int) - np.asarray(direct.image)).max() <= 1


def test_health_readiness_and_models_answer(service: httpx.Client) -> None:
    assert service.get("/healthz").json() == {"status": "ok"}
    assert service.get("/readyz").json() == {"status": "ready", "model_version": "nano"}
    (model,) = service.get("/v1/models").json()["models"]
    assert model["model"] == "nano"
    assert model["load_s"] > 0


def test_bad_requests_are_problems(service: httpx.Client, picture: np.ndarray) -> None:
    png = _png(picture)
    too_large = _png(np.zeros((101, 100, 3), np.uint8))
    _problem(service.post("/v1/upscale", files={"picture": b"hello"}), 415)
    _problem(service.post("/v1/upscale", files={"picture": png[:500]}), 422)
    _problem(service.post("/v1/upscale", files={"picture": too_large}), 413)
    _problem(service.post("/v1/upscale", files={"picture": png}, data={"scale": "99"}), 422)
    _problem(service.post("/v1/upscale", content=png, headers={"content-type": "image/png"}), 415)
    _problem(service.post("/v1/upscale", json={"scale": 2}), 415)
    _problem(service.get("/v1/nothing"), 404)


def test_an_upload_far_over_the_limit_is_refused_and_the_service_goes_on(service: httpx.Client) -> None:
    _problem(service.post("/v1/upscale", files={"picture": b"\0" * (40 * 1024**2)}), 413)
    assert service.get("/readyz").status_code == 200


def test_more_pictures_than_may_wait_get_503_and_the_others_their_result(
    service: httpx.Client, picture: np.ndarray
) -> None:
    files, data = {"picture": _png(picture)}, {"scale": "2", "num_inference_steps": "20"}
    with ThreadPoolExecutor(8) as pool:
        posts = [pool.submit(service.post, "/v1/upscale", files=files, data=data) for _ in range(8)]
        responses = [post.result() for post in posts]
    done = [r for r in responses if r.status_code == 200]
    refused = [r for r in responses if r.status_code == 503]
    assert len(done) + len(refused) == 8
    assert len(done) >= 2
    assert refused
    assert len({r.content for r in done}) == 1
    for response in refused:
        assert _problem(response, 503)["type"] == "urn:faithdiff:problem:no-replica-free"
        assert int(response.headers["retry-after"]) > 0


def test_a_restoration_nobody_waits_for_any_more_frees_the_replica(service: httpx.Client, picture: np.ndarray) -> None:
    files = {"picture": _png(np.tile(picture, (4, 3, 1)))}
    with pytest.raises(httpx.ReadTimeout):
        service.post("/v1/upscale", files=files, data={"num_inference_steps": "200", "scale": "8"}, timeout=2)
    response = service.post("/v1/upscale", files=files, data={"num_inference_steps": "1", "scale": "1"}, timeout=10)
    assert response.status_code == 200


def test_when_a_replica_dies_its_request_gets_503_and_the_next_one_a_picture(
    service: httpx.Client, picture: np.ndarray
) -> None:
    files = {"picture": _png(np.tile(picture, (4, 3, 1)))}
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(service.post, "/v1/upscale", files=files, data={"num_inference_steps": "200"})
        time.sleep(1.5)
        _kill_restorers()
        problem = _problem(lost.result(), 503)
    assert "may be sent again" in problem["detail"]
    give_up_s = time.monotonic() + 60
    while service.get("/readyz").status_code != 200:
        assert time.monotonic() < give_up_s, "no new replica within 60 s"
        time.sleep(0.5)
    response = service.post("/v1/upscale", files=files, data={"num_inference_steps": "1", "scale": "1"})
    assert response.status_code == 200


def _kill_restorers() -> None:
    import ray

    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    replicas = [name for name in names if "faithdiff#Restorer#" in name]
    assert len(replicas) == 1, names
    ray.kill(ray.get_actor(replicas[0], namespace="serve"))

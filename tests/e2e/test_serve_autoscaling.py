"""Restorers from zero and back on a real Ray Serve behind HAProxy, and a new version behind an alias."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import faithdiff
from sr_platform.model_registry import MANIFEST_DIGEST_TAG
from sr_platform.tracking import Tracking, tracking_uri

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

PRESET_PATH = Path(faithdiff.__file__).parent / "presets" / "nano"


@pytest.fixture
def serving(served_behind_haproxy: Any, tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], httpx.Client]]:
    """`serving({"restorer": {...}})` deploys the application and gives a client of it."""
    with ExitStack() as clients:

        def deploy(settings: dict[str, Any]) -> httpx.Client:
            gateway = {"store_url": f"sqlite:///{tmp_path}/jobs.db", "storage_uri": str(tmp_path / "files")}
            url = served_behind_haproxy({**settings, "gateway": gateway})
            return clients.enter_context(httpx.Client(base_url=url, timeout=120))

        yield deploy


def _png(side_px: int = 48) -> bytes:
    buffer = BytesIO()
    pixels = np.random.default_rng(side_px).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _submit(client: httpx.Client, steps: int = 4) -> str:
    fields = {"scale": "1", "num_inference_steps": str(steps)}
    answer = client.post("/v1/jobs", files={"picture": _png()}, data=fields)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def _until(condition: Callable[[], bool], timeout_s: float = 150.0) -> float:
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() < start_s + timeout_s, "it did not come to pass"
        time.sleep(0.1)
    return time.monotonic() - start_s


def _running(client: httpx.Client) -> int:
    (line,) = [
        line for line in client.get("/metrics").text.splitlines() if 'faithdiff_replicas{state="running"}' in line
    ]
    return int(float(line.split()[-1]))


def test_a_service_that_sleeps_wakes_for_a_job_and_falls_asleep_again(
    serving: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling = {
        "min_replicas": 0, "max_replicas": 2, "upscale_delay_s": 0, "downscale_delay_s": 2,
        "downscale_to_zero_delay_s": 2, "drain_s": 5,
    }  # fmt: skip
    client = serving({"restorer": {"num_replicas": None, "num_cpus": 0.5, "drain_s": 5, "autoscaling": scaling}})
    assert client.get("/readyz").json() == {"status": "asleep", "model_version": None, "has_captioner": False}
    assert client.get("/v1/models").json() == {"models": []}
    time.sleep(2)  # whoever only looks does not wake it
    assert client.get("/readyz").json()["status"] == "asleep"
    job_id = _submit(client)
    awake_s = _until(lambda: client.get("/readyz").json()["status"] == "ready")
    done_s = awake_s + _until(lambda: client.get(f"/v1/jobs/{job_id}").json()["state"] == "done")
    (model,) = client.get("/v1/models").json()["models"]
    asleep_s = done_s + _until(lambda: client.get("/readyz").json()["status"] == "asleep")
    assert client.get(f"/v1/jobs/{job_id}/result").status_code == 200, "results are there without a replica"
    with capsys.disabled():
        parts = {name: model[name] for name in ("download_s", "load_s", "compile_s")}
        print(f"\nafter the job: awake {awake_s:.1f} s, done {done_s:.1f} s, asleep {asleep_s:.1f} s; {parts}")


@pytest.mark.soak
def test_a_new_version_behind_the_alias_is_rolled_out_without_dropping_a_job(
    serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(tmp_path))
    tracking = Tracking.open(default_path=tmp_path, experiment="test")
    run_id = tracking.start("train", params={}, tags={})

    def register(digest: str) -> None:
        tags = {MANIFEST_DIGEST_TAG: digest}
        tracking.register_model(
            str(PRESET_PATH), name="faithdiff-nano", alias="champion", run_id=run_id, digest=digest, tags=tags
        )

    register("sha256:abc")
    restorer = {"num_cpus": 0.5, "drain_s": 20, "follow_alias_every_s": 0.5, "report_every_s": 0.3}
    client = serving({"model": "models:/faithdiff-nano@champion", "restorer": restorer})
    ids = [_submit(client, steps=12)]
    register("sha256:def")

    def is_rolled_out() -> bool:
        if len(ids) < 60:
            ids.append(_submit(client))
        return [m["version"] for m in client.get("/v1/models").json()["models"]] == ["faithdiff-nano/2"]

    _until(is_rolled_out)
    ids.append(_submit(client))
    jobs: list[dict[str, Any]] = []
    for job_id in ids:
        _until(lambda job_id=job_id: client.get(f"/v1/jobs/{job_id}").json()["state"] not in ("queued", "running"))
        jobs.append(client.get(f"/v1/jobs/{job_id}").json())
    assert {job["state"] for job in jobs} == {"done"}
    versions = [job["model_version"] for job in jobs]
    assert versions == sorted(versions)
    assert (jobs[0]["model_version"], jobs[-1]["model_version"]) == ("faithdiff-nano/1", "faithdiff-nano/2")
    result = client.get(f"/v1/jobs/{ids[-1]}/result")
    assert result.headers["x-model-version"] == "faithdiff-nano/2"
    assert result.headers["x-manifest-digest"] == "sha256:def"

"""The platform on this machine: it starts, takes a job and a picture, and is gone again.

The job goes through infra/scripts/submit.sh, as it would go to a cluster; kubectl is stood in for by a forwarder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from mlflow import MlflowClient
from PIL import Image

from sr_platform.cluster import REPOSITORY_PATH

RUN = REPOSITORY_PATH / "infra" / "local" / "run.py"
TRAINING = ["train_nano.yaml", "--stage", "align", "--max-updates", "2", "--num-workers", "1"]
TRAINING += ["--size-px", "32", "--global-batch", "4", "--validation.num-pictures", "0"]
PORTS = ("gateway", "dashboard", "mlflow", "s3", "prometheus", "grafana")
KUBECTL = """#!/usr/bin/env bash
case " $* " in
  *" get secret jobs "*) printf %s "$LOCAL_TOKEN" | base64 -w0 ;;
  *" port-forward service/jobs-head-svc "*) exec "{python}" "{forwarder}" "${{@: -1}}" "{port}" ;;
  *) exit 1 ;;
esac
"""
FORWARDER = """
import asyncio, sys

here, there = int(sys.argv[1].split(":")[0]), int(sys.argv[2])

async def pipe(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()

async def serve(reader, writer):
    far_reader, far_writer = await asyncio.open_connection("127.0.0.1", there)
    await asyncio.gather(pipe(reader, far_writer), pipe(far_reader, writer), return_exceptions=True)

async def main():
    async with await asyncio.start_server(serve, "127.0.0.1", here) as server:
        await server.serve_forever()

asyncio.run(main())
"""

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


class Local:
    """The program in a process of its own, with its log, ports and variables."""

    def __init__(self, folder: Path) -> None:
        self.out, self.log_path = folder / "local", folder / "run.log"
        flags = [word for name in PORTS for word in (f"--{name}-port", "0")]
        command = [sys.executable, RUN, "--out", self.out, "--start-timeout-s", "400", *flags]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))}
        env["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY_PATH / "platform"), str(REPOSITORY_PATH)])
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, env=env | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)

    def wait_until_ready(self) -> None:
        while "everything runs" not in self.log_path.read_text():
            assert self.process.poll() is None, self.log_path.read_text()
            time.sleep(0.5)

    @property
    def ports(self) -> dict[str, int]:
        ports: dict[str, int] = json.loads((self.out / "ports.json").read_text())
        return ports

    @property
    def variables(self) -> dict[str, str]:
        lines = (self.out / "environment").read_text().splitlines()
        return dict(line.removeprefix("export ").split("=", 1) for line in lines)

    def stop(self) -> list[psutil.Process]:
        """Ctrl-C; returns what is left of everything that it had started."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(timeout=180) == 0, self.log_path.read_text()
        return psutil.wait_procs(started, timeout=20)[1]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    made = Local(tmp_path_factory.mktemp("local"))
    try:
        made.wait_until_ready()
        yield made
    finally:
        if made.process.poll() is None:
            made.process.terminate()
            made.process.wait(timeout=180)


@pytest.fixture
def infra_with_kubectl(infra_copy: Any, local: Local) -> Any:
    forwarder = infra_copy.programs_path / "forwarder.py"
    forwarder.write_text(FORWARDER)
    port = local.ports["dashboard"]
    infra_copy.stand_in("kubectl", KUBECTL.format(python=sys.executable, forwarder=forwarder, port=port))
    overlay = infra_copy.path / "kubernetes" / "overlays" / "dev"
    (overlay / "platform.env").write_text((overlay / "platform.env.example").read_text())
    # The script submits the repository that it lies in.
    for name in ("platform", "pipelines", "faithdiff", "pyproject.toml"):
        (infra_copy.path.parent / name).symlink_to(REPOSITORY_PATH / name)
    return infra_copy


@pytest.mark.soak
def test_a_training_is_submitted_through_a_port_forward_and_leaves_a_registered_model(
    local: Local, infra_with_kubectl: Any, prepared_dataset: str
) -> None:
    command = ["python", "pipelines/train.py", *TRAINING, "--data", prepared_dataset, "--out", "s3://checkpoints/run"]
    done = infra_with_kubectl.script(
        "submit.sh", "dev", *command, LOCAL_TOKEN=local.variables["RAY_AUTH_TOKEN"], PYTHON=sys.executable
    )
    assert "training is done" in done.stdout
    assert "succeeded" in done.stdout
    client = MlflowClient(local.variables["MLFLOW_TRACKING_URI"])
    version = client.get_model_version_by_alias("faithdiff-nano", "candidate")
    assert version.tags["model_uri"] == "s3://checkpoints/run/models/align"
    assert client.get_run(version.run_id).info.status == "FINISHED"


def test_without_the_token_nothing_is_submitted(local: Local) -> None:
    assert httpx.get(f"{local.variables['RAY_ADDRESS']}/api/jobs/", timeout=30).status_code == 401


def test_a_picture_is_restored_over_http(local: Local) -> None:
    buffer = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
    answer = httpx.post(
        f"http://127.0.0.1:{local.ports['gateway']}/v1/upscale",
        files={"picture": ("lq.png", buffer.getvalue(), "image/png")},
        data={"scale": "2", "num_inference_steps": "2"},
        timeout=300,
    )
    assert answer.status_code == 200, answer.text
    assert Image.open(BytesIO(answer.content)).size == (64, 48)


def test_prometheus_scrapes_the_gateway_and_knows_our_alerts(local: Local) -> None:
    address = f"http://127.0.0.1:{local.ports['prometheus']}/api/v1"
    give_up_s = time.monotonic() + 60
    while True:
        targets = httpx.get(f"{address}/targets", timeout=30).json()["data"]["activeTargets"]
        if [target["health"] for target in targets] == ["up"] or time.monotonic() > give_up_s:
            break
        time.sleep(1)
    assert [(target["labels"]["job"], target["health"]) for target in targets] == [("faithdiff", "up")]
    rules = httpx.get(f"{address}/rules", timeout=30).json()["data"]["groups"]
    assert "FaithDiffSilent" in [rule["name"] for group in rules for rule in group["rules"]]


def test_help_names_the_file_that_one_types() -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY_PATH / "platform"), str(REPOSITORY_PATH)])}
    told = subprocess.run([sys.executable, RUN, "--help"], env=env, capture_output=True, text=True, timeout=120).stdout
    assert "usage: python infra/local/run.py" in told


def test_its_variables_are_for_its_owner_alone(local: Local) -> None:
    assert (local.out / "environment").stat().st_mode & 0o077 == 0


def test_a_port_that_is_taken_is_told_before_anything_starts(local: Local, tmp_path: Path) -> None:
    command = [sys.executable, RUN, "--out", tmp_path / "other", "--gateway-port", str(local.ports["gateway"])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY_PATH / "platform"), str(REPOSITORY_PATH)])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"local: port {local.ports['gateway']} is taken; give another" in done.stderr


def test_it_stops_everything_it_started(local: Local) -> None:
    assert local.stop() == []
    assert not (local.out / "environment").exists()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{local.ports['gateway']}/healthz", timeout=5)

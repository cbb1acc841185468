"""`ray job submit` of the training against a head that the test starts itself: the same run as without a cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from faithdiff import FaithDiffPipeline
from pipelines import train

REPOSITORY_PATH = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).parent / "ray"
RUNTIME_ENV = {"env_vars": {"PYTHONPATH": "platform:."}}
FLAGS = ["train_nano.yaml", "--size-px", "32", "--global-batch", "4", "--max-updates", "2", "--log-every-updates", "1"]

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for listener in sockets:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard address of a Ray head on free ports, ended by SIGTERM: `ray stop` would end every Ray here."""
    gcs_port, dashboard_port, agent_port = free_ports(3)
    command = [str(RAY), "start", "--head", "--block", "--num-cpus=6", "--disable-usage-stats"]
    command += [f"--port={gcs_port}", f"--dashboard-port={dashboard_port}", "--dashboard-host=127.0.0.1"]
    command += [f"--dashboard-agent-listen-port={agent_port}", "--min-worker-port=0", "--max-worker-port=0"]
    # Jobs run the `python` of the head's PATH, as after activating the environment.
    environment = {**os.environ, "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"}
    # Not /tmp/ray: there the head would leave its address behind, and every later Ray would try to join it. Short,
    # because sockets lie in it.
    session_path = tempfile.mkdtemp(prefix="ray_head_")
    command += [f"--temp-dir={session_path}"]
    log_path = tmp_path_factory.mktemp("head") / "head.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard_port}"
    try:
        wait_until_ready(address, process, log_path)
        yield address
    finally:
        end(process)
        shutil.rmtree(session_path, ignore_errors=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the head; what is still draining after 5 s is killed, but only what this head started."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    for straggler in psutil.wait_procs(started, timeout=5)[1]:
        straggler.kill()
    process.wait(timeout=30)


def wait_until_ready(address: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline_s = time.monotonic() + 90
    while time.monotonic() < deadline_s:
        assert process.poll() is None, log_path.read_text()
        try:
            if httpx.get(f"{address}/api/jobs/", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError(f"no job server within 90 s: {log_path.read_text()}")


def submit(head: str, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    command = [str(RAY), "job", "submit", "--address", head, "--working-dir", ".", "--runtime-env-json"]
    command += [json.dumps(RUNTIME_ENV), "--", *entrypoint]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        command, cwd=REPOSITORY_PATH, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


def test_a_submitted_training_gives_the_model_of_a_local_one(
    head: str, local_ray, prepared_dataset: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    flags = [*FLAGS, "--stage", "align", "--data", prepared_dataset]
    submitted = submit(head, "python", "pipelines/train.py", *flags, "--out", str(tmp_path / "submitted"))
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "training is done" in submitted.stdout

    train.main([*flags, "--out", str(tmp_path / "local")])
    states = [
        FaithDiffPipeline.from_pretrained(tmp_path / where / "models" / "align").unet.state_dict()
        for where in ("submitted", "local")
    ]
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=0)

"""MLflow for the tests of this room: a database file, and a server on loopback that can be lost and found again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from sr_platform.tracking import Tracking


class MlflowServer:
    """One server at `uri`, with its database and artefacts in `path`; it comes back where it was."""

    def __init__(self, path: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        self._command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{path}/server.db"]
        self._command += ["--artifacts-destination", str(path / "artifacts")]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once the server answers; one that runs already is left alone."""
        if self._process is None:
            # A session of its own, so that its worker can be killed with it.
            env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self._process = subprocess.Popen(self._command, env=env, start_new_session=True)
            self._wait_until_healthy(self._process)

    def kill(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait(timeout=20)
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            assert process.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("the server did not answer within 60 s")


@pytest.fixture(scope="session")
def _mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def mlflow_server(_mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    """The running server of the session, which MLFLOW_TRACKING_URI names; a test that kills it is tidied up after."""
    _mlflow_server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", _mlflow_server.uri)
    return _mlflow_server


@pytest.fixture(scope="session")
def sqlite_tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    """One database file for the session: creating MLflow's tables takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return Tracking.open(default_path=tmp_path_factory.mktemp("tracking"), experiment="test")


@pytest.fixture
def sqlite(sqlite_tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> Tracking:
    """The database file of the session, which MLFLOW_TRACKING_URI names."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_tracking.uri)
    return sqlite_tracking


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Something like a model: two files, one of them in a folder of its own."""
    path = tmp_path / "pipeline"
    (path / "unet").mkdir(parents=True)
    (path / "model_index.json").write_text("{}")
    (path / "unet" / "weights.bin").write_bytes(b"\0" * 1000)
    return path

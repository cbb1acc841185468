from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sr_platform.errors import RequestError
from sr_platform.tracking import Metric, RunLog, Tracking, flatten, resolve_model, tracking_uri


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pipeline"
    (path / "unet").mkdir(parents=True)
    (path / "model_index.json").write_text("{}")
    (path / "unet" / "weights.bin").write_bytes(b"\0" * 1000)
    return path


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    """One database for the module: creating MLflow's tables takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield Tracking.open(default_path=tmp_path_factory.mktemp("tracking"), experiment="test")


def test_a_preset_or_a_folder_passes_through_as_it_is(folder: Path) -> None:
    assert resolve_model("nano").path == resolve_model("nano").version == "nano"
    assert (resolve_model(str(folder)).path, resolve_model(str(folder)).version) == (str(folder), "folder")
    assert resolve_model(folder.as_uri()).path == str(folder)
    assert resolve_model(str(folder)).manifest_digest is None


def test_the_tracking_server_of_the_environment_comes_before_the_file(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri(tmp_path) == "http://127.0.0.1:5000"


def test_runs_are_nested_and_hold_recipe_tags_and_every_step(sqlite: Tracking) -> None:
    many = {f"p{i}": i for i in range(150)}
    parent = sqlite.start("parent", params={"a": {"b": 1}, **many}, tags={"manifest_digest": "abc"})
    stage = sqlite.start("align", parent_run_id=parent, params={}, tags={})
    log = RunLog(sqlite.uri, stage)
    log.log([Metric("train/loss", 1.0 / (step + 1), step) for step in range(1200)])
    sqlite.finish(stage)
    sqlite.finish(parent, failed=True)
    client = MlflowClient(sqlite.uri)
    assert client.get_run(parent).data.params["a.b"] == "1"
    assert len(client.get_run(parent).data.params) == 151
    assert client.get_run(parent).data.tags["manifest_digest"] == "abc"
    assert client.get_run(stage).data.tags["mlflow.parentRunId"] == parent
    assert [m.step for m in client.get_metric_history(stage, "train/loss")] == list(range(1200))
    assert log.latest() == {"train/loss": 1 / 1200}
    assert (client.get_run(stage).info.status, client.get_run(parent).info.status) == ("FINISHED", "FAILED")
    assert sqlite.resume(stage)
    assert client.get_run(stage).info.status == "RUNNING"
    assert not sqlite.resume("0" * 32)


def test_a_registered_folder_comes_back_by_alias_and_by_version(sqlite, folder, tmp_path, monkeypatch) -> None:
    run_id = sqlite.start("run", params={}, tags={})
    tags = {"manifest_digest": "d1"}
    version = sqlite.register_folder(folder, name="one", alias="candidate", run_id=run_id, tags=tags)
    again = sqlite.register_folder(folder, name="one", alias="candidate", run_id=run_id, tags=tags)
    assert version == again == "1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite.uri)
    by_alias = resolve_model("models:/one@candidate", cache_path=tmp_path / "cache")
    assert resolve_model("models:/one/1", cache_path=tmp_path / "cache") == by_alias
    assert (by_alias.version, by_alias.manifest_digest) == ("one/1", "d1")
    assert (Path(by_alias.path) / "unet" / "weights.bin").read_bytes() == b"\0" * 1000
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [Path(by_alias.path).name]
    database = Path(sqlite.uri.removeprefix("sqlite:///"))
    assert MlflowClient(sqlite.uri).get_run(run_id).info.artifact_uri.startswith(database.parent.as_uri())


def test_an_alias_moves_to_the_newest_version(sqlite, folder, tmp_path, monkeypatch) -> None:
    for _ in range(2):
        run_id = sqlite.start("run", params={}, tags={})
        sqlite.register_folder(folder, name="two", alias="candidate", run_id=run_id, tags={})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite.uri)
    assert resolve_model("models:/two@candidate", cache_path=tmp_path).version == "two/2"
    assert resolve_model("models:/two/1", cache_path=tmp_path).version == "two/1"


def test_a_wrong_model_uri_says_what_there_is(sqlite, folder, monkeypatch) -> None:
    run_id = sqlite.start("run", params={}, tags={})
    sqlite.register_folder(folder, name="three", alias="candidate", run_id=run_id, tags={})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite.uri)
    with pytest.raises(RequestError, match=r"aliases \['candidate'\]"):
        resolve_model("models:/three@champion")
    with pytest.raises(RequestError, match=r"not in the registry; it has .*three"):
        resolve_model("models:/missing@champion")
    with pytest.raises(RequestError, match="not in the registry"):
        resolve_model("models:/three/9")
    with pytest.raises(RequestError, match="models:/name@alias or models:/name/3"):
        resolve_model("models:/three")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(RequestError, match="MLFLOW_TRACKING_URI, which is not set"):
        resolve_model("models:/three@candidate")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    command += ["--artifacts-destination", str(tmp_path / "server_artifacts")]
    process = subprocess.Popen(command, env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
    uri = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(uri, process)
        yield uri
    finally:
        process.terminate()
        process.wait(timeout=20)


def _wait_until_healthy(uri: str, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=2) as answer:
                assert answer.status == 200
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError("the server did not answer within 60 s")


def test_the_same_calls_work_against_a_tracking_server(server, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    runs = Tracking.open(default_path=tmp_path / "unused", experiment="served")
    assert Tracking.open(default_path=tmp_path / "unused", experiment="served") == runs
    run_id = runs.start("run", params={"seed": 1}, tags={})
    RunLog(runs.uri, run_id).log([Metric("train/loss", 0.5, 0)])
    runs.register_folder(folder, name="served", alias="candidate", run_id=run_id, tags={"manifest_digest": "d2"})
    model = resolve_model("models:/served@candidate", cache_path=tmp_path / "cache")
    assert (model.version, model.manifest_digest) == ("served/1", "d2")
    assert (Path(model.path) / "model_index.json").read_text() == "{}"
    assert not (tmp_path / "unused").exists()


def test_nested_parameters_become_dotted_names() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": 2}, "e": None}) == {"a.b.c": 1, "a.d": 2, "e": None}

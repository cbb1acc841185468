from __future__ import annotations

import base64
import http.server
import json
import logging
import math
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from sr_platform import mlflow_client, run_log
from sr_platform.run_log import Metric, RunLog
from sr_platform.tracking import Tracking


@pytest.fixture
def new_run(mlflow_server, tmp_path: Path) -> Callable[[], str]:
    runs = Tracking.open(default_path=tmp_path, experiment="run-log")
    return lambda: runs.start("run", params={}, tags={})


@pytest.fixture
def picture(tmp_path: Path) -> str:
    """Path of a PNG."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float, int]]:
    """(step, value, timestamp in ms) of everything logged, in the server's order."""
    return [(m.step, m.value, m.timestamp) for m in MlflowClient(uri).get_metric_history(run_id, key)]


def picture_names(uri: str, run_id: str) -> list[str]:
    return sorted(file.path for file in MlflowClient(uri).list_artifacts(run_id, "images"))


def test_every_step_arrives_in_order(mlflow_server, new_run) -> None:
    run_id = new_run()
    log = RunLog(mlflow_server.uri, run_id)
    log.log([Metric("train/loss", 1.0 / (step + 1), step) for step in range(1200)])
    log.log([Metric("train/updates", 1200, 1200), Metric("train/grad_norm", math.nan, 1200)])
    log.log([Metric("train/loss_scale", math.inf, 1200)])
    assert log.flush(30)
    assert log.pending() == []
    assert [(step, value) for step, value, _ in history(mlflow_server.uri, run_id, "train/loss")] == [
        (step, 1.0 / (step + 1)) for step in range(1200)
    ]
    latest = log.latest()
    assert (latest["train/loss"], latest["train/updates"]) == (1 / 1200, 1200)
    assert math.isnan(latest["train/grad_norm"])
    assert latest["train/loss_scale"] > 1e300  # MLflow stores the largest number
    log.close()


def test_pictures_bear_the_names_that_mlflow_shows_with_a_slider(mlflow_server, new_run, picture) -> None:
    run_id = new_run()
    log = RunLog(mlflow_server.uri, run_id)
    for step in (0, 10):
        log.image("validation/cat (1)", picture, step)
    assert log.flush(30)
    log.close()
    names = picture_names(mlflow_server.uri, run_id)
    # key, step, timestamp and an id, each picture once as it is and once small; the page splits them at the "+".
    pattern = r"images/validation~cat _1_\+step\+(\d+)\+timestamp\+\d+\+[0-9a-f-]+(\.png|\+compressed\.webp)"
    found = [re.fullmatch(pattern, name) for name in names]
    assert sorted(match.groups() for match in found if match) == [
        (step, kind) for step in ("0", "10") for kind in ("+compressed.webp", ".png")
    ]
    client = MlflowClient(mlflow_server.uri)
    assert client.get_run(run_id).data.tags["mlflow.loggedImages"] == "True"
    stored = client.download_artifacts(run_id, next(name for name in names if name.endswith(".png")))
    assert np.array_equal(np.asarray(Image.open(stored)), np.asarray(Image.open(picture)))


@pytest.mark.slow
def test_a_killed_server_stops_nothing_and_gets_everything_when_it_is_back(
    mlflow_server, new_run, picture, monkeypatch, caplog
) -> None:
    caplog.set_level(logging.INFO, "sr_platform.run_log")
    monkeypatch.setattr(mlflow_client, "LONGEST_WAIT_S", 1.0)
    run_id = new_run()
    log = RunLog(mlflow_server.uri, run_id)
    log.log([Metric("train/loss", 0.0, 0)])
    assert log.flush(30)
    assert log.latest() == {"train/loss": 0.0}
    mlflow_server.kill()

    first_ms, calls_s = int(time.time() * 1000), 0.0
    for step in range(1, 2001):
        started_s = time.perf_counter()
        log.log([Metric("train/loss", step / 2, step), Metric("train/lr", 1e-5, step)])
        if step % 1000 == 0:
            log.image("validation/cat", picture, step)
        calls_s += time.perf_counter() - started_s
    last_ms = int(time.time() * 1000)
    assert calls_s < 0.2, "2,000 calls take 20 ms"
    assert log.latest() == {"train/loss": 0.0}
    assert not log.flush(1.5)
    assert len(log.pending()) == 2 * 2000 + 2

    mlflow_server.start()
    started_ms = int(time.time() * 1000)
    assert log.flush(30)
    log.close()
    arrived = history(mlflow_server.uri, run_id, "train/loss")
    assert [(step, value) for step, value, _ in arrived] == [(step, step / 2) for step in range(2001)]
    times_ms = [timestamp for _, _, timestamp in arrived[1:]]
    assert times_ms == sorted(times_ms)
    assert first_ms <= times_ms[0] <= times_ms[-1] <= last_ms < started_ms
    assert len(picture_names(mlflow_server.uri, run_id)) == 4
    ours = [record for record in caplog.records if record.name == "sr_platform.run_log"]
    assert [record.levelname for record in ours] == ["WARNING", "INFO"]
    assert "Connection refused" in ours[0].getMessage()
    assert "caught up with 4002 entries" in ours[1].getMessage()


def test_a_server_that_hangs_blocks_nobody(mlflow_server, new_run) -> None:
    run_id = new_run()
    log = RunLog(mlflow_server.uri, run_id)
    mlflow_server.signal(signal.SIGSTOP)
    try:
        started_s = time.perf_counter()
        log.log([Metric("train/loss", 0.5, 1)])
        assert time.perf_counter() - started_s < 0.2
        assert not log.flush(0.3)
        assert len(log.pending()) == 1
    finally:
        mlflow_server.signal(signal.SIGCONT)
    assert log.flush(30)
    log.close()
    assert [step for step, _, _ in history(mlflow_server.uri, run_id, "train/loss")] == [1]


def test_who_only_looks_is_not_held_up_by_a_server_that_hangs(mlflow_server, new_run, monkeypatch) -> None:
    log = RunLog(mlflow_server.uri, new_run())
    log.log([Metric("train/loss", 0.5, 1)])
    assert log.flush(30)
    assert log.latest() == {"train/loss": 0.5}
    monkeypatch.setattr(run_log, "_READING_TIMEOUT_S", 0.2)
    num_threads = threading.active_count()
    mlflow_server.signal(signal.SIGSTOP)
    try:
        started_s = time.perf_counter()
        for _ in range(3):
            assert log.latest() == {"train/loss": 0.5}
        assert time.perf_counter() - started_s < 2
        assert threading.active_count() <= num_threads + 1
    finally:
        mlflow_server.signal(signal.SIGCONT)
    log.close()


def test_who_only_looks_at_a_run_that_is_gone_sees_the_last_that_was_known(mlflow_server, caplog) -> None:
    log = RunLog(mlflow_server.uri, "0" * 32)
    for _ in range(2):
        assert log.latest() == {}
    assert caplog.text.count("cannot be read: ") == 1


def test_a_worker_without_credentials_says_at_once_what_it_needs(monkeypatch, caplog) -> None:
    class Guarded(http.server.BaseHTTPRequestHandler):
        taken = 0

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            is_let_in = self.headers["Authorization"] == f"Basic {base64.b64encode(b'user:secret').decode()}"
            Guarded.taken += is_let_in
            self.send_response(200 if is_let_in else 401)
            self.end_headers()
            self.wfile.write(b"{}" if is_let_in else b"You are not authenticated.")

        def log_message(self, *_: object) -> None:
            pass

    caplog.set_level(logging.INFO, "sr_platform.run_log")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}"
    log = RunLog(uri, "0" * 32)
    for step in range(3):
        log.log([Metric("train/loss", 0.5, step)])
        assert not log.flush(0.2)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"cannot be written to {uri}: " in warning
    assert "401" in warning
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in warning
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    assert log.flush(30)
    log.close()
    server.shutdown()
    server.server_close()
    assert Guarded.taken >= 1
    assert "caught up" in caplog.text


def test_what_a_dead_worker_had_pending_is_delivered_once_by_the_next(mlflow_server, new_run, picture) -> None:
    run_id = new_run()
    nowhere = "http://127.0.0.1:1"
    first = RunLog(nowhere, run_id)
    first.log([Metric("train/loss", 0.5, 1), Metric("train/loss", 0.25, 2)])
    first.image("validation/cat", picture, 2)
    assert not first.flush(0.2)
    in_checkpoint = json.loads(json.dumps(first.pending()))
    first.close()
    second = RunLog(nowhere, run_id)
    second.restore(in_checkpoint)
    assert second.step == 2
    assert second.pending() == in_checkpoint
    second.close()
    for _ in range(2):  # the checkpoint before had the same entries
        third = RunLog(mlflow_server.uri, run_id)
        third.restore(in_checkpoint)
        assert third.flush(30)
        third.close()
    logged_ms = [entry["timestamp_ms"] for entry in in_checkpoint]
    assert history(mlflow_server.uri, run_id, "train/loss") == [(1, 0.5, logged_ms[0]), (2, 0.25, logged_ms[1])]
    names = picture_names(mlflow_server.uri, run_id)
    assert {name.split("+")[4] for name in names} == {str(logged_ms[2])}


def test_what_is_refused_is_given_up_alone_and_named_once(mlflow_server, new_run, tmp_path, caplog) -> None:
    log = RunLog(mlflow_server.uri, run_id := new_run())
    log.log([Metric("a", 1.0, 1), Metric("not allowed?", 1.0, 1), Metric("neither?", 1.0, 1), Metric("b", 1.0, 1)])
    log.image("missing", str(tmp_path / "missing.png"), 1)
    (tmp_path / "text.png").write_text("no picture")
    log.image("text", str(tmp_path / "text.png"), 1)
    log.log([Metric("c", 1.0, 1)])
    assert log.flush(30)
    log.close()
    assert log.latest() == {"a": 1.0, "b": 1.0, "c": 1.0}
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2
    assert "not allowed? of step 1 was refused" in errors[0]
    assert f"4 entries of run {run_id} were refused" in errors[1]


def test_a_deleted_run_does_not_hold_up_a_training(mlflow_server, new_run, caplog) -> None:
    run_id = new_run()
    MlflowClient(mlflow_server.uri).delete_run(run_id)
    log = RunLog(mlflow_server.uri, run_id)
    log.log([Metric("train/loss", 1.0, step) for step in range(8)])
    assert log.flush(30)
    log.close()
    assert "must be in the 'active' state" in caplog.text
    assert f"8 entries of run {run_id} were refused" in caplog.text


def test_a_closed_log_says_what_it_could_not_deliver(caplog) -> None:
    log = RunLog("http://127.0.0.1:1", "0" * 32)
    log.log([Metric("train/loss", 1.0, 1)])
    log.close()
    assert "1 entries of run" in caplog.text
    assert log.latest() == {}

"""Restoring by a running service: a real gateway over HTTP, with a worker that needs no model."""

from __future__ import annotations

import http.server
import importlib.util
import json
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from pipelines.restoration import service as client
from pipelines.restoration import service_engine
from pipelines.restoration.recipe import RestoreConfig
from pipelines.restore import estimate, restore
from serve.access import AccessConfig
from serve.gateway import Gateway, GatewayConfig, build_api
from serve.intake import IntakeConfig
from serve.jobs import JobStore, KeyLimits
from sr_platform.config import validate
from sr_platform.errors import ConfigError, RequestError
from sr_platform.storage import Storage, open_storage

KEY = "FAITHDIFF_API_KEY"


def _load(path: Path) -> Any:
    """A file of another folder of tests: they are no packages."""
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


fake_worker = _load(Path(__file__).parents[2] / "serve" / "fake_worker.py")


class Running:
    """A service that can be stopped and started again at the same address, with all it remembers."""

    def __init__(self, folder: Path, cfg: GatewayConfig | None = None) -> None:
        self.store = JobStore(f"sqlite:///{folder}/jobs.db")
        self.storage: Storage = open_storage(folder / "files")
        self.worker = fake_worker.FakeWorker(self.store, self.storage, step_s=0.0)
        self.cfg = cfg or GatewayConfig()
        self.front = Front()
        self._server: Any = None

    def start(self) -> None:
        gateway = Gateway(self.cfg, fake_worker.PatientRestorer(), self.store, self.storage)
        self._server = fake_worker.running_server(build_api(gateway))
        self.front.target = self._server.__enter__()

    def stop(self) -> None:
        self.front.target = ""
        self._server.__exit__(None, None, None)

    @property
    def jobs(self) -> Counter[str]:
        """States of all jobs there ever were."""
        return Counter(job.state.value for job in self.store.list("anybody", state=None, limit=1000, before=None))


class Front(http.server.ThreadingHTTPServer):
    """What stands before the service, at one address: passes requests on; `fault` answers in its place."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.target = ""
        self.fault: Callable[[str, str], tuple[int, dict[str, str], bytes] | None] = lambda method, path: None
        self.asked: Counter[tuple[str, str]] = Counter()
        self.headers: list[Any] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Passing(http.server.BaseHTTPRequestHandler):
    server: Front
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        kind = "result" if path.endswith("/result") else "job" if path.startswith("/v1/jobs/") else path
        self.server.asked[self.command, kind] += 1
        self.server.headers.append(self.headers)
        answer = self.server.fault(self.command, kind)
        if answer is None and not self.server.target:
            self.close_connection = True
            return
        if answer is None:
            skipped = {"host", "content-length", "connection", "accept-encoding"}
            headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
            got = httpx.request(self.command, self.server.target + self.path, content=body, headers=headers, timeout=30)
            answer = got.status_code, dict(got.headers), got.content
        self.send_response_only(answer[0])
        for name, value in answer[1].items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer[2])))
        self.end_headers()
        self.wfile.write(answer[2])

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A service with a worker, and a client that makes short pauses."""
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(client, "LONGEST_WAIT_S", 0.1)
    monkeypatch.setattr(service_engine, "FIRST_POLL_S", 0.02)
    monkeypatch.setattr(service_engine, "LONGEST_POLL_S", 0.1)
    (tmp_path / "service").mkdir()
    running = Running(tmp_path / "service")
    running.start()
    running.worker.start()
    yield running
    running.worker.close()
    running.stop()
    running.front.shutdown()
    running.front.server_close()


@pytest.fixture
def folder(tmp_path: Path, picture_file: Callable[..., bytes]) -> Path:
    """Six pictures in two folders, one with a caption, and a broken one."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for index in range(5):
        (folder / f"{index}.png").write_bytes(picture_file(24, 32, index))
    Image.new("RGB", (20, 10), "teal").save(folder / "deep" / "a.jpg")
    (folder / "deep" / "a.txt").write_text("A teal wall.")
    (folder / "broken.png").write_bytes(picture_file(24, 32)[:200])
    return folder


def config(folder: Path, url: str, **changes: Any) -> RestoreConfig:
    out = str(folder.with_name("out"))
    base = {"input": str(folder), "out": out, "endpoint": url, "scale": 2, "num_inference_steps": 2}
    return validate(RestoreConfig, {**base, **changes}, where="test")


def test_a_folder_goes_through_the_service_and_comes_back_once(running: Running, folder: Path, tmp_path: Path) -> None:
    url = running.front.url
    text = estimate(config(folder, url))
    assert "seconds      about 0 of one device (told by" in text
    assert "price        about 0.00 USD" in text
    report = restore(config(folder, url))
    assert report.counts == {"done": 6, "skipped": 0, "failed": 1, "waiting": 0, "pictures": 7}
    entries = {picture["input"]: picture for picture in report.pictures}
    assert entries["deep/a.jpg"]["prompt"] == "A teal wall."
    assert (entries["0.png"]["model_version"], entries["0.png"]["manifest_digest"]) == ("fake/1", "sha256:fa4e")
    assert entries["broken.png"]["error"]["reason"] == "refused by the service"
    assert Image.open(tmp_path / "out" / "deep" / "a_x2.jpg").size == (40, 20)
    assert Image.open(tmp_path / "out" / "deep" / "a_x2.jpg").format == "JPEG"
    assert running.jobs == {"done": 6}
    again = restore(config(folder, url))
    assert again.counts["skipped"] == 6
    assert running.jobs == {"done": 6}
    with pytest.raises(ConfigError, match=r"made otherwise \(guidance_scale\)"):
        restore(config(folder, url, guidance_scale=3.0))


def test_refusals_for_now_restarts_and_damaged_results_are_waited_out(
    running: Running, folder: Path, tmp_path: Path
) -> None:
    front = running.front
    busy = {"Content-Type": "application/problem+json", "Retry-After": "0.1"}
    queue_full = json.dumps({"type": "urn:faithdiff:problem:queue-full", "detail": "come later"}).encode()

    def fault(method: str, kind: str) -> tuple[int, dict[str, str], bytes] | None:
        count = front.asked[method, kind]
        if kind == "/v1/jobs" and count % 3 == 1:
            return (503, busy, queue_full) if count % 2 else (429, busy, b"{}")
        if kind == "job" and count % 4 == 2:
            return 502, {}, b"<html>Bad gateway</html>"
        if kind == "result" and count < 4:
            return 200, {}, b"half a picture"
        return None

    front.fault = fault

    def restart() -> None:
        while running.jobs["done"] < 2:
            time.sleep(0.01)
        running.stop()
        time.sleep(0.3)
        running.start()

    thread = threading.Thread(target=restart, daemon=True)
    thread.start()
    report = restore(config(folder, front.url, service={"max_in_flight": 2}))
    thread.join(timeout=30)
    assert report.counts["done"] == 6
    assert running.jobs == {"done": 6}
    assert front.asked["POST", "/v1/jobs"] > 7


def test_a_run_that_is_cut_off_finds_its_jobs_again(running: Running, folder: Path) -> None:
    front = running.front
    front.fault = lambda method, kind: (
        (502, {}, b"away") if kind == "result" and front.asked[method, kind] > 2 else None
    )
    with pytest.raises(client.ServiceDownError, match=r"no answer from .* run the same command again"):
        restore(config(folder, front.url, service={"give_up_after_s": 1.0}))
    report = json.loads((folder.with_name("out") / "restore_report.json").read_text())
    assert report["counts"]["done"] == 2
    assert report["counts"]["waiting"] + report["counts"]["failed"] == 5
    front.fault = lambda method, kind: None
    again = restore(config(folder, front.url))
    assert (again.counts["skipped"], again.counts["done"], again.counts["failed"]) == (2, 4, 1)
    assert running.jobs == {"done": 6}


def test_a_job_that_failed_is_reported_and_tried_again_by_the_next_run(running: Running, folder: Path) -> None:
    (folder / "deep" / "a.txt").write_text("fail")
    url = running.front.url
    report = restore(config(folder, url, include=("deep/**",)))
    (entry,) = report.pictures
    assert entry["error"] == {
        "reason": "refused by model",
        "detail": "picture: the model refuses it, as its prompt asks",
    }
    restore(config(folder, url, include=("deep/**",)))
    assert running.jobs == {"failed": 2}


def test_a_key_comes_from_the_environment_and_is_never_told(
    tmp_path: Path,
    folder: Path,
    running: Running,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    running.stop()
    running.cfg = GatewayConfig(access=AccessConfig(mode="keys"), intake=IntakeConfig())
    running.start()
    _, key = running.store.create_key("test", limits=KeyLimits())
    monkeypatch.setenv(KEY, f"{key}-wrong")
    with pytest.raises(RequestError, match=f"HTTP 401; put a valid key into the environment variable '{KEY}'"):
        restore(config(folder, running.front.url))
    monkeypatch.setenv(KEY, key)
    assert restore(config(folder, running.front.url)).counts["done"] == 6
    told = capsys.readouterr()
    assert key not in caplog.text + told.out + told.err
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert key.encode() not in written


def test_an_address_where_nothing_answers_is_refused_at_once(
    folder: Path, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_CHECK_PATIENCE_S", 0.2)
    running.front.fault = lambda method, kind: (404, {}, b"nothing here")
    with pytest.raises(RequestError, match="has no /v1/models; give the service's address"):
        restore(config(folder, running.front.url))
    with pytest.raises(RequestError, match=r"does not answer .*; start the service or correct --endpoint"):
        restore(config(folder, "http://127.0.0.1:9"))
    assert not folder.with_name("out").exists()


def test_captions_come_from_an_endpoint_for_pictures_that_have_none(running: Running, folder: Path) -> None:
    captions = _load(Path(__file__).parents[1] / "stages" / "test_caption_endpoint.py")
    with captions.serving() as server:
        caption = {"mode": "endpoint", "model": captions.MODEL, "endpoint": {"base_url": server.base_url}}
        report = restore(config(folder, running.front.url, caption=caption))
        prompts = {picture["input"]: picture.get("prompt") for picture in report.pictures}
        shown = [captions.shown_picture(body) for body in server.bodies[1:]]
    assert prompts["deep/a.jpg"] == "A teal wall."
    described = {prompts[f"{index}.png"] for index in range(5)}
    assert len(described) == 5
    assert all(prompt.startswith("A ") or "in the" in prompt for prompt in described)
    assert {picture.shape for picture in shown} == {(24, 32, 3)}
    assert np.unique([int(picture.sum()) for picture in shown]).size == 5

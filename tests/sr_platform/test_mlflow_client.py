from __future__ import annotations

import base64
import http.server
import itertools
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator

import pytest
import requests
from mlflow.exceptions import MlflowException, RestException

from sr_platform import mlflow_client
from sr_platform.errors import InputDataError, RequestError, StorageError, TrackingError
from sr_platform.mlflow_client import at_start, is_passing, open_client, patiently, public_uri, reason, waits_s


class Recorder(http.server.BaseHTTPRequestHandler):
    """Answers every request with `status` and keeps its Authorization header."""

    seen: list[str | None]
    status = 200
    body = json.dumps({"experiment": {"experiment_id": "7"}}).encode()

    def do_GET(self) -> None:
        self.seen.append(self.headers["Authorization"])
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def recorder() -> Iterator[tuple[str, type[Recorder]]]:
    """host:port of a server, and its handler."""
    handler = type("Handler", (Recorder,), {"seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def status_error(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError("refused", response=response)


@pytest.mark.parametrize(
    "error",
    [
        MlflowException("connection refused"),
        MlflowException("database is locked", error_code=8),  # TEMPORARILY_UNAVAILABLE
        RestException({"error_code": "UNAUTHENTICATED", "message": "token expired"}),
        ConnectionResetError("reset"),
        TimeoutError("timed out"),
        status_error(503),
        status_error(429),
        StorageError("still failed"),
    ],
)
def test_what_may_pass_is_tried_again(error: Exception) -> None:
    assert is_passing(error)


@pytest.mark.parametrize(
    "error",
    [
        RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "bad name"}),
        RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}),
        status_error(413),
        InputDataError("no such picture"),
        TypeError("a bug"),
    ],
)
def test_a_verdict_is_final(error: Exception) -> None:
    assert not is_passing(error)


def test_waits_grow_to_half_a_minute() -> None:
    assert list(itertools.islice(waits_s(), 7)) == [1, 2, 4, 8, 16, 30, 30]


def test_patience_ends_where_waiting_does_not_help(monkeypatch, caplog) -> None:
    monkeypatch.setattr(mlflow_client, "FIRST_WAIT_S", 0.01)
    caplog.set_level(logging.INFO, "sr_platform")
    answers: list[Exception | str] = [ConnectionError("lost"), ConnectionError("lost"), "answer"]

    def call() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently("http://host", call) == "answer"
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    answers += [ConnectionError("lost"), TypeError("a bug")]
    with pytest.raises(TypeError, match="a bug"):
        patiently("http://host", call)
    answers += [ConnectionError("lost")] * 9
    with pytest.raises(TrackingError, match="http://host does not answer: lost; start the server"):
        patiently("http://host", call, patience_s=0.05)


def test_a_password_leaves_the_uri_and_still_opens_the_door(recorder, monkeypatch) -> None:
    address, handler = recorder
    basic = f"Basic {base64.b64encode(b'user:p@ss').decode()}"
    uri = f"http://user:p%40ss@{address}"
    client = open_client(uri)
    assert client.tracking_uri == public_uri(uri) == f"http://{address}"
    assert client.get_experiment_by_name("x").experiment_id == "7"
    assert handler.seen == [basic]
    # A worker is given the public URI, and finds the password in its environment.
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    open_client("http://127.0.0.1:1")
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ, "another server must not get it"
    at_start(f"http://{address}", lambda client: client.get_experiment_by_name("x"))
    assert handler.seen == [basic] * 3


def test_a_password_is_never_told(monkeypatch, caplog) -> None:
    monkeypatch.setattr(mlflow_client, "START_PATIENCE_S", 0.1)
    for uri in ("http://user:secret@127.0.0.1:1", "htp://user:secret@host"):
        with pytest.raises(RequestError, match="tracking: ") as caught:
            at_start(uri, lambda client: client.get_experiment_by_name("x"))
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
    assert "does not answer" in caplog.text
    assert "secret" not in caplog.text
    database = "postgresql://user:secret@host/db"
    assert reason(MlflowException(f"no route to {database}"), database) == "no route to postgresql://user:***@host/db"


def test_a_server_that_fails_at_the_start_is_named(recorder, monkeypatch) -> None:
    monkeypatch.setattr(mlflow_client, "START_PATIENCE_S", 0.1)
    address, handler = recorder
    handler.status = 500
    with pytest.raises(RequestError, match=f"http://{address} does not answer: .*500.*; start the server, or unset"):
        at_start(f"http://{address}", lambda client: client.get_experiment_by_name("x"))


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_wants_credentials_is_said_to_want_them(recorder, monkeypatch, status: int) -> None:
    monkeypatch.setattr(mlflow_client, "START_PATIENCE_S", 0.1)
    address, handler = recorder
    handler.status = status
    monkeypatch.setattr(handler, "body", b"You are not authenticated.")
    with pytest.raises(
        RequestError, match=rf"http://{address} refuses: .*{status}.*; give this process MLFLOW_TRACKING"
    ):
        at_start(f"http://{address}", lambda client: client.get_experiment_by_name("x"))


def test_a_host_that_swallows_requests_does_not_hold_up_the_start(monkeypatch) -> None:
    monkeypatch.setattr(mlflow_client, "START_PATIENCE_S", 0.1)
    monkeypatch.setattr(mlflow_client, "_PROBE_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RequestError, match=r"does not answer: .*timed out"):
            at_start(uri, lambda client: client.get_experiment_by_name("x"))


@pytest.mark.parametrize("uri", ["/some/folder", "file:///some/folder", "htp://host"])
def test_a_uri_that_mlflow_does_not_know_is_refused_at_once(uri: str) -> None:
    with pytest.raises(RequestError, match=r"cannot be used: .*; set MLFLOW_TRACKING_URI to http://host:port or"):
        at_start(uri, lambda client: client.get_experiment_by_name("x"))


def test_mlflows_own_retries_are_off_unless_the_user_wants_them(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    open_client("http://127.0.0.1:1")
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
    open_client("http://127.0.0.1:1")
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "5"

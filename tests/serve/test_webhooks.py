from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

from serve.problems import Problem
from serve.webhooks import WebhookConfig, WebhookSender, _is_public

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Receiver:
    """A real HTTP server that remembers what it got and answers what it is told to."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.received: list[tuple[dict[str, str], bytes]] = []
        handler = type("Handler", (_Hook,), {"receiver": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}/hook?x=1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Hook(http.server.BaseHTTPRequestHandler):
    receiver: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.receiver.received.append(({**self.headers, "path": self.path}, body))
        status = self.receiver.answers.pop(0) if self.receiver.answers else 200
        if status == 0:
            time.sleep(2)
            return
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    running = Receiver()
    yield running
    running.stop()


@pytest.fixture
def secret_path(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("a secret of more than sixteen bytes\n")
    return path


def _sender(secret_path: Path, *hosts: str, private: tuple[str, ...] = (), **settings: Any) -> WebhookSender:
    return WebhookSender(WebhookConfig(allowed_hosts=hosts, private_hosts=private, secret_path=secret_path, **settings))


async def test_a_webhook_is_signed_as_standard_webhooks_says(receiver: Receiver, secret_path: Path) -> None:
    sender = _sender(secret_path, receiver.host, private=(receiver.host,))
    sent = await sender.deliver(receiver.url, webhook_id="msg_1", key_id="key-a", body=b'{"type": "job.done"}')
    assert sent.is_done
    ((headers, body),) = receiver.received
    assert (headers["path"], headers["Host"]) == ("/hook?x=1", receiver.host)
    assert json.loads(body) == {"type": "job.done"}
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 5
    secret = base64.b64decode(sender.secret_of("key-a").removeprefix("whsec_"))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"


def test_every_key_has_a_secret_of_its_own_that_lasts(secret_path: Path) -> None:
    sender = _sender(secret_path, "hooks.example.com")
    assert sender.secret_of("a") == _sender(secret_path, "other.example.com").secret_of("a")
    assert sender.secret_of("a") != sender.secret_of("b")


@pytest.mark.parametrize(("status", "is_done", "is_final"), [
    (200, True, False), (204, True, False), (302, False, False), (400, False, False), (410, False, True),
    (503, False, False),
])  # fmt: skip
async def test_only_a_2xx_is_heard_and_no_redirect_is_followed(
    receiver: Receiver, secret_path: Path, status: int, is_done: bool, is_final: bool
) -> None:
    receiver.answers = [status]
    sender = _sender(secret_path, receiver.host, private=(receiver.host,))
    sent = await sender.deliver(receiver.url, webhook_id="1", key_id="k", body=b"{}")
    assert (sent.is_done, sent.is_final, sent.detail) == (is_done, is_final, f"answered {status}")
    assert [headers["path"] for headers, _ in receiver.received] == ["/hook?x=1"]


async def test_a_silent_server_is_given_up_in_time(receiver: Receiver, secret_path: Path) -> None:
    receiver.answers = [0]
    sender = _sender(secret_path, receiver.host, private=(receiver.host,), timeout_s=0.2)
    started_s = time.monotonic()
    sent = await sender.deliver(receiver.url, webhook_id="1", key_id="k", body=b"{}")
    assert (sent.is_done, sent.is_final) == (False, False)
    assert time.monotonic() - started_s < 1.5


async def test_what_is_gone_is_told_and_not_raised(secret_path: Path) -> None:
    for host in ("127.0.0.1:9", "nowhere.invalid:80", f"{'x' * 70}.example.com"):
        sender = _sender(secret_path, host, private=(host,))
        sent = await sender.deliver(f"http://{host}/", webhook_id="1", key_id="k", body=b"{}")
        assert (sent.is_done, sent.is_final) == (False, False), host
        assert sent.detail


@pytest.mark.parametrize(("url", "says"), [
    ("https://evil.example.org/", "not to this one"),
    ("https://hooks.example.com.evil.org/", "not to this one"),
    ("https://example.com/", "not to this one"),
    ("https://hooks.example.com:8443/", "not to this one"),
    ("https://127.0.0.1/", "not to this one"),
    ("http://hooks.example.com/", "https://"),
    ("https://user:word@hooks.example.com/", "a user"),
    ("https://hooks.example.com\\@evil.org/", "blanks or backslashes"),
    ("https://hooks.example.com/a b", "blanks"),
    ("https://hooks.example.com/\r\nX: y", "blanks"),
    ("ftp://hooks.example.com/", "must be a URL"),
    ("file:///etc/passwd", "must be a URL"),
    ("https://hooks.example.com:0/", "must be a URL"),
    ("https://hooks.example.com:99999/", "not a URL"),
    ("https://[::1/", "not a URL"),
    ("https://h\u00f6oks.example.com/", "must be a URL"),
    ("", "must be a URL"),
])  # fmt: skip
def test_nothing_is_sent_to_where_the_operator_does_not_allow(secret_path: Path, url: str, says: str) -> None:
    sender = _sender(secret_path, "hooks.example.com", "*.allowed.example.com")
    with pytest.raises(Problem, match=says) as caught:
        sender.check(url)
    assert caught.value.status == 422
    assert not asyncio.run(sender.deliver(url, webhook_id="1", key_id="k", body=b"")).is_done


def test_allowed_hosts_are_allowed(secret_path: Path) -> None:
    sender = _sender(secret_path, "hooks.example.com", "*.allowed.example.com", "other.example.com:8443")
    for url in (
        "https://hooks.example.com/x",
        "https://HOOKS.example.com:443/x?y=z",
        "https://a.b.allowed.example.com/",
        "https://other.example.com:8443/",
    ):
        sender.check(url)


async def test_a_private_address_behind_an_allowed_name_is_refused(receiver: Receiver, secret_path: Path) -> None:
    port = receiver.host.rpartition(":")[2]
    sender = _sender(secret_path, f"localhost:{port}")
    sent = await sender.deliver(f"https://localhost:{port}/", webhook_id="1", key_id="k", body=b"{}")
    assert "private address" in sent.detail
    assert receiver.received == []


@pytest.mark.parametrize("address", [
    "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.1", "224.0.0.1",
    "::1", "::", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
])  # fmt: skip
def test_addresses_that_are_not_public_are_known(address: str) -> None:
    assert not _is_public(address)


def test_public_addresses_are_public() -> None:
    assert _is_public("93.184.216.34")
    assert _is_public("2606:2800:220:1::1")


def test_retries_wait_longer_each_time_and_end(secret_path: Path) -> None:
    sender = _sender(secret_path, "h.example.com", retry_delays_s=(5, 60))
    assert [sender.retry_at(n, 100.0) for n in (1, 2, 3)] == [105.0, 160.0, None]


def test_settings_that_contradict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(pydantic.ValidationError, match="secret_path"):
        WebhookConfig(allowed_hosts=("h.example.com",))
    with pytest.raises(pydantic.ValidationError, match="not among allowed_hosts"):
        WebhookConfig(private_hosts=("h",))
    (tmp_path / "short").write_text("short")
    with pytest.raises(ValueError, match="at least 16"):
        _sender(tmp_path / "short", "h.example.com")

"""What every answer carries, whoever makes it: a request id, a trace id, security headers; and one line in the log.

A pure ASGI layer around the application. Errors that nobody foresaw become problem JSON here, so that those answers
carry the same headers.
"""

from __future__ import annotations

import logging
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.problems import Problem, internal_error
from serve.tracing import entered, from_traceparent, key_hash

logger = logging.getLogger(__name__)

_MAX_HEADER_BYTES = 32 * 1024
_API_PREFIX = "/v1/"
_SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_API_CSP = "default-src 'none'; frame-ancestors 'none'; sandbox"
_PAGE_CSP = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)


class Envelope:
    """The layer. Browsers keep the answers from pages of other origins unless they are `is_shared`."""

    def __init__(self, app: ASGIApp, *, is_shared: bool = False) -> None:
        self._app, self._is_shared = app, is_shared

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, send, is_shared=self._is_shared)
        with entered(answer.trace, request_id=answer.request_id):
            try:
                _check_headers(scope)
                await self._app(scope, receive, answer.send)
            except _TooLarge as problem:
                await problem.response(scope["path"])(scope, receive, answer.send)
            except Exception as error:
                logger.error("serve: %s failed", answer.name, exc_info=error)
                if answer.status:
                    raise  # half an answer is out: the server can only cut the connection
                await internal_error().response(scope["path"])(scope, receive, answer.send)
            finally:
                answer.log()


class _TooLarge(Problem):
    """Headers that are too long."""


def _check_headers(scope: Scope) -> None:
    num_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
    if num_bytes > _MAX_HEADER_BYTES:
        detail = f"request: {num_bytes:,} bytes of headers came; at most {_MAX_HEADER_BYTES:,} are allowed"
        raise _TooLarge(431, "headers-too-large", detail)


class _Answer:
    """One request's ids, and what was answered."""

    def __init__(self, scope: Scope, send: Send, *, is_shared: bool) -> None:
        self.trace = from_traceparent(Headers(scope=scope).get("traceparent"))
        self.request_id = secrets.token_hex(8)
        # Line breaks and the like in a path must not forge lines of the log.
        self.name = f"{scope['method']} {scope['path'].encode('unicode_escape').decode()}"
        self.status, self._started_s = 0, time.monotonic()
        self._send, self._is_shared = send, is_shared
        self._path = scope["path"].removeprefix(scope.get("root_path", ""))
        # Of this request alone, whatever the server shares.
        self._state: dict[str, Any] = dict(scope.get("state", {}))
        scope["state"] = self._state
        self._state["trace_id"], self._state["request_id"] = self.trace.trace_id, self.request_id

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._add_headers(MutableHeaders(scope=message))
        await self._send(message)

    def _add_headers(self, headers: MutableHeaders) -> None:
        is_api = self._path.startswith(_API_PREFIX)
        headers["X-Request-Id"] = self.request_id
        headers["traceparent"] = f"00-{self.trace.trace_id}-{self.request_id}-01"
        headers["Content-Security-Policy"] = _API_CSP if is_api else _PAGE_CSP
        headers["Cross-Origin-Resource-Policy"] = "cross-origin" if self._is_shared else "same-origin"
        for name, value in _SECURITY.items():
            headers[name] = value
        if is_api:
            headers.setdefault("Cache-Control", "no-store")

    def log(self) -> None:
        # The query is left out: what people put there is none of the log's business.
        seconds = time.monotonic() - self._started_s
        caller = self._state.get("caller")
        extra = {"key": key_hash(caller.name)} if caller is not None else {}
        logger.info("request: %s answered %s in %.3f s", self.name, self.status, seconds, extra=extra)

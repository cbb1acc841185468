"""A client of the running service (`serve/`): jobs, results and estimates over HTTP, with patience.

    async with Service(url, cfg) as service:
        job, is_replayed = await service.submit(data, "beach.jpg", fields, idempotency_key=key)
        job = await service.job(job["id"])
        data = await service.result(job)

Whatever passes by itself (429, 5xx, cut connections) is asked again, as late as Retry-After says, until
`give_up_after_s` have gone by without a single answer. The key comes from the environment and reaches no message.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any

import httpx

from pipelines.restoration.recipe import ServiceConfig
from sr_platform.errors import RequestError

log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 30.0
FIRST_NOTICE_S = 10.0
_CHECK_PATIENCE_S = 10.0
_DAMAGED_RESULTS = 5
_CONNECT_TIMEOUT_S = 10.0
_PICTURE_REFUSED = {400, 413, 415, 422}
_KEY_REFUSED = {401, 403}
_NOT_NOW = {408, 425, 429}

Job = dict[str, Any]


class ServiceDownError(RuntimeError):
    """The service gave no answer for as long as the run may wait."""


class PictureRefusedError(Exception):
    """The service will never take this picture with these fields; the message is its own."""


class NoSuchJobError(Exception):
    """The job or its result is not there any more."""


class _PassingError(Exception):
    """May work the next time. `is_alive`: the service told us so itself, and is only busy."""

    def __init__(self, what: str, *, retry_after_s: float = 0.0, is_alive: bool = False) -> None:
        super().__init__(what)
        self.retry_after_s, self.is_alive = retry_after_s, is_alive


class Service:
    """One connection pool; safe to use from many tasks of one event loop."""

    def __init__(self, url: str, cfg: ServiceConfig, notify: Callable[[str], None] = log.warning) -> None:
        self.url, self._cfg, self._notify = url, cfg, notify
        self._key = _api_key(cfg.api_key_env)
        self._silent_since: float | None = None
        self._next_notice_s = FIRST_NOTICE_S
        self._ask_at = 0.0
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(cfg.timeout_s, connect=min(_CONNECT_TIMEOUT_S, cfg.timeout_s)),
            limits=httpx.Limits(max_connections=cfg.max_in_flight + 4),
        )

    async def __aenter__(self) -> Service:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def model(self) -> tuple[str, str | None]:
        """Version and manifest digest of the model it serves; an empty version where no replica is there to ask.

        Raises:
            RequestError: nothing answers there, or no service of ours, or the key is refused.
        """
        give_up_s = time.monotonic() + min(_CHECK_PATIENCE_S, self._cfg.give_up_after_s)
        for failures in itertools.count():
            try:
                return _first_model(await self._send("GET", "/v1/models"))
            except _PassingError as error:
                if time.monotonic() > give_up_s:
                    if error.is_alive:
                        return "", None
                    raise RequestError(
                        f"restore: {self.url} does not answer ({error}); start the service or correct --endpoint"
                    ) from None
                await asyncio.sleep(_pause_s(failures))
            except (NoSuchJobError, PictureRefusedError):
                raise RequestError(
                    f"restore: {self.url} answers and has no /v1/models; give the service's address as --endpoint"
                ) from None
        raise AssertionError("unreachable")

    async def submit(self, data: bytes, name: str, fields: dict[str, Any], *, idempotency_key: str) -> tuple[Job, bool]:
        """The accepted job, and whether it was there before.

        Raises:
            PictureRefusedError: the picture or a field is none that it takes.
            RequestError, ServiceDownError: as every other call.
        """
        form = {field: _as_text(value) for field, value in fields.items()}
        answer = await self._persistently(
            "POST",
            "/v1/jobs",
            data=form,
            files={"picture": (name, data)},
            headers={"Idempotency-Key": idempotency_key},
        )
        job: Job = answer.json()
        return job, answer.headers.get("Idempotency-Replayed") == "true"

    async def job(self, job_id: str) -> Job:
        """As it is now. Raises NoSuchJobError when it has expired."""
        found: Job = (await self._persistently("GET", f"/v1/jobs/{job_id}")).json()
        return found

    async def result(self, job: Job) -> bytes:
        """The file of a job that is done, with the size and the digest that the job tells.

        Raises:
            NoSuchJobError: it was removed.
            ServiceDownError: what arrives is damaged, several times.
        """
        expected = job["result"]
        for _ in range(_DAMAGED_RESULTS):
            data = (await self._persistently("GET", expected["url"])).content
            if (len(data), hashlib.sha256(data).hexdigest()) == (expected["bytes"], expected["sha256"]):
                return data
            await asyncio.sleep(FIRST_WAIT_S)
        raise ServiceDownError(f"restore: the result of job {job['id']} arrives damaged, {_DAMAGED_RESULTS} times")

    async def estimate(self, size_px: tuple[int, int], fields: dict[str, Any]) -> dict[str, Any]:
        """Tiles, device seconds, price and wait of a picture of (width, height) px. Raises PictureRefusedError."""
        body = {"width": size_px[0], "height": size_px[1], **fields}
        found: dict[str, Any] = (await self._persistently("POST", "/v1/estimate", json=body)).json()
        return found

    async def _persistently(self, method: str, path: str, **content: Any) -> httpx.Response:
        for failures in itertools.count():
            await self._wait()
            try:
                answer = await self._send(method, path, **content)
            except _PassingError as failure:
                self._failed(failure)
                await asyncio.sleep(_pause_s(failures))
            except (PictureRefusedError, NoSuchJobError):
                self._answered()
                raise
            else:
                self._answered()
                return answer
        raise AssertionError("unreachable")

    async def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            async with asyncio.timeout(self._cfg.timeout_s):
                answer = await self._http.request(method, f"{self.url}{path}", **content)
        except TimeoutError:
            raise _PassingError(f"no answer within {self._cfg.timeout_s:g} s") from None
        except httpx.RequestError as error:
            # `from None`: the request that hangs on httpx's errors holds the key.
            raise _PassingError(self._words(f"{type(error).__name__} {error}")) from None
        if answer.is_success:
            return answer
        raise self._failure(answer)

    def _failure(self, answer: httpx.Response) -> Exception:
        """What an error status means."""
        status, said = answer.status_code, self._words(_detail(answer))
        if status in _NOT_NOW or status >= 500:
            # A queue that is full is no outage, however long it stays so.
            is_alive = status == 429 or _kind(answer) in ("queue-full", "not-ready", "no-replica-free")
            return _PassingError(f"HTTP {status}: {said}", retry_after_s=_retry_after_s(answer), is_alive=is_alive)
        if status in _KEY_REFUSED:
            # Not its words: some services repeat the key.
            name = self._cfg.api_key_env
            return RequestError(
                f"restore: {self.url} answered HTTP {status}; put a valid key into the environment variable {name!r} "
                "that service.api_key_env names" + ("" if self._key else ", which is not set")
            )
        if status in (404, 410):
            return NoSuchJobError(said)
        if status in _PICTURE_REFUSED:
            return PictureRefusedError(said)
        return RequestError(f"restore: {answer.url} answered HTTP {status} ({said}); correct --endpoint")

    def _answered(self) -> None:
        if self._silent_since is not None and self._next_notice_s > FIRST_NOTICE_S:
            self._notify(f"restore: {self.url} answers again; going on")
        self._silent_since, self._next_notice_s = None, FIRST_NOTICE_S

    def _failed(self, failure: _PassingError) -> None:
        """Raises ServiceDownError when the silence has lasted too long."""
        now = time.monotonic()
        # For everybody: neither a full queue nor a limit on the rate is meant for one picture.
        self._ask_at = max(self._ask_at, now + failure.retry_after_s)
        if failure.is_alive:
            self._silent_since = None
            return
        self._silent_since = now if self._silent_since is None else self._silent_since
        silent_s = now - self._silent_since
        if silent_s >= self._cfg.give_up_after_s:
            raise ServiceDownError(
                f"restore: no answer from {self.url} for {silent_s:.0f} s (at last {failure}); run the same command "
                "again when it answers: it goes on where it stopped"
            )
        if silent_s >= self._next_notice_s:
            self._notify(f"restore: no answer from {self.url} for {silent_s:.0f} s (at last {failure}); waiting")
            self._next_notice_s = 2 * silent_s

    async def _wait(self) -> None:
        while (left_s := self._ask_at - time.monotonic()) > 0:
            await asyncio.sleep(left_s)

    def _words(self, text: str) -> str:
        line = " ".join(text.split())[:300]
        return line.replace(self._key, "***") if self._key else line


def _api_key(variable: str) -> str:
    """Empty where there is none. Raises RequestError, without the key, when it cannot be sent."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if key and not (key.isascii() and key.isprintable()):
        raise RequestError(
            f"restore: the environment variable {variable} holds unprintable characters; put a key there"
        )
    return key


def _first_model(answer: httpx.Response) -> tuple[str, str | None]:
    """Version and manifest digest. Raises NoSuchJobError when the answer is none of our service's."""
    try:
        first = answer.json()["models"][0]
        return str(first["version"]), first["manifest_digest"]
    except (ValueError, LookupError, TypeError):
        raise NoSuchJobError("no models") from None


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _problem(answer: httpx.Response) -> dict[str, Any]:
    try:
        found = answer.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _detail(answer: httpx.Response) -> str:
    return str(_problem(answer).get("detail") or answer.text or answer.reason_phrase)


def _kind(answer: httpx.Response) -> str:
    return str(_problem(answer).get("type", "")).rpartition(":")[2]


def _retry_after_s(answer: httpx.Response) -> float:
    """Seconds or a date. Source: RFC 9110, 10.2.3."""
    value = answer.headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _pause_s(failures: int) -> float:
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(failures, 16))

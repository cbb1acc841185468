"""Captions from any OpenAI-compatible vision endpoint (vLLM, SGLang, ...): POST {base_url}/chat/completions.

endpoint = CaptionEndpoint(cfg, model="llava-hf/llava-1.5-13b-hf", sampling=SamplingSettings(), max_side_px=672,
                           clean=clean_caption)
endpoint.check()                                    -> raises RequestError unless it knows the model and takes pictures
endpoint.ask(pictures, keys=keys, seed=0)           -> one Answer per picture

An endpoint that fails is waited for: whatever passes by itself (429, 5xx, cut connections, answers that are none) is
asked again, with growing pauses, until `give_up_after_s` have gone by without a single answer. Every request carries a
seed that derives from (seed, key); a caption is as repeatable as the endpoint makes it.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, Any, TypeVar

import cv2
import httpx
import numpy as np
import pydantic
import simplejpeg
from numpy.typing import NDArray

from faithdiff.caption_text import QUESTION, SYSTEM, SamplingSettings, text_seed
from sr_platform.config import StrictConfig
from sr_platform.errors import RequestError

log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
FIRST_NOTICE_S = 10.0
"""Of silence; each further notice comes after twice as long."""
CHECK_PATIENCE_S = 10.0
EMPTY_ATTEMPTS = 4
"""How often a picture is asked about, each time with another seed, before it counts as one without a caption."""
OWN_FAILURES = 20
"""Failures in a row, each while the endpoint answered others, after which the picture is to blame: by pure chance one
picture in a million, where every second request fails."""

_PICTURE_REFUSED = {400, 413, 415, 422}
_KEY_REFUSED = {401, 403}
_NOT_NOW = {408, 409, 425, 429, 503}
_CONNECT_TIMEOUT_S = 10.0

Picture = NDArray[np.uint8]
T = TypeVar("T")


class EndpointConfig(StrictConfig):
    """How the endpoint is reached; nothing here changes what is asked."""

    base_url: str = ""
    """Up to and with its version, as http://host:8000/v1."""
    api_key_env: Annotated[str, pydantic.Field(pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")] = ""
    """Name of the environment variable that holds the key, where the job and its workers run; empty: no key."""
    max_in_flight: pydantic.PositiveInt = 16
    """Requests of one captioning process at once; the endpoint sees `workers.caption_actors` times as many."""
    timeout_s: pydantic.PositiveFloat = 120.0
    """For one answer, from sending the picture to the last word."""
    give_up_after_s: pydantic.PositiveFloat = 3600.0
    """Longest time without a single answer; then the job ends, and the same command goes on where it stopped."""

    @pydantic.field_validator("base_url")
    @classmethod
    def _is_plain_address(cls, base_url: str) -> str:
        if not base_url:
            return base_url
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise ValueError(f"got {base_url!r} ({error}); give http://host:port/v1") from None
        if url.userinfo or url.query or url.fragment:
            # Not repeated: it may hold a key.
            raise ValueError("an address with a user, a query or a fragment; give http://host:port/v1 and api_key_env")
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"got {base_url!r}, no http address; give http://host:port/v1")
        return base_url.rstrip("/")


class EndpointDownError(RuntimeError):
    """The endpoint gave no answer for as long as the job may wait."""


@dataclass(frozen=True)
class Answer:
    """What came of one picture; both are empty when the endpoint said nothing, however often it was asked."""

    caption: str = ""
    refusal: str = ""
    """Why it will not describe this picture."""


class CaptionEndpoint:
    """Asks about pictures, `max_in_flight` at once; keeps no connection and no key between calls."""

    def __init__(
        self,
        cfg: EndpointConfig,
        *,
        model: str,
        sampling: SamplingSettings,
        max_side_px: int,
        clean: Callable[[str], str],
        notify: Callable[[str], None] = log.warning,
    ) -> None:
        self.cfg, self.model, self.sampling, self.max_side_px = cfg, model, sampling, max_side_px
        self.clean = clean
        """What is kept of an answer; where that is nothing, the picture is asked about again."""
        self.notify = notify
        """Told when the endpoint has been silent for long, and when it answers again."""

    def check(self) -> None:
        """Raises RequestError unless the endpoint answers, lets us in, knows the model and lets it see pictures."""
        try:
            asyncio.run(_Session(self, min(CHECK_PATIENCE_S, self.cfg.give_up_after_s)).check())
        except EndpointDownError as error:
            raise RequestError(f"{error}; start the endpoint or correct caption.endpoint.base_url") from None

    def ask(self, pictures: Sequence[Picture], *, keys: Sequence[str], seed: int) -> list[Answer]:
        """One answer per picture, uint8 RGB [H, W, 3], in their order.

        Raises:
            EndpointDownError: no answer to anything for `give_up_after_s`.
            RequestError: the endpoint wants another key, model or address.
        """
        assert len(pictures) == len(keys)
        try:
            return asyncio.run(_Session(self, self.cfg.give_up_after_s).ask_all(pictures, keys, seed))
        except EndpointDownError as error:
            raise EndpointDownError(f"{error}; run the same command again when it answers") from None

    def body(self, picture: Picture, seed: int) -> dict[str, Any]:
        """The request: FaithDiff's system prompt and question, the picture before the words, as LLaVA has it."""
        shown = {"type": "image_url", "image_url": {"url": data_uri(picture, max_side_px=self.max_side_px)}}
        asked = [shown, {"type": "text", "text": QUESTION}]
        return {
            "model": self.model,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}],
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_new_tokens,
            "seed": seed,
        }


def request_seed(seed: int, key: str, attempt: int) -> int:
    """31 bits, because not every endpoint takes more."""
    return text_seed(seed, f"{key} again {attempt}" if attempt else key) % 2**31


def data_uri(picture: Picture, *, max_side_px: int) -> str:
    """A JPEG of quality 95 without chroma subsampling: a quarter of a PNG's bytes, encoded ten times as fast."""
    height_px, width_px = picture.shape[:2]
    scale = max_side_px / max(height_px, width_px)
    if scale < 1:
        size = max(1, round(width_px * scale)), max(1, round(height_px * scale))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=95, colorsubsampling="444")
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


class _PassingError(Exception):
    """May work the next time."""

    def __init__(self, what: str, *, retry_after_s: float = 0.0, is_busy: bool = False) -> None:
        super().__init__(what)
        self.retry_after_s, self.is_busy = retry_after_s, is_busy


class _RefusedError(Exception):
    """Will never work with this picture."""


class _Outage:
    """How long nothing was answered, and when to ask again; shared by all requests of a call."""

    def __init__(self, name: str, give_up_after_s: float, notify: Callable[[str], None]) -> None:
        self.name, self.give_up_after_s, self.notify = name, give_up_after_s, notify
        self.num_answers = 0
        self.since: float | None = None
        self.next_notice_s = FIRST_NOTICE_S
        self.ask_at = 0.0

    def answered(self) -> None:
        if self.since is not None and self.next_notice_s > FIRST_NOTICE_S:
            self.notify(f"caption: {self.name} answers again after {time.monotonic() - self.since:.0f} s; going on")
        self.since, self.next_notice_s = None, FIRST_NOTICE_S
        self.num_answers += 1

    def failed(self, failure: _PassingError) -> None:
        """Raises EndpointDownError when it has lasted too long."""
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        silent_s = now - self.since
        if silent_s >= self.give_up_after_s:
            raise EndpointDownError(f"caption: no answer from {self.name} for {silent_s:.0f} s (at last {failure})")
        if silent_s >= self.next_notice_s:
            left_s = self.give_up_after_s - silent_s
            self.notify(
                f"caption: no answer from {self.name} for {silent_s:.0f} s (at last {failure}); "
                f"waiting, for {left_s:.0f} s more at most"
            )
            self.next_notice_s = 2 * silent_s
        # For everybody: a limit on the rate is not meant for one picture.
        self.ask_at = max(self.ask_at, now + min(failure.retry_after_s, self.give_up_after_s))

    async def wait(self) -> None:
        while (left_s := self.ask_at - time.monotonic()) > 0:
            await asyncio.sleep(left_s)


class _Session:
    """The connections of one call."""

    def __init__(self, endpoint: CaptionEndpoint, give_up_after_s: float) -> None:
        self.endpoint, self.cfg = endpoint, endpoint.cfg
        self.key = _api_key(self.cfg.api_key_env)
        self.outage = _Outage(self.cfg.base_url, give_up_after_s, endpoint.notify)
        self.slots = asyncio.Semaphore(self.cfg.max_in_flight)
        self.http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=httpx.Timeout(None, connect=min(_CONNECT_TIMEOUT_S, self.cfg.timeout_s)),
            limits=httpx.Limits(max_connections=self.cfg.max_in_flight),
        )

    async def check(self) -> None:
        async with self.http:
            models = await self._persistently("", lambda: self._send("GET", "models", _model_names))
            if self.endpoint.model not in models:
                raise RequestError(
                    f"caption: {self.cfg.base_url} serves {', '.join(models) or 'no model'}; "
                    f"caption.model is {self.endpoint.model!r}, set it to one of these"
                )
            try:
                await self._persistently("", self._probe)
            except _RefusedError as error:
                raise RequestError(
                    f"caption: {self.endpoint.model} at {self.cfg.base_url} does not take our pictures ({error}); "
                    "serve a model that sees, or correct caption.max_new_tokens, temperature and top_p"
                ) from None

    async def ask_all(self, pictures: Sequence[Picture], keys: Sequence[str], seed: int) -> list[Answer]:
        async with self.http:
            pairs = zip(pictures, keys, strict=True)
            tasks = [asyncio.create_task(self._ask(picture, key, seed)) for picture, key in pairs]
            try:
                return await asyncio.gather(*tasks)
            finally:
                # One that raised ends the others, before their connections are closed under them.
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, picture: Picture, key: str, seed: int) -> Answer:
        async with self.slots:
            body = self.endpoint.body(picture, 0)
            for attempt in range(EMPTY_ATTEMPTS):
                body["seed"] = request_seed(seed, key, attempt)
                try:
                    text = await self._persistently(key, lambda: self._send("POST", "chat/completions", _text, body))
                except _RefusedError as error:
                    self.outage.answered()
                    return Answer(refusal=str(error))
                if caption := self.endpoint.clean(text):
                    return Answer(caption)
        return Answer()

    async def _persistently(self, key: str, send: Callable[[], Awaitable[T]]) -> T:
        """Sends until there is an answer. Raises _RefusedError when only this request has none."""
        own_failures = 0
        for failures in itertools.count():
            await self.outage.wait()
            num_answers = self.outage.num_answers
            try:
                answer = await send()
            except _PassingError as failure:
                self.outage.failed(failure)
                if not failure.is_busy and await self._answers_others(num_answers, failures):
                    own_failures += 1
                if own_failures == OWN_FAILURES:
                    raise _RefusedError(f"{OWN_FAILURES} failures while others were answered: {failure}") from None
                await asyncio.sleep(_pause_s(key, failures))
            else:
                self.outage.answered()
                return answer
        raise AssertionError("unreachable")

    async def _answers_others(self, num_answers: int, failures: int) -> bool:
        """Whether the endpoint has answered anything since; the last picture left has to ask about a plain one."""
        if self.outage.num_answers == num_answers and failures >= OWN_FAILURES // 4:
            try:
                await self._probe()
            except (_PassingError, _RefusedError):
                return False
            self.outage.answered()
        return self.outage.num_answers > num_answers

    async def _probe(self) -> str:
        """Its answer about a plain gray picture, asked for exactly as about any other."""
        body = self.endpoint.body(np.full((64, 64, 3), 128, np.uint8), 0)
        return await self._send("POST", "chat/completions", _text, body)

    async def _send(self, method: str, path: str, read: Callable[[Any], T], body: dict[str, Any] | None = None) -> T:
        """What `read` finds in the answer. Raises _PassingError, _RefusedError, RequestError."""
        try:
            async with asyncio.timeout(self.cfg.timeout_s):
                response = await self.http.request(method, f"{self.cfg.base_url}/{path}", json=body)
        except TimeoutError:
            raise _PassingError(f"no answer within {self.cfg.timeout_s:g} s") from None
        except httpx.RequestError as error:
            # `from None`: the request that hangs on httpx's errors holds the key.
            raise _PassingError(_line(f"{type(error).__name__} {error}")) from None
        if not response.is_success:
            raise self._failure(response)
        try:
            return read(response.json())
        except (ValueError, LookupError, TypeError):
            raise _PassingError(f"an answer that is none: {self._words(response)!r}") from None

    def _failure(self, response: httpx.Response) -> Exception:
        """What an error status means."""
        status, where = response.status_code, f"caption: {response.url} answered HTTP {response.status_code}"
        said = f"HTTP {status}: {self._words(response)}"
        if status in _NOT_NOW or status >= 500:
            return _PassingError(said, retry_after_s=_retry_after_s(response), is_busy=status in _NOT_NOW)
        if status in _PICTURE_REFUSED:
            return _RefusedError(said)
        if status in _KEY_REFUSED:
            # Not its words: some repeat the key, or parts of it.
            name = self.cfg.api_key_env
            change = f"put a valid key into {name}" if name else "set it to the variable that holds the key"
            return RequestError(f"{where}, with caption.endpoint.api_key_env {name!r}; {change}")
        return RequestError(f"{where} ({self._words(response)}); correct caption.endpoint.base_url or caption.model")

    def _words(self, response: httpx.Response) -> str:
        text = response.text
        return _line(text.replace(self.key, "***") if self.key else text)


def _api_key(variable: str) -> str:
    """Raises RequestError, without the key, when there is none that can be sent."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        came = "unprintable characters" if key else "nothing"
        raise RequestError(
            f"caption: the environment variable {variable} that caption.endpoint.api_key_env names holds {came}; "
            "put the key there, where the job and its workers run"
        )
    return key


def _text(answer: Any) -> str:
    """Of a chat completion. Raises ValueError and the like when it is none."""
    content = answer["choices"][0]["message"]["content"]
    if content is None:
        return ""
    if not isinstance(content, str):
        raise ValueError("no text")
    # Half a surrogate pair is allowed in JSON, and nowhere else.
    return content.encode(errors="replace").decode()


def _model_names(answer: Any) -> list[str]:
    return [str(model["id"]) for model in answer["data"]]


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds or a date. Source: RFC 9110, 10.2.3."""
    value = response.headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _pause_s(key: str, failures: int) -> float:
    """Doubles up to the longest; spread by the key, so that not all ask at the same moment."""
    longest_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(failures, 16))
    return longest_s * (0.5 + 0.5 * text_seed(failures, key) / 2**63)


def _line(text: str) -> str:
    return " ".join(text.split())[:200]

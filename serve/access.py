"""Who may ask for what: bearer keys with limits of their own, or no keys at all, for programs on this machine."""

from __future__ import annotations

import asyncio
import ipaddress
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from fastapi import Request

from serve.jobs import JobStore, KeyLimits
from serve.openapi import LimitsJson, UsageJson, UsedJson
from serve.problems import Problem
from sr_platform.config import StrictConfig

FORWARDED = ("forwarded", "x-forwarded-for")


class AccessConfig(StrictConfig):
    """Who is let in."""

    mode: Literal["local", "keys", "open"] = "local"
    """local: no keys, and only programs on this machine; keys: a bearer key each; open: everybody, without keys."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages of other hosts that may call this service from browsers, such as https://photos.example.com."""


@dataclass(frozen=True)
class Caller:
    """Whose request this is. `limits` is None without keys: nobody counts then."""

    key_id: str
    name: str
    limits: KeyLimits | None


_ANYBODY = Caller("anybody", "anybody", None)


class Access:
    """Checks a request before its body is read, and counts what each key uses."""

    def __init__(self, cfg: AccessConfig, store: JobStore) -> None:
        self._cfg, self._store = cfg, store

    async def admit(self, request: Request) -> None:
        """Leaves the `Caller` in the request's state. Raises Problem 401 or 403."""
        request.state.caller = await self._identify(request)

    async def take(self, caller: Caller, megapixels: float) -> None:
        """Counts a request of so many megapixels against the limits of its key. Raises Problem 429 beyond them."""
        if caller.limits is not None:
            await asyncio.to_thread(self.take_now, caller, megapixels)

    def take_now(self, caller: Caller, megapixels: float) -> None:
        """As `take`, for whoever is in a thread of their own already."""
        if caller.limits is None:
            return
        verdict = self._store.take(caller.key_id, megapixels)
        if not verdict.allowed:
            raise Problem(429, "limit-reached", f"key: {verdict.reason}", retry_after_s=verdict.retry_after_s)

    async def usage(self, caller: Caller) -> UsageJson:
        """What has been counted of the caller today."""
        num_requests, megapixels = await asyncio.to_thread(self._store.usage, caller.key_id)
        limits = caller.limits
        return UsageJson(
            key=caller.name,
            today=UsedJson(requests=num_requests, megapixels=round(megapixels, 6)),
            limits=LimitsJson(
                requests_per_minute=limits.requests_per_minute if limits else None,
                megapixels_per_day=limits.megapixels_per_day if limits else None,
            ),
        )

    async def _identify(self, request: Request) -> Caller:
        if self._cfg.mode == "open":
            return _ANYBODY
        if self._cfg.mode == "local":
            self._check_local(request)
            return _ANYBODY
        key = await asyncio.to_thread(self._store.key_of, _token(request))
        if key is None:
            raise _unauthorized("key: it is unknown or revoked; ask the operator for another", "invalid_token")
        return Caller(key.id, key.name, key.limits)

    def _check_local(self, request: Request) -> None:
        """A proxy or a browser on this machine may act for somebody else, so the headers they send count, too."""
        peer = request.client.host if request.client else ""
        origin = request.headers.get("origin")
        is_local = (
            is_loopback(peer)
            and is_loopback(_host_of(f"//{request.headers.get('host', '')}"))
            and not any(name in request.headers for name in FORWARDED)
            and (origin is None or origin in self._cfg.allowed_origins or is_loopback(_host_of(origin)))
        )
        if not is_local:
            raise Problem(
                403,
                "local-only",
                "request: without keys this service answers only programs on its own machine; "
                "the operator may set access.mode to keys, or to open",
            )


def _token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise _unauthorized("request: no key; send the header 'Authorization: Bearer <key>'")
    return token.strip()


def _unauthorized(detail: str, error: str = "") -> Problem:
    challenge = 'Bearer realm="faithdiff"' + (f', error="{error}"' if error else "")
    return Problem(401, "unauthorized", detail, headers={"WWW-Authenticate": challenge})


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def caller_of(request: Request) -> Caller:
    """Whom `Access` has let in."""
    caller: Any = request.state.caller
    assert isinstance(caller, Caller)
    return caller

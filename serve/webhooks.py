"""Tells clients' servers that a job has ended: signed, again and again until heard, and only to hosts that are allowed.

Signed as the Standard Webhooks specification says, with a secret of the key that submitted the job:
`webhook-id`, `webhook-timestamp`, and `webhook-signature: v1,base64(HMAC-SHA256(secret, "id.timestamp.body"))`.
Nothing is fetched from these hosts, and no redirect is followed.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import httpx
from pydantic import Field, PositiveFloat, model_validator

from serve.problems import Problem
from sr_platform.config import StrictConfig

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_DEFAULT_PORTS = {"https": 443, "http": 80}


class WebhookConfig(StrictConfig):
    """Whom finished jobs may be sent to, and how patiently."""

    allowed_hosts: tuple[str, ...] = ()
    """Hosts such as hooks.example.com, *.example.com or hooks.example.com:8443; none by default."""
    private_hosts: tuple[str, ...] = ()
    """Of the allowed hosts those that may have private addresses, and be spoken to without TLS."""
    secret_path: Path | None = None
    """File with the secret, at least 16 bytes, from which the signing secret of every key is derived."""
    timeout_s: PositiveFloat = 10.0
    """Longest time for one delivery."""
    retry_delays_s: tuple[PositiveFloat, ...] = Field(default=(5, 60, 300, 1800, 7200, 18_000, 36_000, 50_400))
    """Waits after each failure; then it is given up."""

    @model_validator(mode="after")
    def _private_hosts_are_allowed(self) -> WebhookConfig:
        if missing := sorted(set(self.private_hosts) - set(self.allowed_hosts)):
            raise ValueError(f"private_hosts: {', '.join(missing)} is not among allowed_hosts; name it in both")
        if self.allowed_hosts and self.secret_path is None:
            raise ValueError("secret_path: webhooks are signed, so allowed_hosts needs a file with a secret")
        return self


@dataclass(frozen=True)
class Delivery:
    """What became of one attempt: `is_final` when another would not help."""

    is_done: bool
    is_final: bool
    detail: str


class WebhookSender:
    """Checks addresses when a job is accepted, and delivers when it has ended."""

    def __init__(self, cfg: WebhookConfig) -> None:
        self._cfg = cfg
        self._secret = b"" if cfg.secret_path is None else cfg.secret_path.read_bytes().strip()
        if cfg.secret_path is not None and len(self._secret) < 16:
            raise ValueError(f"webhooks: the secret in {cfg.secret_path} has {len(self._secret)} bytes; at least 16")

    @property
    def is_on(self) -> bool:
        return bool(self._cfg.allowed_hosts)

    @property
    def timeout_s(self) -> float:
        return self._cfg.timeout_s

    def check(self, url: str) -> None:
        """Raises Problem 422 when nothing would be sent to `url`."""
        if reason := self._refusal(url):
            detail = f"webhook_url: {reason}"
            raise Problem(422, "invalid-fields", detail, errors=[{"field": "webhook_url", "detail": reason}])

    def secret_of(self, key_id: str) -> str:
        """The signing secret of a key, as Standard Webhooks libraries take it."""
        return f"whsec_{base64.b64encode(self._derived(key_id)).decode()}"

    def retry_at(self, num_attempts: int, now_s: float) -> float | None:
        """When to try again after so many failed attempts; None when it was the last."""
        delays = self._cfg.retry_delays_s
        return now_s + delays[num_attempts - 1] if num_attempts <= len(delays) else None

    async def deliver(self, url: str, *, webhook_id: str, key_id: str, body: bytes) -> Delivery:
        """One attempt. What the other side does wrong is told, never raised."""
        if reason := self._refusal(url):
            return Delivery(is_done=False, is_final=True, detail=reason)
        headers = self._signed_headers(webhook_id, key_id, body, int(time.time()))
        try:
            async with asyncio.timeout(self._cfg.timeout_s):
                status = await self._post(urlsplit(url), headers, body)
        except (OSError, UnicodeError, httpx.HTTPError, _RefusedAddress) as error:
            return Delivery(is_done=False, is_final=False, detail=f"{type(error).__name__}: {error}"[:200])
        return Delivery(is_done=200 <= status < 300, is_final=status == 410, detail=f"answered {status}")

    async def _post(self, url: SplitResult, headers: dict[str, str], body: bytes) -> int:
        """The status. The address is looked up once, checked, and then connected to, whatever the name says later."""
        host, port = url.hostname or "", url.port or _DEFAULT_PORTS[url.scheme]
        address = await _public_address(host, port, is_private_allowed=self._is_listed(url, self._cfg.private_hosts))
        literal = f"[{address}]" if ":" in address else address
        target = url._replace(netloc=f"{literal}:{port}", fragment="").geturl()
        named = {**headers, "Host": url.netloc}
        # Proxies and certificates of the environment are not for strangers' addresses.
        async with (
            httpx.AsyncClient(timeout=self._cfg.timeout_s, trust_env=False, follow_redirects=False) as client,
            client.stream("POST", target, content=body, headers=named, extensions={"sni_hostname": host}) as response,
        ):
            return response.status_code

    def _refusal(self, url: str) -> str:
        """Why `url` is not sent to; empty when it is."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            return "it is not a URL"
        if parts.scheme not in _DEFAULT_PORTS or not parts.hostname or port == 0 or not url.isascii():
            return "it must be a URL such as https://hooks.example.com/path"
        if parts.username is not None or parts.password is not None or any(c <= " " or c == "\\" for c in url):
            return "it must not hold a user, a password, blanks or backslashes"
        if not self._is_listed(parts, self._cfg.allowed_hosts):
            return "this service sends webhooks only to hosts its operator allows, and not to this one"
        if parts.scheme == "http" and not self._is_listed(parts, self._cfg.private_hosts):
            return "it must begin with https://"
        return ""

    def _is_listed(self, url: SplitResult, listed: tuple[str, ...]) -> bool:
        host, port = (url.hostname or "").rstrip("."), url.port
        is_default = port in (None, _DEFAULT_PORTS[url.scheme])
        return any(_is_named(host, f"{host}:{port}", is_default, entry.lower()) for entry in listed)

    def _derived(self, key_id: str) -> bytes:
        # One secret per key: whoever holds a key could otherwise sign webhooks to all the others.
        return hmac.digest(self._secret, f"webhook {key_id}".encode(), hashlib.sha256)

    def _signed_headers(self, webhook_id: str, key_id: str, body: bytes, now_s: int) -> dict[str, str]:
        signed = b".".join((webhook_id.encode(), str(now_s).encode(), body))
        signature = base64.b64encode(hmac.digest(self._derived(key_id), signed, hashlib.sha256)).decode()
        return {
            "Content-Type": "application/json",
            "User-Agent": "faithdiff-webhooks/1",
            "webhook-id": webhook_id,
            "webhook-timestamp": str(now_s),
            "webhook-signature": f"v1,{signature}",
        }


class _RefusedAddress(Exception):  # noqa: N818 - told, and never raised to callers
    """An address that nothing is sent to."""


def _is_named(host: str, host_and_port: str, is_default_port: bool, entry: str) -> bool:
    name, _, port = entry.partition(":")
    if port and host_and_port.rpartition(":")[2] != port:
        return False
    if not port and not is_default_port:
        return False
    return host == name or (name.startswith("*.") and host.endswith(name[1:]))


async def _public_address(host: str, port: int, *, is_private_allowed: bool) -> str:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(sockaddr[0]) for *_, sockaddr in found]
    if not is_private_allowed and not all(_is_public(address) for address in addresses):
        raise _RefusedAddress("the host has a private address")
    return addresses[0]


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    return ip.is_global and not ip.is_multicast and all(inner.is_global for inner in _embedded(ip))


def _embedded(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """IPv4 addresses that gateways on the way would go on to."""
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    translated = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
    teredo = ip.teredo[1] if ip.teredo else None
    return [inner for inner in (ip.ipv4_mapped, ip.sixtofour, teredo, translated) if inner is not None]

"""GET /metrics: what all gateways and restorers count, behind one address, and what the job database knows.

The label `replica` says which process counted; series without it are true of the service. `sr_platform.metrics` brings
the processes together; what is asked for at a scrape is asked for in a thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
from collections.abc import Callable, Mapping
from typing import Protocol

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from pydantic import Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.access import FORWARDED, is_loopback
from serve.measurements import NO_SIZE, observe_request, size_class
from serve.problems import Problem
from sr_platform.config import StrictConfig
from sr_platform.metrics import CONTENT_TYPE, exposition

logger = logging.getLogger(__name__)

_STATES_OF_REPLICAS = ("RUNNING", "STARTING", "UPDATING", "STOPPING", "RECOVERING", "PENDING_MIGRATION")

# True of the service, not of a process: read when somebody asks, and shared with nobody.
_SERVICE = CollectorRegistry()
_JOBS = Gauge("faithdiff_jobs", "Jobs that have not ended, by state", ("state",), registry=_SERVICE)
_QUEUED_MEGAPIXELS = Gauge(
    "faithdiff_queued_megapixels", "Megapixels of results of jobs that have not ended", registry=_SERVICE
)
_QUEUED_WORK = Gauge(
    "faithdiff_queued_megapixel_steps", "Megapixel-steps of jobs that have not ended", registry=_SERVICE
)
_OLDEST_QUEUED = Gauge("faithdiff_oldest_queued_seconds", "Age of the oldest job that waits", registry=_SERVICE)
_STORE_UP = Gauge("faithdiff_store_up", "1 where the job database answers", registry=_SERVICE)
_REPLICAS = Gauge("faithdiff_replicas", "Restorers by state", ("state",), registry=_SERVICE)


class MetricsConfig(StrictConfig):
    """Who may read GET /metrics."""

    token_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256, in hex, of the bearer token that a scraper has to send; without it only this machine may ask."""


class Backlog(Protocol):
    """What of the job database's backlog is shown."""

    @property
    def num_queued(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def megapixels(self) -> float: ...
    @property
    def work(self) -> float: ...
    @property
    def oldest_queued_s(self) -> float: ...


def note_size(request: Request, megapixels: float) -> None:
    """Once the size of the result that `request` asks for is known: its latency is counted with its like."""
    request.state.size_class = size_class(megapixels)


def install_metrics(
    api: FastAPI,
    cfg: MetricsConfig,
    *,
    process: str = "local",
    backlog: Callable[[], Backlog] | None = None,
    replica_states: Callable[[], Mapping[str, int]] | None = None,
) -> None:
    """Counts every request of `api`, and answers GET /metrics.

    `process` is the name under which this process shares its metrics. `backlog` and `replica_states` (see
    `states_of_deployment`) are asked at every scrape, in a thread; one that raises is told by a missing value.
    """

    async def metrics(request: Request) -> Response:
        """Metrics of all gateways and restorers, as Prometheus reads them."""
        check_scraper(request, cfg)
        text = await asyncio.to_thread(_scrape, process, backlog, replica_states)
        return Response(text, media_type=CONTENT_TYPE)

    api.add_middleware(CountedRequests)
    api.get("/metrics", response_class=Response, include_in_schema=False)(metrics)


def check_scraper(request: Request, cfg: MetricsConfig) -> None:
    """Raises Problem 401 without the token; 403 without one configured, for whoever is not on this machine."""
    if cfg.token_sha256 is not None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest, cfg.token_sha256):
            raise Problem(401, "unauthorized", "metrics: send the header 'Authorization: Bearer <token of metrics>'")
        return
    # A proxy on this machine may ask for somebody else.
    peer = request.client.host if request.client else ""
    if any(name in request.headers for name in FORWARDED) or not is_loopback(peer):
        raise Problem(
            403, "local-only", "metrics: only this machine may ask; the operator may set metrics.token_sha256"
        )


def states_of_deployment(application: str, deployment: str) -> Mapping[str, int]:
    """How many replicas of a deployment are in which state, as Ray Serve's controller knows it."""
    from ray import serve

    status = serve.status().applications.get(application)
    found = status.deployments.get(deployment) if status else None
    return {str(getattr(state, "value", state)): n for state, n in found.replica_states.items()} if found else {}


class CountedRequests:
    """An ASGI layer that counts answers and how long their first byte took."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        started_s, is_answered = loop.time(), False
        scope.setdefault("state", {})  # where note_size() leaves the size

        async def counted(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                is_answered = True
                _count_answer(scope, message["status"], loop.time() - started_s)
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            if not is_answered:
                _count_answer(scope, 500, loop.time() - started_s)
            raise


def _count_answer(scope: Scope, status: int, seconds: float) -> None:
    # The pattern, since paths hold ids; what no route knows is one line, whatever strangers try.
    route = getattr(scope.get("route"), "path", "unknown")
    size = scope["state"].get("size_class", NO_SIZE)
    observe_request(route, status, seconds, size=size)


def _scrape(
    process: str, backlog: Callable[[], Backlog] | None, replica_states: Callable[[], Mapping[str, int]] | None
) -> bytes:
    if backlog is not None:
        _look_at("the job database", lambda: _set_backlog(backlog()), on_failure=_forget_backlog)
    if replica_states is not None:
        _look_at("Ray Serve", lambda: _set_replicas(replica_states()), on_failure=_REPLICAS.clear)
    return exposition(process) + generate_latest(_SERVICE)


def _look_at(what: str, look: Callable[[], None], *, on_failure: Callable[[], None]) -> None:
    try:
        look()
    except Exception:
        # Metrics are wanted most of all when something else does not answer.
        logger.exception("metrics: %s does not answer", what)
        on_failure()


def _set_backlog(backlog: Backlog) -> None:
    _JOBS.labels("queued").set(backlog.num_queued)
    _JOBS.labels("running").set(backlog.num_running)
    _QUEUED_MEGAPIXELS.set(backlog.megapixels)
    _QUEUED_WORK.set(backlog.work)
    _OLDEST_QUEUED.set(backlog.oldest_queued_s)
    _STORE_UP.set(1)


def _forget_backlog() -> None:
    """A gap in a graph says more than a value from before."""
    _STORE_UP.set(0)
    _JOBS.clear()
    for gauge in (_QUEUED_MEGAPIXELS, _QUEUED_WORK, _OLDEST_QUEUED):
        gauge.set(math.nan)


def _set_replicas(states: Mapping[str, int]) -> None:
    for state in _STATES_OF_REPLICAS:
        _REPLICAS.labels(state.lower()).set(states.get(state, 0))

"""HTTP: takes pictures in, hands them to restorers or to the queue, answers with pictures or problems. Holds no model.

    POST /v1/upscale /v1/estimate   POST GET /v1/jobs   GET DELETE /v1/jobs/{id}   GET /v1/jobs/{id}/events /result
    GET /v1/usage /v1/models /healthz /readyz /metrics /openapi.json /docs /

A plain class: `build_api(Gateway(GatewayConfig(), restorer, store, storage))` is an ASGI application that works
without Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.security import HTTPBearer
from pydantic import PositiveFloat, PositiveInt
from sqlalchemy.exc import DBAPIError

from faithdiff.errors import InputError
from serve import images
from serve.access import Access, AccessConfig, caller_of
from serve.envelope import Envelope
from serve.estimate import Rates
from serve.events import JobWatcher
from serve.form import JobRequest, SizedRequest, UpscaleRequest, content_type, read_json
from serve.housekeeping import Housekeeper, HousekeepingConfig
from serve.images import PictureLimits
from serve.intake import Intake, IntakeConfig
from serve.job_api import JobEndpoints, add_job_routes
from serve.job_json import PictureSize, WebhookEvent
from serve.jobs import Backlog, JobStore
from serve.metrics import MetricsConfig, install_metrics, note_size
from serve.openapi import (
    DESCRIPTION,
    EstimateAnswer,
    HealthJson,
    ModelsJson,
    ReadyJson,
    SecretJson,
    UsageJson,
    form_body,
    install_openapi,
    picture_responses,
    problems,
)
from serve.pages import add_docs, add_page
from serve.problems import Problem, install_handlers
from serve.restorer import Busy, ModelInfo, RestoredPicture
from serve.webhooks import WebhookConfig, WebhookSender
from sr_platform.config import StrictConfig
from sr_platform.errors import StorageError
from sr_platform.observability import LogConfig
from sr_platform.storage import Storage

_RETRY_AFTER_S = 5
_ALLOWED_HEADERS = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "Last-Event-ID",
    "Range",
    "If-Range",
    "If-None-Match",
    "traceparent",
)
_SHARED_HEADERS = ("Location", "ETag", "Content-Range", "Retry-After", "X-Model-Version", "X-Manifest-Digest")

logger = logging.getLogger(__name__)


class GatewayConfig(StrictConfig):
    """The HTTP side: how many gateways, and what they let in."""

    num_replicas: PositiveInt | None = 1
    """Gateways; null for between 1 and max_replicas, by the requests that are open."""
    max_replicas: PositiveInt = 4
    """Gateways at most, where num_replicas is null."""
    requests_per_replica: PositiveFloat = 20.0
    """Open requests that one gateway is meant to have, where num_replicas is null."""
    logs: LogConfig = LogConfig()
    """How gateways and restorers log."""
    store_url: str = "sqlite:///out/serve/jobs.db"
    """Where job records are: an SQLAlchemy URL such as postgresql+psycopg://host/database."""
    storage_uri: str = "out/serve/files"
    """Where inputs and results are: a folder or s3://bucket/prefix."""
    limits: PictureLimits = PictureLimits()
    """Sizes of pictures."""
    intake: IntakeConfig = IntakeConfig()
    """How much is taken in at once, and how long the queue may get."""
    access: AccessConfig = AccessConfig()
    """Who is let in."""
    rates: Rates = Rates()
    """What estimates and costs are computed with."""
    metrics: MetricsConfig = MetricsConfig()
    """Who may read /metrics."""
    webhooks: WebhookConfig = WebhookConfig()
    """Whom finished jobs may be sent to."""
    housekeeping: HousekeepingConfig = HousekeepingConfig()
    """Deliveries and removals in the background."""
    job_ttl_s: PositiveFloat = 24 * 3600.0
    """A job is given up so long after it was accepted, and removed so long after it has ended."""
    request_timeout_s: PositiveFloat = 600.0
    """Longest wait for a restored picture in /v1/upscale, queueing included; then 504, and the work ends."""
    starts_from_zero: bool = False
    """Whether a job starts a replica where there is none, and the service is ready without; set by the application."""
    events_poll_s: PositiveFloat = 0.5
    """Longest time between looks at a job that an event stream follows; young ones are looked at sooner."""
    page: bool = True
    """Whether there is a web page at /."""


class Unavailable(RuntimeError):  # noqa: N818 - the caller may come again
    """No restorer could take the request, or the one that had it died."""


class RestorerClient(Protocol):
    """What a gateway needs of restorers: one `Restorer`, or a deployment of them."""

    async def restore(self, lq: np.ndarray, request: UpscaleRequest) -> RestoredPicture: ...


class Gateway:
    """The endpoints, as methods."""

    def __init__(self, cfg: GatewayConfig, restorer: RestorerClient, store: JobStore, storage: Storage) -> None:
        self.cfg, self._restorer, self._store = cfg, restorer, store
        self.access = Access(cfg.access, store)
        self._intake = Intake(cfg.intake, cfg.limits, cfg.rates, store)
        self._webhooks = WebhookSender(cfg.webhooks)
        self.housekeeper = Housekeeper(cfg.housekeeping, store, storage, self._webhooks, cfg.rates)
        self.jobs = JobEndpoints(
            store,
            storage,
            intake=self._intake,
            access=self.access,
            webhooks=self._webhooks,
            watcher=JobWatcher(store, poll_s=cfg.events_poll_s),
            rates=cfg.rates,
            ttl_s=cfg.job_ttl_s,
        )

    async def upscale(self, request: Request) -> Response:
        """One picture up, the restored one down. Decoding and encoding leave the event loop free."""
        async with self._intake.upload(request, UpscaleRequest) as upload:
            expected = await self._intake.estimate(upload.size_px, upload.wanted)
            note_size(request, expected.megapixels)
            await self.access.take(caller_of(request), expected.megapixels)
        restored = await self._restore(upload.picture.rgb, upload.wanted)
        data, media_type = await asyncio.to_thread(
            images.write_picture, restored.image, upload.picture, upload.wanted.scale, upload.wanted.output_options()
        )
        return Response(data, media_type=media_type, headers=_lineage(restored.model))

    async def estimate(self, request: Request) -> EstimateAnswer:
        """What a request would take and cost: send its form, or JSON with width, height and the other fields."""
        if content_type(request) == "application/json":
            timeout_s = self.cfg.intake.upload_timeout_s
            wanted: UpscaleRequest = (sized := await read_json(request, SizedRequest, timeout_s=timeout_s))
            size_px = (sized.width, sized.height)
            images.check_size(size_px, self.cfg.limits)
            images.check_output(size_px, wanted.scale, self.cfg.limits)
        else:
            size_px, wanted = await self._intake.size_of(request, JobRequest)
        expected = await self._intake.estimate(size_px, wanted)
        return EstimateAnswer(
            input=PictureSize(width=size_px[0], height=size_px[1]),
            output=PictureSize(width=expected.size_px[0], height=expected.size_px[1]),
            megapixels=expected.megapixels,
            tiles=expected.num_tiles,
            megapixel_steps=round(expected.work, 6),
            device_seconds=expected.device_seconds,
            wait_seconds=round(await self._intake.wait_s(), 3),
            price=expected.price,
            currency=expected.currency,
        )

    async def usage(self, request: Request) -> UsageJson:
        """What the key has used today (UTC), and its limits; null where nothing is counted or limited."""
        return await self.access.usage(caller_of(request))

    async def webhook_secret(self, request: Request) -> SecretJson:
        """The secret that webhooks of this key's jobs are signed with, for libraries of Standard Webhooks."""
        return SecretJson(secret=self._webhooks.secret_of(caller_of(request).key_id))

    async def models(self) -> ModelsJson:
        """The models that are served, by how many replicas, and what it took to start the last one of them."""
        found: dict[str, dict[str, Any]] = {}
        for replica in await self._replicas():
            model = {name: replica.get(name) for name in ModelInfo.__dataclass_fields__}
            num_replicas = found.get(str(model["version"]), {}).get("num_replicas", 0) + 1
            found[str(model["version"])] = {**model, "num_replicas": num_replicas}
        return ModelsJson(models=list(found.values()))

    async def healthz(self) -> HealthJson:
        """The gateway is alive, whatever the restorers do."""
        return HealthJson(status="ok")

    async def readyz(self) -> ReadyJson:
        """There is a restorer with a loaded model, or a job would start one (`asleep`)."""
        replicas, has_captioner = await self._replicas(), self.cfg.intake.has_captioner
        if replicas:
            version = str(replicas[0]["version"])
            return ReadyJson(status="ready", model_version=version, has_captioner=has_captioner)
        if self.cfg.starts_from_zero:
            return ReadyJson(status="asleep", model_version=None, has_captioner=has_captioner)
        raise Problem(503, "not-ready", "restorer: no replica serves a model yet", retry_after_s=_RETRY_AFTER_S)

    def backlog(self) -> Backlog:
        """What waits, for metrics."""
        return self._store.backlog()

    async def _restore(self, lq: np.ndarray, wanted: UpscaleRequest) -> RestoredPicture:
        try:
            async with asyncio.timeout(self.cfg.request_timeout_s):
                return await self._restorer.restore(lq, wanted)
        except TimeoutError as error:
            detail = f"request: no result within {self.cfg.request_timeout_s:g} s; ask for fewer steps or pixels"
            raise Problem(504, "timed-out", detail) from error
        except InputError as error:
            raise Problem(422, "refused-by-model", str(error)) from error
        except (Busy, Unavailable) as error:
            raise Problem(503, "no-replica-free", str(error), retry_after_s=_RETRY_AFTER_S) from error

    async def _replicas(self) -> list[dict[str, Any]]:
        """What the restorers tell about themselves. Asking one of them would wake a service that sleeps."""
        return await asyncio.to_thread(self._store.replicas)


def build_api(
    gateway: Gateway, *, process: str = "local", replica_states: Callable[[], Mapping[str, int]] | None = None
) -> FastAPI:
    """The ASGI application of a gateway, errors, page and documentation included; its housekeeping runs with it.

    `process` is the name under which the metrics of this process are shared; `replica_states` tells of the restorers.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with gateway.housekeeper:
            yield

    api = FastAPI(title="FaithDiff", description=DESCRIPTION, lifespan=lifespan, docs_url=None, redoc_url=None)
    install_handlers(api)
    _install_outage_handlers(api)
    _add_routes(api, gateway)
    install_openapi(api)
    add_docs(api)
    if gateway.cfg.page:
        add_page(api)
    install_metrics(api, gateway.cfg.metrics, process=process, backlog=gateway.backlog, replica_states=replica_states)
    origins = gateway.cfg.access.allowed_origins
    if origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=_ALLOWED_HEADERS,
            expose_headers=_SHARED_HEADERS,
        )
    api.add_middleware(Envelope, is_shared=bool(origins))
    return api


def job_ended(event: WebhookEvent) -> None:
    """Sent to a job's `webhook_url` when it has ended, again and again until the answer is 2xx.

    Signed as Standard Webhooks says, in the headers webhook-id, webhook-timestamp and webhook-signature, with the
    secret of `GET /v1/webhook-secret`.
    """


def _add_routes(api: FastAPI, gateway: Gateway) -> None:
    needs_key = (
        [Depends(HTTPBearer(auto_error=False, description="A key"))] if gateway.cfg.access.mode == "keys" else []
    )
    router = APIRouter(dependencies=[*needs_key, Depends(gateway.access.admit)])
    router.post(
        "/v1/upscale",
        tags=["pictures"],
        response_class=Response,
        responses={**problems(400, 408, 413, 415, 422, 429, 503, 504), **picture_responses(200)},
        openapi_extra=form_body(UpscaleRequest),
    )(gateway.upscale)
    add_job_routes(router, gateway.jobs)
    router.post(
        "/v1/estimate",
        tags=["pictures"],
        responses=problems(400, 408, 413, 415, 422, 503),
        openapi_extra=form_body(JobRequest, sized=SizedRequest),
    )(gateway.estimate)
    router.get("/v1/usage", tags=["keys"], responses=problems(503))(gateway.usage)
    if gateway.cfg.webhooks.allowed_hosts:
        api.webhooks.post("job-ended", tags=["jobs"])(job_ended)
        router.get("/v1/webhook-secret", tags=["keys"], responses=problems())(gateway.webhook_secret)
    router.get("/v1/models", tags=["service"], responses=problems(503))(gateway.models)
    api.include_router(router)
    api.get("/healthz", tags=["service"])(gateway.healthz)
    api.get("/readyz", tags=["service"], responses={503: problems(503)[503]})(gateway.readyz)
    api.head("/healthz", include_in_schema=False)(gateway.healthz)
    api.head("/readyz", include_in_schema=False)(gateway.readyz)


def _install_outage_handlers(api: FastAPI) -> None:
    """A database or storage that is away for a while is no error of the request: it may be sent again."""

    async def on_outage(request: Request, error: Exception) -> Response:
        logger.error("serve: %s %s: an outage", request.method, request.url.path, exc_info=error)
        detail = "service: its database or storage does not answer; send the request again, with its Idempotency-Key"
        return Problem(503, "outage", detail, retry_after_s=_RETRY_AFTER_S).response(request.url.path)

    api.add_exception_handler(StorageError, on_outage)
    api.add_exception_handler(DBAPIError, on_outage)


def _lineage(model: ModelInfo) -> dict[str, str]:
    """Response headers from which one finds the model, and the data it was trained on."""
    values = {"X-Model-Version": model.version, "X-Manifest-Digest": model.manifest_digest or "none"}
    return {name: value.encode("ascii", "backslashreplace").decode() for name, value in values.items()}

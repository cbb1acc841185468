"""Fixtures of the serving room: pictures as files, a restorer without a model, gateways without and with a network."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from serve.form import UpscaleRequest
from serve.gateway import Gateway, GatewayConfig, build_api
from serve.jobs import JobStore
from serve.restorer import ModelInfo, RestoredPicture
from sr_platform.storage import Storage, open_storage


def _load(name: str) -> None:
    """Makes a file of this folder importable: tests are no packages."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


_load("fake_worker")
_load("postgres_server")
_load("hammer")


@pytest.fixture
def picture() -> np.ndarray:
    """uint8 RGB [24, 32, 3]."""
    return np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def to_file() -> Callable[..., bytes]:
    """`to_file(array_or_image, "PNG", **options)` -> the bytes of a picture file."""

    def encode(picture: Any, file_format: str, **options: Any) -> bytes:
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        buffer = BytesIO()
        image.save(buffer, file_format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def png(picture: np.ndarray, to_file: Callable[..., bytes]) -> bytes:
    """A PNG of 32 x 24 px."""
    return to_file(picture, "PNG")


class FakeRestorer:
    """Enlarges by repeating pixels; remembers requests; raises `error` or waits `delay_s` when told to."""

    def __init__(self) -> None:
        self.requests: list[UpscaleRequest] = []
        self.error: Exception | None = None
        self.delay_s = 0.0
        self.num_cancelled = 0
        self.info = ModelInfo("nano", "nano", None, "cpu", "float32", 0.1, 0.2)

    async def restore(self, lq: np.ndarray, request: UpscaleRequest) -> RestoredPicture:
        self.requests.append(request)
        await self._behave()
        image = lq.repeat(request.scale, axis=0).repeat(request.scale, axis=1)
        return RestoredPicture(image, {}, self.info)

    async def describe(self) -> ModelInfo:
        await self._behave()
        return self.info

    async def _behave(self) -> None:
        if self.error is not None:
            raise self.error
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise


@pytest.fixture
def restorer() -> FakeRestorer:
    return FakeRestorer()


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    """An empty job database in a file."""
    return JobStore(f"sqlite:///{tmp_path}/jobs.db")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A real PostgreSQL server on loopback, for the session; `new_database()` -> the URL of an empty database."""
    from postgres_server import PostgresServer

    with contextlib.closing(PostgresServer()) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database: a file, and one of a PostgreSQL server."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/databases/jobs.db"
    return str(request.getfixturevalue("postgres").new_database())


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty folder for inputs and results."""
    return open_storage(tmp_path / "files")


@pytest.fixture
def connect(
    restorer: FakeRestorer, store: JobStore, storage: Storage
) -> Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]:
    """`async with connect(cfg) as client`: an HTTP client of a gateway in this process; no housekeeping runs.

    The gateway stands before `restorer`, `store` and `storage`. `key` is sent as bearer token; `peer` is the address
    the client seems to come from.
    """

    @asynccontextmanager
    async def client(
        cfg: GatewayConfig | None = None, *, key: str = "", peer: str = "127.0.0.1"
    ) -> AsyncIterator[httpx.AsyncClient]:
        api = build_api(Gateway(cfg or GatewayConfig(), restorer, store, storage))
        transport = httpx.ASGITransport(api, raise_app_exceptions=False, client=(peer, 50_000))
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as http:
            yield http

    return client


@pytest.fixture
def serving(restorer: FakeRestorer, store: JobStore, storage: Storage) -> Callable[..., AbstractContextManager[str]]:
    """`with serving(cfg) as url`: a gateway behind a real HTTP server on loopback, housekeeping included."""

    from fake_worker import running_server

    return lambda cfg=None: running_server(build_api(Gateway(cfg or GatewayConfig(), restorer, store, storage)))


@pytest.fixture
def working(store: JobStore, storage: Storage) -> Callable[..., AbstractContextManager[Any]]:
    """`with working(step_s=0.01) as worker`: a fake replica that works off the jobs of `store`."""
    from fake_worker import FakeWorker

    @contextmanager
    def work(**settings: Any) -> Iterator[Any]:
        worker = FakeWorker(store, storage, **settings)
        with contextlib.closing(worker):
            worker.start()
            yield worker

    return work

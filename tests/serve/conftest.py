"""Fixtures of the serving room: pictures as files, a restorer without a model, a client without a network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from serve.form import UpscaleRequest
from serve.gateway import Gateway, GatewayConfig, build_api
from serve.restorer import ModelInfo, RestoredPicture


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
def connect(restorer: FakeRestorer) -> Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]:
    """`async with connect(cfg) as client`: an HTTP client of a gateway in front of `restorer`, in this process."""

    @asynccontextmanager
    async def client(cfg: GatewayConfig | None = None) -> AsyncIterator[httpx.AsyncClient]:
        api = build_api(Gateway(cfg or GatewayConfig(), restorer))
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            yield http

    return client

"""How much may come in: uploads checked a few at a time, and a queue that is no longer than its limits.

Checking a picture takes many times its file's size, so that only so many are in memory at once; the others wait on
disk, where the form's parser has put them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic

from fastapi import Request
from pydantic import PositiveFloat, PositiveInt

from serve import images
from serve.estimate import Estimate, Rates, Speed, estimate, speed_of
from serve.form import RequestT, UpscaleRequest, open_form
from serve.images import PictureLimits
from serve.jobs import Backlog, JobStore
from serve.measurements import count_upload
from serve.problems import Problem
from sr_platform.config import StrictConfig

if TYPE_CHECKING:
    from faithdiff.picture_files import PictureFile

_SPEED_LASTS_S = 2.0
_LONGEST_RETRY_S = 3600.0


class IntakeConfig(StrictConfig):
    """What is taken in at once."""

    max_queued_megapixels: PositiveFloat = 4000.0
    """Megapixels of results that may wait or be in work; more are refused with 503."""
    max_queued_megapixels_per_key: PositiveFloat = 1000.0
    """The same for the jobs of one key; more are refused with 429."""
    has_captioner: bool = False
    """Whether `auto_prompt` may be asked for; the application sets it."""
    max_pictures_at_once: PositiveInt = 2
    """Uploads that a gateway holds and checks in memory at the same time."""
    upload_timeout_s: PositiveFloat = 120.0
    """Longest time for an upload to arrive."""


@dataclass(frozen=True)
class Upload(Generic[RequestT]):
    """A picture that was read whole and is in order, its file, and what is wanted of it."""

    data: bytes
    picture: PictureFile
    wanted: RequestT

    @property
    def size_px(self) -> tuple[int, int]:
        """Width, height, upright."""
        height, width = self.picture.rgb.shape[:2]
        return width, height


class Intake:
    """Reads uploads, knows how fast replicas are and how much waits for them."""

    def __init__(self, cfg: IntakeConfig, limits: PictureLimits, rates: Rates, store: JobStore) -> None:
        self._cfg, self._limits, self._rates, self._store = cfg, limits, rates, store
        self._room = asyncio.Semaphore(cfg.max_pictures_at_once)
        self._speed: Speed | None = None
        self._speed_until_s = 0.0

    @asynccontextmanager
    async def upload(self, request: Request, fields: type[RequestT]) -> AsyncIterator[Upload[RequestT]]:
        """The checked upload; leave the block to make room for the next.

        Raises:
            Problem: whatever is wrong with the form, the fields, the picture, or the size of the result.
        """
        form = open_form(
            request, fields, max_upload_bytes=self._limits.max_upload_bytes, timeout_s=self._cfg.upload_timeout_s
        )
        async with form as (file, wanted), self._room:
            self._check_prompt(wanted)
            data = await file.read()
            count_upload(len(data))
            picture = await asyncio.to_thread(images.read_picture, data, self._limits)
            upload = Upload(data, picture, wanted)
            images.check_output(upload.size_px, wanted.scale, self._limits)
            yield upload

    async def size_of(self, request: Request, fields: type[RequestT]) -> tuple[tuple[int, int], RequestT]:
        """(width, height) of the form's picture, from its header alone, and the fields. Raises as `upload` does."""
        form = open_form(
            request, fields, max_upload_bytes=self._limits.max_upload_bytes, timeout_s=self._cfg.upload_timeout_s
        )
        async with form as (file, wanted), self._room:
            size_px = await asyncio.to_thread(images.read_size, await file.read(), self._limits)
            images.check_output(size_px, wanted.scale, self._limits)
            return size_px, wanted

    def _check_prompt(self, wanted: UpscaleRequest) -> None:
        """Raises Problem 422 when a captioner is asked for that is not there, or would not be heard."""
        if not wanted.auto_prompt:
            return
        reason = "this service has no captioner; send a prompt, or leave both out"
        if self._cfg.has_captioner:
            reason = "prompt is given as well; leave one of them out"
        if wanted.prompt or not self._cfg.has_captioner:
            errors = [{"field": "auto_prompt", "detail": reason}]
            raise Problem(422, "invalid-fields", f"auto_prompt: {reason}", errors=errors)

    async def estimate(self, size_px: tuple[int, int], wanted: RequestT) -> Estimate:
        """By what replicas report now. Raises Problem 413 for a result that none of them has the memory for."""
        speed = await self.speed()
        expected = estimate(size_px, wanted, speed, self._rates)
        if expected.megapixels > speed.max_megapixels:
            width, height = expected.size_px
            detail = (
                f"picture: a result of {width}x{height} px has {expected.megapixels:,.1f} megapixels; the replicas "
                f"have memory for {speed.max_megapixels:,.1f}: send a smaller picture, or take a smaller scale"
            )
            raise Problem(413, "result-too-large", detail)
        return expected

    async def speed(self) -> Speed:
        """What replicas have reported, at most a few seconds ago."""
        if self._speed is not None and time.monotonic() < self._speed_until_s:
            return self._speed
        return await asyncio.to_thread(self._speed_now)

    async def wait_s(self) -> float:
        """Seconds until what waits now is worked off."""
        backlog = await asyncio.to_thread(self._store.backlog)
        return _drain_s(backlog, await self.speed())

    def check_room(self, key_id: str, megapixels: float) -> None:
        """Raises Problem 429 or 503 when a job of so many megapixels would make the queue too long. Blocks.

        A picture larger than the limit itself is let in when nothing else is there.
        """
        everybodys = self._store.backlog()
        allowed = self._cfg.max_queued_megapixels_per_key
        # What waits for one key is no more than what waits for all.
        if everybodys.megapixels + megapixels <= min(allowed, self._cfg.max_queued_megapixels):
            return
        own = self._store.backlog(key_id)
        if own.megapixels and own.megapixels + megapixels > allowed:
            detail = (
                f"key: {own.megapixels:,.1f} megapixels of its jobs wait, {allowed:,g} are allowed; send this later"
            )
            raise Problem(429, "key-queue-full", detail, retry_after_s=self._retry_after_s(own, megapixels, allowed))
        allowed = self._cfg.max_queued_megapixels
        if everybodys.megapixels and everybodys.megapixels + megapixels > allowed:
            detail = f"queue: {everybodys.megapixels:,.1f} megapixels wait, {allowed:,g} are allowed; send this later"
            raise Problem(503, "queue-full", detail, retry_after_s=self._retry_after_s(everybodys, megapixels, allowed))

    def _retry_after_s(self, backlog: Backlog, megapixels: float, allowed: float) -> float:
        """Until enough of the backlog is worked off."""
        share = min(1.0, (backlog.megapixels + megapixels - allowed) / backlog.megapixels)
        return min(_LONGEST_RETRY_S, share * _drain_s(backlog, self._speed_now()))

    def _speed_now(self) -> Speed:
        """As `speed`, for whoever is in a thread of their own already."""
        if self._speed is None or time.monotonic() > self._speed_until_s:
            self._speed = speed_of(self._store.replicas(), self._rates)
            self._speed_until_s = time.monotonic() + _SPEED_LASTS_S
        return self._speed


def _drain_s(backlog: Backlog, speed: Speed) -> float:
    return backlog.work / (speed.megapixel_steps_per_s * max(1, speed.num_replicas))

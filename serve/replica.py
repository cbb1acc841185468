"""A restorer at work: takes jobs and requests, tells about itself, helps other replicas, follows its model's alias.

Needs Ray only for its peers; `Replica(..., mailbox=False)` works without.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from serve.autoscaling import AutoscalingConfig
from serve.claims import ClaimConfig, JobRunner
from serve.form import UpscaleRequest
from serve.job_run import Captioning, Surroundings
from serve.jobs import Job, JobStore
from serve.measurements import set_gpu_memory, set_load
from serve.peers import Mailbox, PeerServer, SpreadConfig, device_name, find_peers
from serve.restorer import RestoredPicture, Restorer
from serve.served_model import ModelConfig
from serve.team import Peer
from serve.tracing import Trace
from sr_platform.storage import Storage

logger = logging.getLogger(__name__)

_LEASE_ROLLOUT = "rollout"


class RestorerConfig(ModelConfig):
    """Replicas that own a model, and what each of them may use."""

    num_replicas: PositiveInt | None = Field(default=1)
    """Replicas, each with a model of its own; null for as many as `autoscaling` says."""
    autoscaling: AutoscalingConfig = AutoscalingConfig()
    """How many replicas there are where num_replicas is null."""
    claims: ClaimConfig = ClaimConfig()
    """How jobs are taken from the queue."""
    spread: SpreadConfig = SpreadConfig()
    """When several replicas make one picture."""
    report_every_s: PositiveFloat = 2.0
    """Between reports of what the replica serves and how busy it is."""
    follow_alias_every_s: NonNegativeFloat = 30.0
    """Between looks whether the model's alias stands for another version; 0 never looks."""
    drain_s: PositiveFloat = 300.0
    """A replica that is stopped finishes what it has in hand for so long, and hands the rest over."""


class Replica:
    """`start` in the event loop it shall live in; `stop` in the same."""

    def __init__(
        self,
        name: str,
        model: str,
        cfg: RestorerConfig,
        store: JobStore,
        storage: Storage,
        *,
        caption: Captioning | None = None,
        mailbox: bool = True,
    ) -> None:
        self.name, self._cfg, self._store, self._caption = name, cfg, store, caption
        self._restorer = Restorer(model, cfg)
        self._device_name = device_name(self._served())
        around = Surroundings(store, storage, name, self._peers, lambda: self._largest_of_others, caption)
        self._runner = JobRunner(around, cfg.claims, self._restorer.model)
        self._server = PeerServer(name, self._restorer.model, idle_s=cfg.spread.idle_s)
        self._mailbox = Mailbox(self._server) if mailbox and cfg.spread.max_peers else None
        self._largest_of_others = 0.0
        """Megapixels of results, as the other replicas have reported them."""
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begins to take jobs."""
        await self._report()
        if self._mailbox is not None:
            self._mailbox.start()
        self._runner.start()
        self._loops = [asyncio.create_task(self._repeat(self._report, self._cfg.report_every_s))]
        if self._cfg.follow_alias_every_s and "@" in self._restorer.uri:
            self._loops.append(asyncio.create_task(self._repeat(self._follow_alias, self._cfg.follow_alias_every_s)))

    async def stop(self) -> None:
        """Finishes what is in hand, or hands it over when that takes too long."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.to_thread(self._store.withdraw_replica, self.name)
        await self._runner.stop(self._cfg.drain_s)
        if self._mailbox is not None:
            self._mailbox.close()
        await asyncio.to_thread(self._restorer.close)

    async def restore(self, lq: np.ndarray, request: UpscaleRequest, trace: Trace | None = None) -> RestoredPicture:
        """As `Restorer.restore`, with a prompt by the captioner where one is wanted."""
        if request.auto_prompt and self._caption is not None:
            request = request.model_copy(update={"prompt": await self._caption(lq)})
        return await self._restorer.restore(lq, request, trace)

    def check(self) -> None:
        """Raises RuntimeError when the process must be started again."""
        self._restorer.check()

    def _served(self) -> Any:
        served = self._restorer.model()
        assert served is not None
        return served

    def _peers(self, job: Job) -> list[Peer]:
        served = self._restorer.model()
        if self._mailbox is None or served is None:
            return []
        return find_peers(self._store, job, self._cfg.spread, own=self.name, like=served)

    async def _report(self) -> None:
        """Tells gateways, autoscaler and peers what there is to know, and hears of the others."""
        served, fraction = self._restorer.model(), 0.5
        about: dict[str, Any] = {"replica": self.name, **asdict(self._restorer.info)}
        if served is not None:
            load = served.engine.load()
            fraction = served.pipeline.tile_stride_fraction
            set_load(load.entries_by_phase, megapixels=load.megapixels, free_megapixels=load.free_megapixels)
            about |= {
                "entries": load.entries,
                "megapixel_steps_per_s": load.megapixel_steps_per_s,
                "max_megapixels": load.max_megapixels,
                "batch_fill": load.batch_fill,
            }
        about |= {"tile_px": self._cfg.tile_px, "tile_stride_fraction": fraction, "device_name": self._device_name}
        await asyncio.to_thread(self._store.report_replica, self.name, about)
        others = [r for r in await asyncio.to_thread(self._store.replicas) if r["replica"] != self.name]
        self._largest_of_others = max((float(r.get("max_megapixels", 0.0)) for r in others), default=0.0)
        _note_gpu_memory(self._restorer.info.device)
        self._server.forget_idle()

    async def _follow_alias(self) -> None:
        """Changes to the version that the alias stands for, one replica of the service at a time."""
        parked = await self._restorer.park_new_version()
        if parked is None:
            return
        lease_s = self._cfg.drain_s + 600.0
        while not await asyncio.to_thread(self._store.take_lease, _LEASE_ROLLOUT, self.name, lease_s):
            await asyncio.sleep(1.0)
        try:
            await self._restorer.change_to(parked, self._runner.pause)
            await self._report()
        finally:
            self._runner.resume()
            # Handed on at once, whatever became of it.
            await asyncio.to_thread(self._store.take_lease, _LEASE_ROLLOUT, self.name, 0.0)

    async def _repeat(self, step: Callable[[], Awaitable[None]], every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            try:
                await step()
            except Exception:
                # Nothing that is away for a while may end the loop.
                logger.exception("replica: %s of %s failed; it is tried again", step.__name__, self.name)


def _note_gpu_memory(device: str) -> None:
    if device == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        set_gpu_memory(used_bytes=total - free, total_bytes=total)

"""A picture of another replica, of which this one steps some tiles."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from serve.tickets import Entry

if TYPE_CHECKING:
    from faithdiff import FaithDiffPipeline
    from faithdiff.pipeline import Restoration
    from serve.device import Device
    from serve.guest import Guest

ResultT = TypeVar("ResultT")


class Host(Protocol):
    """The engine, as assistances see it."""

    def on_device(self, guest: Guest, phase: str, compute: Callable[[], ResultT]) -> ResultT: ...

    def leave(self, entry: Entry) -> None: ...


class Assistance:
    """`prepare` once, then `step` again and again, `close` in the end; each from whatever thread, one at a time."""

    def __init__(self, host: Host, pipeline: FaithDiffPipeline, device: Device, entry: Entry) -> None:
        self._host, self._pipeline, self._device, self._entry = host, pipeline, device, entry
        self._restoration: Restoration | None = None
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Encodes the picture, as the replica that has it does; no tile is made ready before it is asked for."""
        pipeline, entry = self._pipeline, self._entry
        enlarged = pipeline.enlarge(np.array(entry.lq), entry.request)
        self._restoration = self._host.on_device(entry.guest, "encode", lambda: pipeline.encode(enlarged, tiles=()))

    def step(self, step: int, latents: np.ndarray, tiles: Sequence[int]) -> np.ndarray:
        """Tiles [N, 4, h, w] after step `step` of the canvas [1, 4, H, W]. Raises Cancelled once it is closed."""
        assert self._restoration is not None, "step before prepare"
        with self._lock:
            return self._device.step_for_others(self._entry.guest, self._restoration, step, np.array(latents), tiles)

    def close(self) -> None:
        """The device works on it no longer than the pass that it is at."""
        self._device.cancel(self._entry.guest)
        self._host.leave(self._entry)

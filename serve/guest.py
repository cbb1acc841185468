"""A picture on a replica's device, what the device has done so far, and how it may fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from faithdiff.errors import Cancelled
from serve.team import Delivery, Team
from serve.tracing import Trace

if TYPE_CHECKING:
    from PIL import Image

    from faithdiff.denoiser import Canvas
    from faithdiff.pipeline import Restoration

# Rates are means over about so many seconds of work.
_RATE_SPAN_S = 60.0


class NotEnoughMemory(RuntimeError):  # noqa: N818 - reads as what happened
    """The device had too little memory twice; the picture was given up, others go on."""


@dataclass
class Guest:
    """One picture on the device. Its lock is the device's.

    `away` are tiles of the current step that other replicas step: of our own picture because a team shares it, of
    another replica's picture all those that it has not asked for.
    """

    number: int
    megapixels: float
    condition: threading.Condition
    phase: str = "queued"
    device_seconds: float = 0.0
    is_cancelled: bool = False
    has_turn: bool = False
    turn_start_s: float = 0.0
    restoration: Restoration | None = None
    state: tuple[int, Tensor] | None = None
    failure: BaseException | None = None
    is_alone: bool = False
    wants_preview: bool = False
    previewed_at_s: float = field(default_factory=time.perf_counter)
    preview: Image.Image | None = None
    team: Team | None = None
    away: frozenset[int] = frozenset()
    deliveries: list[Delivery] = field(default_factory=list)
    trace: Trace | None = None
    stepped_at_s: float = 0.0

    @property
    def canvas(self) -> Canvas:
        assert self.restoration is not None, "the picture is not encoded yet"
        return self.restoration.canvas

    def check(self) -> None:
        """Raises Cancelled."""
        if self.is_cancelled:
            raise Cancelled("engine: the picture was cancelled")

    def tiles_left(self) -> list[int]:
        """Tiles of the current step that are still to be stepped here."""
        return [tile for tile in self.canvas.pending_tiles() if tile not in self.away]

    def tiles_missing(self, tiles: Sequence[int]) -> bool:
        """Whether one of these tiles has not taken the current step."""
        return not set(tiles).isdisjoint(self.canvas.pending_tiles())


@dataclass
class Figures:
    """What the device has done: seconds by phase, and sums that fade over `_RATE_SPAN_S` seconds of work."""

    seconds: dict[str, float] = field(default_factory=dict)
    recent_megapixel_steps: float = 0.0
    recent_s: float = 0.0
    recent_tiles: float = 0.0
    recent_rows: float = 0.0

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        fade = 0.5 ** (seconds / _RATE_SPAN_S)
        self.recent_megapixel_steps *= fade
        self.recent_tiles *= fade
        self.recent_rows *= fade
        self.recent_s = self.recent_s * fade + seconds

    @property
    def megapixel_steps_per_s(self) -> float | None:
        """Output megapixels x steps per second of work, encoding and decoding included; None before the first step."""
        return self.recent_megapixel_steps / self.recent_s if self.recent_megapixel_steps else None

    @property
    def batch_fill(self) -> float:
        """Share of the rows of all passes that were no copies."""
        return self.recent_tiles / self.recent_rows if self.recent_rows else 1.0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out on the device or on the host; PyTorch has no class of its own for the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def not_enough_memory(error: BaseException) -> NotEnoughMemory:
    return NotEnoughMemory(f"engine: memory ran out twice ({str(error).splitlines()[0]}); send a smaller picture")

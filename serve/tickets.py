"""A picture in an engine's hands, and what whoever gave it may do with it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from serve.memory_model import Footprint
from serve.team import Team

if TYPE_CHECKING:
    from PIL import Image

    from faithdiff import RestorationResult
    from faithdiff.canvas_state import CanvasState
    from faithdiff.pipeline import EnlargedPicture
    from faithdiff.request import RestorationRequest
    from serve.guest import Guest


@dataclass(frozen=True)
class TicketProgress:
    """`phase` is queued, encode, denoise, decode or done; `device_seconds` is what the picture has cost so far."""

    phase: str
    step: int
    num_steps: int
    device_seconds: float


@dataclass
class Entry:
    """What an engine knows of a picture."""

    lq: np.ndarray
    request: RestorationRequest
    name: str
    guest: Guest
    footprint: Footprint
    resume: CanvasState | None = None
    team: Team | None = None
    is_of_others: bool = False
    """Another replica has it, and nobody waits for `future`."""
    future: Future[RestorationResult] = field(default_factory=Future)
    enlarged: EnlargedPicture | None = None


class Owner(Protocol):
    """The engine, as tickets see it."""

    def cancel(self, entry: Entry) -> None: ...

    def snapshot(self, entry: Entry) -> CanvasState | None: ...


class Ticket:
    """A picture in an engine's hands. Every method may be called from any thread."""

    def __init__(self, engine: Owner, entry: Entry) -> None:
        self._engine, self._entry = engine, entry

    @property
    def future(self) -> Future[RestorationResult]:
        """The result, or InputError, Cancelled, FloatingPointError, NotEnoughMemory; cancelling it cancels the work."""
        return self._entry.future

    def progress(self) -> TicketProgress:
        entry = self._entry
        step = 0 if entry.guest.state is None else entry.guest.state[0]
        phase = "done" if entry.future.done() else entry.guest.phase
        return TicketProgress(phase, step, entry.request.num_inference_steps, entry.guest.device_seconds)

    def cancel(self) -> None:
        """The device works on the picture no longer than the step or band that it is at."""
        self._engine.cancel(self._entry)

    def preview(self) -> Image.Image | None:
        """The newest small picture of what is becoming of it; asking has a newer one made after the next step."""
        self._entry.guest.wants_preview = True
        return self._entry.guest.preview

    def snapshot(self) -> CanvasState | None:
        """From which `submit(resume=...)` goes on, here or elsewhere; None before the first step."""
        return self._engine.snapshot(self._entry)

    def shared_with(self) -> list[str]:
        """Names of the replicas that step tiles of it, too."""
        return [] if self._entry.team is None else self._entry.team.peer_names

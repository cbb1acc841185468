"""A replica's device and the one thread that uses it: quantum by quantum, as the scheduler says.

A picture's own thread takes a turn on the device to encode or decode (`Device.turn`), and lays its canvas in the
device's hands for the steps in between (`Device.denoise`). Whoever has the turn gives it back at every break.
"""

from __future__ import annotations

import gc
import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from faithdiff.breaks import breaks
from faithdiff.denoiser import BrokenTiles, TileJob, step_tiles, tiles_per_pass
from faithdiff.errors import Cancelled
from serve.scheduler import Pass, Quantum, Scheduler, Shape, Turn, entries_of

if TYPE_CHECKING:
    from PIL import Image

    from faithdiff import FaithDiffPipeline
    from faithdiff.pipeline import Restoration

logger = logging.getLogger(__name__)

# A turn that was shorter is not given back yet: changing threads costs about a tenth of a millisecond.
_SHORTEST_TURN_S = 0.002
# Rates are means over about so many seconds of work.
_RATE_SPAN_S = 60.0


class NotEnoughMemory(RuntimeError):  # noqa: N818 - reads as what happened
    """The device had too little memory twice; the picture was given up, others go on."""


@dataclass
class Guest:
    """One picture on the device. Its lock is the device's."""

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
    previewed_at_s: float = -math.inf
    preview: Image.Image | None = None

    def check(self) -> None:
        if self.is_cancelled:
            raise Cancelled("engine: the picture was cancelled")


@dataclass
class Figures:
    """What the device has done: seconds by phase, and sums that fade over `_RATE_SPAN_S` seconds of work."""

    seconds: dict[str, float] = field(default_factory=dict)
    megapixel_steps: float = 0.0
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


class Device:
    """The pipeline's device. `failure` says why it can no longer be used, if so."""

    def __init__(self, pipeline: FaithDiffPipeline, *, preview_every_s: float) -> None:
        self._pipeline, self._preview_every_s = pipeline, preview_every_s
        self._scheduler = Scheduler(self._capacity)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._guests: dict[int, Guest] = {}
        self._is_closed = False
        self.figures = Figures()
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def enter(self, *, work: float, megapixels: float, priority: int) -> Guest:
        """A picture of so many output megapixels that will need about `work` megapixel-steps in all."""
        with self._lock:
            number = self._scheduler.add(work, priority)
            guest = Guest(number, megapixels, threading.Condition(self._lock), is_cancelled=self._is_closed)
            self._guests[number] = guest
            return guest

    def leave(self, guest: Guest) -> None:
        """The picture is done with the device, in whatever way."""
        with self._lock:
            self._scheduler.remove(guest.number)
            self._guests.pop(guest.number, None)

    def cancel(self, guest: Guest) -> None:
        """The device does nothing more for the picture after the quantum that runs; its thread gets `Cancelled`."""
        with self._lock:
            guest.is_cancelled = True
            self._scheduler.rest(guest.number)
            guest.condition.notify()

    def close(self) -> None:
        """Cancels every picture and ends the thread."""
        with self._lock:
            self._is_closed = True
            for guest in self._guests.values():
                self.cancel(guest)
            self._changed.notify()
        self._thread.join()

    @contextmanager
    def turn(self, guest: Guest, phase: str) -> Iterator[None]:
        """Inside the block the device is the calling thread's, but for its breaks. Raises Cancelled."""
        try:
            with self._lock:
                guest.phase = phase
                self._await_turn(guest)
            with breaks(lambda: self._pass_on(guest)):
                yield
        finally:
            with self._lock:
                guest.has_turn = False
                self._changed.notify()

    def denoise(self, guest: Guest, restoration: Restoration) -> None:
        """Returns when the canvas has taken all its steps. Raises Cancelled, FloatingPointError, NotEnoughMemory."""
        with self._lock:
            guest.phase, guest.restoration = "denoise", restoration
            guest.state = (restoration.canvas.step, restoration.canvas.latents)
            self._want_tiles(guest)
            self._changed.notify()
            guest.condition.wait_for(lambda: guest.is_cancelled or guest.failure or restoration.canvas.is_done)
            guest.check()
            if guest.failure is not None:
                raise guest.failure

    def free_memory(self) -> None:
        """Gives back what nobody uses."""
        gc.collect()
        if self._pipeline.device.type == "cuda":
            torch.cuda.empty_cache()

    def _capacity(self, shape: Shape) -> int:
        return self._pipeline.tiles_per_batch or tiles_per_pass(shape[:2], self._pipeline.device)

    def _await_turn(self, guest: Guest) -> None:
        guest.check()
        self._scheduler.want_turn(guest.number)
        self._changed.notify()
        guest.condition.wait_for(lambda: guest.has_turn or guest.is_cancelled)
        guest.check()

    def _pass_on(self, guest: Guest) -> None:
        """A break of whoever has the turn."""
        self._synchronize()
        guest.check()
        if time.perf_counter() - guest.turn_start_s < _SHORTEST_TURN_S:
            return
        with self._lock:
            guest.has_turn = False
            self._await_turn(guest)

    def _run(self) -> None:
        while (quantum := self._next()) is not None:
            start_s = time.perf_counter()
            if isinstance(quantum, Turn):
                phase = self._lend(quantum)
            else:
                phase = "denoise"
                self._step(quantum)
            self._synchronize()
            self._settle(quantum, phase, time.perf_counter() - start_s)

    def _next(self) -> Quantum | None:
        with self._lock:
            while not self._is_closed:
                if (quantum := self._scheduler.next()) is not None:
                    return quantum
                self._changed.wait()
            return None

    def _lend(self, turn: Turn) -> str:
        with self._lock:
            guest = self._guests.get(turn.entry)
            if guest is None or guest.is_cancelled:
                return "encode"
            phase = guest.phase
            guest.has_turn, guest.turn_start_s = True, time.perf_counter()
            guest.condition.notify()
            self._changed.wait_for(lambda: not guest.has_turn)
            return phase

    def _step(self, quantum: Pass) -> None:
        with self._lock:
            guests = [self._guests.get(number) for number in entries_of(quantum)]
        present = {g.number: g for g in guests if g is not None and not g.is_cancelled and g.restoration is not None}
        jobs = [
            TileJob(present[number].restoration.canvas, tile)  # type: ignore[union-attr]
            for number, tile in quantum.tiles
            if number in present
        ]
        if not jobs:
            return
        try:
            self._step_tiles(jobs, quantum)
        except Exception as error:  # noqa: BLE001 - one picture's failure, whatever it is, must not reach the others
            self._blame(list(present.values()), error)
        for guest in present.values():
            self._take_step(guest)

    def _step_tiles(self, jobs: list[TileJob], quantum: Pass) -> None:
        tiles_per_batch = 1 if quantum.is_alone else self._pipeline.tiles_per_batch
        step_tiles(self._pipeline.unet, jobs, tiles_per_batch=tiles_per_batch)
        self.figures.recent_tiles += len(jobs)
        self.figures.recent_rows += quantum.capacity

    def _blame(self, guests: list[Guest], error: Exception) -> None:
        """Tiles that are not finite are their picture's fault; anything else each picture may try again, alone."""
        if isinstance(error, BrokenTiles):
            for guest in guests:
                assert guest.restoration is not None
                if own := [job for job in error.jobs if job.canvas is guest.restoration.canvas]:
                    guest.failure = BrokenTiles(own)
            return
        logger.warning("device: a pass over tiles of %d pictures failed: %r", len(guests), error)
        if isinstance(error, torch.AcceleratorError):
            self.failure = f"the accelerator fails: {str(error).splitlines()[0]}"
        self.free_memory()
        for guest in guests:
            if guest.is_alone:
                guest.failure = not_enough_memory(error) if is_out_of_memory(error) else error
            guest.is_alone = True

    @torch.inference_mode()
    def _take_step(self, guest: Guest) -> None:
        """Ends the step when all its tiles have been stepped, and says what the picture needs next."""
        assert guest.restoration is not None
        canvas = guest.restoration.canvas
        if guest.failure is None and not canvas.pending_tiles():
            canvas.finish_step()
            self.figures.recent_megapixel_steps += guest.megapixels
            self.figures.megapixel_steps += guest.megapixels
            self._show(guest)
        with self._lock:
            guest.state = (canvas.step, canvas.latents)
            if guest.failure is not None or canvas.is_done:
                self._scheduler.rest(guest.number)
                guest.condition.notify()
            elif not guest.is_cancelled:
                self._want_tiles(guest)

    def _want_tiles(self, guest: Guest) -> None:
        assert guest.restoration is not None
        canvas = guest.restoration.canvas
        if tiles := canvas.pending_tiles():
            shape = TileJob(canvas, tiles[0]).shape
            self._scheduler.want_tiles(guest.number, shape, tiles, alone=guest.is_alone)

    def _show(self, guest: Guest) -> None:
        """A preview, when somebody has asked for one and the last one is old."""
        now_s = time.perf_counter()
        if not guest.wants_preview or now_s - guest.previewed_at_s < self._preview_every_s:
            return
        guest.wants_preview, guest.previewed_at_s = False, now_s
        assert guest.restoration is not None
        try:
            guest.preview = self._pipeline.preview(guest.restoration.canvas)
        except Exception as error:  # noqa: BLE001 - the picture itself does not need its preview
            logger.warning("device: no preview: %r", error)

    def _settle(self, quantum: Quantum, phase: str, seconds: float) -> None:
        with self._lock:
            self.figures.add(phase, seconds)
            numbers = [quantum.entry] if isinstance(quantum, Turn) else [number for number, _ in quantum.tiles]
            for number in numbers:
                if (guest := self._guests.get(number)) is not None:
                    guest.device_seconds += seconds / len(numbers)
            self._scheduler.charge(quantum, seconds)

    def _synchronize(self) -> None:
        if self._pipeline.device.type == "cuda":
            torch.cuda.synchronize(self._pipeline.device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out on the device or on the host; PyTorch has no class of its own for the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def not_enough_memory(error: BaseException) -> NotEnoughMemory:
    return NotEnoughMemory(f"engine: memory ran out twice ({str(error).splitlines()[0]}); send a smaller picture")

"""A replica's device and the one thread that uses it: quantum by quantum, as the scheduler says.

A picture's own thread takes a turn on the device to encode or decode (`Device.turn`), and lays its canvas in the
device's hands for the steps in between (`Device.denoise`). Whoever has the turn gives it back at every break.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from faithdiff.breaks import breaks
from faithdiff.denoiser import BrokenTiles, TileJob, prepare_tiles, step_tiles, tiles_per_pass
from serve.guest import Figures, Guest, is_out_of_memory, not_enough_memory
from serve.measurements import count_step, observe_device, observe_pass
from serve.scheduler import Pass, Quantum, Scheduler, Shape, Turn, entries_of
from serve.team import Delivery, Team
from serve.tracing import Trace, record_span

if TYPE_CHECKING:
    from faithdiff import FaithDiffPipeline
    from faithdiff.pipeline import Restoration

logger = logging.getLogger(__name__)

# A turn that was shorter is not given back yet: changing threads costs about a tenth of a millisecond.
_SHORTEST_TURN_S = 0.002


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

    def enter(self, *, work: float, megapixels: float, priority: int, trace: Trace | None = None) -> Guest:
        """A picture of so many output megapixels that will need about `work` megapixel-steps in all."""
        with self._lock:
            number = self._scheduler.add(work, priority)
            condition = threading.Condition(self._lock)
            guest = Guest(number, megapixels, condition, is_cancelled=self._is_closed, trace=trace)
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

    def denoise(self, guest: Guest, restoration: Restoration, team: Team | None = None) -> None:
        """Returns when the canvas has taken all its steps. Raises Cancelled, FloatingPointError, NotEnoughMemory.

        With a team, its members step a share of the tiles of every step.
        """
        with self._lock:
            guest.phase, guest.restoration, guest.team = "denoise", restoration, team
            guest.state = (restoration.canvas.step, restoration.canvas.latents)
            self._begin_step(guest)
            self._await(guest, lambda: restoration.canvas.is_done)

    def step_for_others(
        self, guest: Guest, restoration: Restoration, step: int, latents: np.ndarray, tiles: Sequence[int]
    ) -> np.ndarray:
        """Tiles [N, 4, h, w] of another replica's canvas [1, 4, H, W] after one step. Raises as `denoise` does."""
        canvas = restoration.canvas
        with self._lock:
            guest.phase, guest.restoration = "denoise", restoration
            canvas.stand_at(step, torch.from_numpy(latents))
            guest.away = frozenset(range(canvas.plan.num_tiles)) - frozenset(tiles)
            self._want_tiles(guest)
            self._await(guest, lambda: not guest.tiles_missing(tiles))
            return canvas.stepped(tiles).float().cpu().numpy()

    def free_memory(self) -> None:
        """Gives back what nobody uses."""
        gc.collect()
        if self._pipeline.device.type == "cuda":
            torch.cuda.empty_cache()

    def _capacity(self, shape: Shape) -> int:
        return self._pipeline.tiles_per_batch or tiles_per_pass(shape[:2], self._pipeline.device)

    def _await(self, guest: Guest, is_over: Callable[[], bool]) -> None:
        """Lets the device work on the guest's tiles until it is over."""
        self._changed.notify()
        guest.condition.wait_for(lambda: guest.is_cancelled or guest.failure is not None or is_over())
        guest.check()
        if guest.failure is not None:
            raise guest.failure

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
                for guest in self._guests.values():
                    self._take_deliveries(guest)
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
        tiles = [(present[number], tile) for number, tile in quantum.tiles if number in present]
        if not tiles:
            return
        start_s = time.perf_counter()
        try:
            self._step_tiles(tiles, quantum)
        except Exception as error:  # noqa: BLE001 - one picture's failure, whatever it is, must not reach the others
            self._blame(list(present.values()), error)
        self._count_pass(tiles, quantum.capacity, time.perf_counter() - start_s)
        for guest in present.values():
            self._take_step(guest)

    def _step_tiles(self, tiles: list[tuple[Guest, int]], quantum: Pass) -> None:
        unet, tiles_per_batch = self._pipeline.unet, 1 if quantum.is_alone else self._pipeline.tiles_per_batch
        for canvas in {id(guest): guest.canvas for guest, _ in tiles}.values():
            # A picture that is shared has only those tiles ready that were stepped here before.
            own = [tile for guest, tile in tiles if guest.canvas is canvas]
            prepare_tiles(
                unet,
                canvas.condition,
                canvas.plan,
                canvas.prepared,
                own,
                tiles_per_batch=self._pipeline.tiles_per_batch,
            )
        step_tiles(unet, [TileJob(guest.canvas, tile) for guest, tile in tiles], tiles_per_batch=tiles_per_batch)

    def _count_pass(self, tiles: list[tuple[Guest, int]], capacity: int, seconds: float) -> None:
        self._synchronize()
        observe_pass(len(tiles), capacity, seconds)
        done = sum(guest.megapixels / guest.canvas.plan.num_tiles for guest, _ in tiles)
        self.figures.recent_megapixel_steps += done
        self.figures.recent_tiles += len(tiles)
        self.figures.recent_rows += capacity

    def _blame(self, guests: list[Guest], error: Exception) -> None:
        """Tiles that are not finite are their picture's fault; anything else each picture may try again, alone."""
        if isinstance(error, BrokenTiles):
            for guest in guests:
                if own := [job for job in error.jobs if job.canvas is guest.canvas]:
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
        canvas = guest.canvas
        is_finished = guest.failure is None and not canvas.pending_tiles()
        if is_finished:
            canvas.finish_step()
            count_step(guest.megapixels)
            self._tell_step(guest)
            self._show(guest)
        with self._lock:
            if guest.failure is not None or canvas.is_done:
                self._scheduler.rest(guest.number)
                guest.condition.notify()
            elif not guest.is_cancelled:
                self._go_on(guest, is_finished)
            guest.state = (canvas.step, canvas.latents)

    def _go_on(self, guest: Guest, is_next_step: bool) -> None:
        if is_next_step:
            self._begin_step(guest)
        elif guest.tiles_left():
            self._want_tiles(guest)
        else:  # what is left of the step is done elsewhere
            guest.condition.notify()
            if guest.team is not None:
                guest.team.own_share_is_done()

    def _begin_step(self, guest: Guest) -> None:
        """Shares the tiles of a new step out, where there is a team, and wants those that stay here."""
        canvas = guest.canvas
        pending = canvas.pending_tiles()
        guest.away = frozenset()
        if guest.team is not None and pending:
            latents = canvas.latents.float().cpu().numpy()
            kept = guest.team.share_out(canvas.step, latents, pending, lambda delivery: self._deliver(guest, delivery))
            guest.away = frozenset(pending) - frozenset(kept)
        self._want_tiles(guest)

    def _deliver(self, guest: Guest, delivery: Delivery) -> None:
        with self._lock:
            guest.deliveries.append(delivery)
            self._changed.notify()

    def _take_deliveries(self, guest: Guest) -> None:
        """Tiles that come back stepped, or are to be stepped here after all."""
        deliveries, guest.deliveries = guest.deliveries, []
        for delivery in deliveries:
            canvas = guest.canvas
            if guest.is_cancelled or guest.failure is not None or delivery.step != canvas.step:
                continue
            guest.away -= frozenset(delivery.tiles)
            if delivery.stepped is not None:
                for tile, stepped in zip(delivery.tiles, torch.from_numpy(delivery.stepped).split(1), strict=True):
                    canvas.receive(tile, stepped)
            if delivery.stepped is None or not canvas.pending_tiles():
                self._take_step(guest)

    def _want_tiles(self, guest: Guest) -> None:
        canvas = guest.canvas
        if tiles := guest.tiles_left():
            shape = TileJob(canvas, tiles[0]).shape
            self._scheduler.want_tiles(guest.number, shape, tiles, alone=guest.is_alone)

    def _tell_step(self, guest: Guest) -> None:
        now_s = time.perf_counter()
        if guest.trace is not None and guest.stepped_at_s:
            record_span(guest.trace, "step", now_s - guest.stepped_at_s, step=guest.canvas.step)
        guest.stepped_at_s = now_s

    def _show(self, guest: Guest) -> None:
        """A preview, when somebody has asked for one and the last one is old."""
        now_s = time.perf_counter()
        if not guest.wants_preview or now_s - guest.previewed_at_s < self._preview_every_s:
            return
        guest.wants_preview, guest.previewed_at_s = False, now_s
        try:
            guest.preview = self._pipeline.preview(guest.canvas)
        except Exception as error:  # noqa: BLE001 - the picture itself does not need its preview
            logger.warning("device: no preview: %r", error)

    def _settle(self, quantum: Quantum, phase: str, seconds: float) -> None:
        with self._lock:
            self.figures.add(phase, seconds)
            observe_device(phase, seconds)
            numbers = [quantum.entry] if isinstance(quantum, Turn) else [number for number, _ in quantum.tiles]
            for number in numbers:
                if (guest := self._guests.get(number)) is not None:
                    guest.device_seconds += seconds / len(numbers)
            self._scheduler.charge(quantum, seconds)

    def _synchronize(self) -> None:
        if self._pipeline.device.type == "cuda":
            torch.cuda.synchronize(self._pipeline.device)

"""A replica's engine: many pictures in hand, one device, each result the same as if its picture were alone.

`Engine.submit` returns at once. Every picture has a thread of its own, which enlarges it, takes turns on the device to
encode it, waits while the device steps its tiles, takes turns to decode it, and corrects its colours. The device
(`serve.device`) does what the scheduler (`serve.scheduler`) says. Importing this module loads no model and no torch.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from pydantic import NonNegativeFloat, PositiveInt

from serve.assistance import Assistance
from serve.memory_model import Footprint, MemoryModel, TooLarge, measured_room
from serve.team import SharedPicture, Team
from serve.tickets import Entry, Ticket, TicketProgress
from serve.tracing import Trace, span
from sr_platform.config import StrictConfig

if TYPE_CHECKING:
    from faithdiff import FaithDiffPipeline, RestorationResult
    from faithdiff.canvas_state import CanvasState
    from faithdiff.pipeline import EnlargedPicture
    from faithdiff.request import RestorationRequest
    from serve.guest import Guest

__all__ = ["Busy", "Engine", "EngineConfig", "EngineLoad", "Ticket", "TicketProgress", "TooLarge"]

ResultT = TypeVar("ResultT")

logger = logging.getLogger(__name__)


class Busy(RuntimeError):  # noqa: N818 - the caller may come again
    """There is no room for the picture beside those in hand; later there will be."""


class EngineConfig(StrictConfig):
    """How much a replica takes in hand at once."""

    memory_bytes: PositiveInt | None = None
    """Memory that pictures may use, on the device and as much again on the host; None: what is free at the start."""
    max_entries: PositiveInt = 32
    """Pictures in hand at most."""
    preview_every_s: NonNegativeFloat = 1.0
    """Before a picture's first preview and between them, at least; they are made only when asked for."""


@dataclass(frozen=True)
class EngineLoad:
    """What an engine has in hand and how fast it is. Megapixels are those of results."""

    entries: int
    entries_by_phase: dict[str, int]
    megapixels: float
    free_megapixels: float
    """Of one more picture that fits beside those in hand; 0 when none is taken."""
    max_megapixels: float
    """Of the largest picture that fits alone."""
    megapixel_steps_left: float
    megapixel_steps_per_s: float | None
    """Output megapixels x steps in a second of the device; None before the first step."""
    batch_fill: float
    """Share of the rows of all passes that were no copies, 0 to 1."""
    seconds_by_phase: dict[str, float]
    """Seconds of the device since the start."""
    failure: str | None
    """Why the device can no longer be used; the replica must be started again."""


class Engine:
    """Restores pictures with one pipeline; give the pipeline to nobody else meanwhile."""

    def __init__(self, pipeline: FaithDiffPipeline, cfg: EngineConfig, *, memory_share: float = 1.0) -> None:
        from serve.device import Device

        self._pipeline, self._cfg = pipeline, cfg
        self._memory = MemoryModel(pipeline)
        self._room = measured_room(pipeline.device, cfg.memory_bytes, share=memory_share)
        self._lock = threading.Lock()
        self._entries: dict[int, Entry] = {}
        self._device = Device(pipeline, preview_every_s=cfg.preview_every_s)
        self._is_closed = False

    def submit(
        self,
        lq: np.ndarray,
        request: RestorationRequest,
        *,
        name: str,
        priority: int = 5,
        resume: CanvasState | None = None,
        team: Team | None = None,
        trace: Trace | None = None,
    ) -> Ticket:
        """Takes a picture in hand: uint8 RGB [H, W, 3]. Priority 9 gets 16 times the share of 5, and 0 a 32nd.

        With `resume` it goes on from a snapshot; the result has the bits of the undisturbed one. A snapshot of another
        picture, request or model version is left aside. A `team` steps some of its tiles; the engine closes it.

        Raises:
            faithdiff.errors.InputError: it is no such picture.
            TooLarge: it would not fit even alone.
            Busy: it does not fit beside those in hand.
        """
        entry = self.enter(lq, request, name=name, priority=priority, resume=resume, trace=trace)
        entry.team = team
        entry.future.add_done_callback(lambda future: self.cancel(entry) if future.cancelled() else None)
        threading.Thread(target=self._run, args=(entry,), name=f"picture {name}", daemon=True).start()
        return Ticket(self, entry)

    def assist(self, picture: SharedPicture) -> Assistance:
        """Takes part in a picture of another replica: encodes it now, and steps tiles of it when asked.

        Raises:
            TooLarge, Busy: as `submit`. InputError: the other replica has another model.
        """
        from faithdiff.errors import InputError

        if picture.model_version != self._pipeline.model_version:
            raise InputError(f"engine: this is model {self._pipeline.model_version}, not {picture.model_version}")
        entry = self.enter(picture.lq, picture.request, name=picture.name, priority=picture.priority)
        entry.is_of_others = True
        return Assistance(self, self._pipeline, self._device, entry)

    def enter(
        self,
        lq: np.ndarray,
        request: RestorationRequest,
        *,
        name: str,
        priority: int,
        resume: CanvasState | None = None,
        trace: Trace | None = None,
    ) -> Entry:
        """A place for the picture on the device and in memory. Raises as `submit`."""
        from faithdiff.pictures import to_rgb_array

        size_px = to_rgb_array(lq).shape[:2]
        footprint = self._memory.footprint(size_px, request, lq.itemsize)
        self._check_size(size_px, request, footprint)
        steps_left = request.num_inference_steps - (0 if resume is None else resume.step)
        work = footprint.tile_megapixels * max(1, steps_left)
        with self._lock:
            self._check_room(name, footprint)
            guest = self._device.enter(work=work, megapixels=footprint.megapixels, priority=priority, trace=trace)
            entry = Entry(lq, request, name, guest, footprint, resume)
            self._entries[guest.number] = entry
        return entry

    def leave(self, entry: Entry) -> None:
        """The picture is done with, in whatever way."""
        self._device.leave(entry.guest)
        with self._lock:
            self._entries.pop(entry.guest.number, None)

    def cancel(self, entry: Entry) -> None:
        self._device.cancel(entry.guest)

    def snapshot(self, entry: Entry) -> CanvasState | None:
        from faithdiff.canvas_state import CanvasState

        if entry.enlarged is None or entry.guest.state is None or entry.guest.state[0] == 0:
            return None
        step, latents = entry.guest.state
        return CanvasState(step, latents.float().cpu(), self._pipeline.fingerprint(entry.enlarged))

    def load(self) -> EngineLoad:
        """What is in hand now."""
        with self._lock:
            entries = list(self._entries.values())
        figures = self._device.figures
        return EngineLoad(
            entries=len(entries),
            entries_by_phase=dict(Counter(entry.guest.phase for entry in entries)),
            megapixels=sum(entry.guest.megapixels for entry in entries),
            free_megapixels=self._free_megapixels(entries),
            max_megapixels=self._memory.max_megapixels(self._room, []),
            megapixel_steps_left=sum(entry.guest.megapixels * _steps_left(entry) for entry in entries),
            megapixel_steps_per_s=figures.megapixel_steps_per_s,
            batch_fill=figures.batch_fill,
            seconds_by_phase=dict(figures.seconds),
            failure=self._device.failure,
        )

    def close(self) -> None:
        """Cancels what is in hand, and returns when all threads have ended."""
        with self._lock:
            self._is_closed = True
            entries = list(self._entries.values())
        self._device.close()
        futures.wait([entry.future for entry in entries if not entry.is_of_others])

    def _check_size(self, size_px: tuple[int, ...], request: RestorationRequest, footprint: Footprint) -> None:
        if self._room.holds([footprint]):
            return
        height, width = self._memory.largest((size_px[0], size_px[1]), request, self._room)
        raise TooLarge(
            f"picture: {size_px[1]}x{size_px[0]} px at scale {request.scale} needs {footprint.total / 1e9:.2f} GB of "
            f"memory; at most {width}x{height} px fit this replica: send a smaller picture or a smaller scale"
        )

    def _check_room(self, name: str, footprint: Footprint) -> None:
        if self._is_closed or self._device.failure is not None:
            raise Busy(f"engine: picture {name} cannot be taken: {self._device.failure or 'it is being closed'}")
        in_hand = [entry.footprint for entry in self._entries.values()]
        if len(in_hand) >= self._cfg.max_entries or not self._room.holds([*in_hand, footprint]):
            raise Busy(f"engine: {len(in_hand)} pictures are in hand already; come again later")

    def _free_megapixels(self, entries: list[Entry]) -> float:
        if self._is_closed or self._device.failure is not None or len(entries) >= self._cfg.max_entries:
            return 0.0
        return self._memory.max_megapixels(self._room, [entry.footprint for entry in entries])

    def _run(self, entry: Entry) -> None:
        outcome: RestorationResult | BaseException
        try:
            outcome = self._restore(entry)
        except BaseException as error:  # noqa: BLE001 - whoever waits for the picture is told, whatever it is
            outcome = error
        if entry.team is not None:
            entry.team.close()
        self.leave(entry)
        if entry.future.set_running_or_notify_cancel():
            if isinstance(outcome, BaseException):
                entry.future.set_exception(outcome)
            else:
                entry.future.set_result(outcome)

    def _restore(self, entry: Entry) -> RestorationResult:
        pipeline, guest, team = self._pipeline, entry.guest, entry.team
        # A read-only array, as Ray hands them over, would make PyTorch warn.
        enlarged = pipeline.enlarge(np.array(entry.lq), entry.request)
        entry.enlarged = enlarged
        resume = self._fitting(entry, enlarged)
        if team is not None:
            team.start()
        tiles = None if team is None else ()
        restoration = self.on_device(guest, "encode", lambda: pipeline.encode(enlarged, resume=resume, tiles=tiles))
        self._device.denoise(guest, restoration, team)
        decoded = self.on_device(guest, "decode", lambda: pipeline.decode(restoration))
        with span("color_fix", level=logging.DEBUG):
            result = pipeline.compose(restoration, decoded)
        guest.check()
        return result

    def _fitting(self, entry: Entry, enlarged: EnlargedPicture) -> CanvasState | None:
        if entry.resume is None or entry.resume.fingerprint == self._pipeline.fingerprint(enlarged):
            return entry.resume
        logger.warning("engine: picture %s starts again: its saved state is of another picture or model", entry.name)
        return None

    def on_device(self, guest: Guest, phase: str, compute: Callable[[], ResultT]) -> ResultT:
        """`compute` in turns on the device; when memory runs out, once more after freeing what nobody uses."""
        from serve.guest import is_out_of_memory, not_enough_memory

        try:
            with self._device.turn(guest, phase):
                return compute()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._device.free_memory()
        try:
            with self._device.turn(guest, phase):
                return compute()
        except Exception as error:
            raise not_enough_memory(error) if is_out_of_memory(error) else error from error


def _steps_left(entry: Entry) -> int:
    step = 0 if entry.guest.state is None else entry.guest.state[0]
    return entry.request.num_inference_steps - step

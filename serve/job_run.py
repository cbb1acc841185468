"""One job on one replica, from its input in storage to its result there, or to the problem that its owner is told."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from serve import images
from serve.engine import Busy
from serve.form import UpscaleRequest
from serve.jobs import Job, JobStore, Progress, ResultFile
from serve.measurements import cause_of, observe_end
from serve.problems import Problem, internal_error
from serve.team import Peer
from serve.tickets import Ticket
from serve.tracing import current, span
from sr_platform.errors import InputDataError, RequestError, StorageError
from sr_platform.storage import Storage

if TYPE_CHECKING:
    from faithdiff.canvas_state import CanvasState
    from faithdiff.picture_files import PictureFile
    from serve.served_model import ServedModel

logger = logging.getLogger(__name__)

# Before a job goes back to the queue, from which it may come at once.
_PAUSE_S = 1.0

Captioning = Callable[[np.ndarray], Awaitable[str]]
"""What describes RGB [H, W, 3] in words."""


class Unreachable(RuntimeError):  # noqa: N818 - reads as what happened
    """Something that a job needs does not answer for now; another attempt will find it again."""


@dataclass(frozen=True)
class Surroundings:
    """What every job of a replica works with. `peers(job)` are replicas that may step some of its tiles."""

    store: JobStore
    storage: Storage
    owner: str
    peers: Callable[[Job], Sequence[Peer]] = lambda job: ()
    largest_megapixels: Callable[[], float] = lambda: 0.0
    """Of the results that the other replicas have room for when they have nothing else in hand."""
    caption: Captioning | None = None


@dataclass
class JobRun:
    """An attempt at a job. Its methods belong to one event loop; `progress` and `store_snapshot` to threads, too."""

    job: Job
    model: ServedModel
    around: Surroundings
    phase: str = "encode"
    ticket: Ticket | None = None
    is_lost: bool = False
    snapshot_at_s: float = field(default_factory=time.monotonic)
    _snapshot_step: int = 0
    _preview_step: int = 0
    _needs_no_snapshot: bool = False
    _snapshot_lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while latents are stored or removed."""

    async def work(self) -> None:
        """Runs to the job's end. Raises only what the database or the storage raises while the end is written."""
        try:
            finished = await self._restore()
        except Exception as error:  # noqa: BLE001 - whatever it is, the job must end
            await self._end(error)
        else:
            if finished:
                self._count_end("done")

    def cancel(self) -> None:
        """The device works on it no longer than the step or band that it is at."""
        if self.ticket is not None:
            self.ticket.cancel()

    def give_up(self) -> None:
        """Others have the job: nothing of this attempt may be published."""
        self.is_lost = True
        self.cancel()

    def progress(self) -> Progress:
        """How far it is, with a preview where there is a new one."""
        job = self.job
        if self.ticket is None:
            return Progress(job.id, job.attempt, self.phase, 0, job.num_steps, None, 0)
        state, preview = self.ticket.progress(), None
        if state.step > self._preview_step and (picture := self.ticket.preview()) is not None:
            buffer = io.BytesIO()
            picture.save(buffer, "WEBP", quality=70)
            preview, self._preview_step = buffer.getvalue(), state.step
        phase = self.phase if self.phase == "store" else state.phase
        return Progress(job.id, job.attempt, phase, state.step, state.num_steps, preview, self._preview_step)

    def store_snapshot(self) -> None:
        """Lays the latents where another replica would go on from them."""
        self.snapshot_at_s = time.monotonic()
        state = None if self.ticket is None else self.ticket.snapshot()
        with self._snapshot_lock:
            if state is None or state.step <= self._snapshot_step or self.is_lost or self._needs_no_snapshot:
                return
            self.around.storage.write_bytes_atomic(_snapshot_name(self.job), state.to_bytes())
            self._snapshot_step = state.step

    def _remove_snapshot(self) -> None:
        """Waits for one that is being stored: nothing may come after."""
        with self._snapshot_lock:
            self._needs_no_snapshot = True
            if self._snapshot_step or self.job.attempt > 1:
                self.around.storage.delete(_snapshot_name(self.job))

    async def hand_over(self) -> None:
        """Back to the queue, with the latents so far: whoever claims it next goes on from them."""
        await asyncio.to_thread(self.store_snapshot)
        self.give_up()
        job = self.job
        released = await asyncio.to_thread(self.around.store.release, job.id, self.around.owner, job.attempt)
        logger.info("claims: job %s was %s", job.id, "given back" if released else "gone already")

    async def _restore(self) -> bool:
        """Whether the picture was this attempt's to publish."""
        job = self.job
        with span("read"):
            source, resume = await asyncio.to_thread(self._read)
        request = await self._described(UpscaleRequest.model_validate(job.request), source)
        self.ticket = self.model.submit(
            source.rgb,
            request,
            # A later attempt must not be taken for this one by the peers it was shared with.
            name=f"{job.id}-{job.attempt}-{uuid.uuid4().hex[:8]}",
            priority=job.priority,
            resume=resume,
            # After the caption, which may take its time.
            peers=await asyncio.to_thread(self.around.peers, job),
            trace=current(),
        )
        if self.is_lost:
            self.ticket.cancel()
        restored = await asyncio.wrap_future(self.ticket.future)
        self.phase = "store"
        with span("store"):
            return await asyncio.to_thread(lambda: self._finish(self._write(request, source, restored.array)))

    async def _described(self, request: UpscaleRequest, source: PictureFile) -> UpscaleRequest:
        """With a prompt by the captioner, where one was asked for."""
        if not request.auto_prompt or self.around.caption is None:
            return request
        with span("caption"):
            return request.model_copy(update={"prompt": await self.around.caption(source.rgb)})

    def _read(self) -> tuple[PictureFile, CanvasState | None]:
        """The picture, checked when the job was accepted, and the state another attempt has left, if any."""
        from faithdiff.canvas_state import CanvasState
        from faithdiff.errors import InputError

        job, storage = self.job, self.around.storage
        source = images.read_picture(storage.read_bytes(job.input_name), images.ACCEPTED)
        if job.attempt == 1:
            return source, None
        try:
            return source, CanvasState.from_bytes(storage.read_bytes(_snapshot_name(job)))
        except (InputDataError, InputError) as error:
            logger.info("claims: job %s starts from its beginning: %s", job.id, error)
            return source, None

    def _write(self, request: UpscaleRequest, source: PictureFile, restored: np.ndarray) -> ResultFile:
        """Encodes the picture and stores it under the attempt's own name, so that a late one overwrites nothing."""
        data, media_type = images.write_picture(restored, source, request.scale, request.output_options())
        name = f"jobs/{self.job.id}/result-{self.job.attempt}"
        self.around.storage.write_bytes_atomic(name, data)
        height, width = restored.shape[:2]
        return ResultFile(name, media_type, len(data), hashlib.sha256(data).hexdigest(), (width, height))

    def _finish(self, result: ResultFile) -> bool:
        job, around, info = self.job, self.around, self.model.info
        assert self.ticket is not None
        finished = not self.is_lost and around.store.finish(
            job.id,
            around.owner,
            job.attempt,
            result=result,
            model_version=info.version,
            manifest_digest=info.manifest_digest,
            device_seconds=self.ticket.progress().device_seconds,
        )
        if not finished:
            logger.warning("claims: job %s: the result of attempt %s came too late", job.id, job.attempt)
            around.storage.delete(result.name)
        else:
            self._remove_snapshot()
        return finished

    async def _end(self, error: Exception) -> None:
        """What becomes of a job that has no picture."""
        from faithdiff.errors import Cancelled

        store, by = self.around.store, (self.job.id, self.around.owner, self.job.attempt)
        if isinstance(error, Cancelled):
            if not self.is_lost and await asyncio.to_thread(store.cancelled, *by):
                self._count_end("cancelled")
        elif isinstance(error, StorageError | Busy | Unreachable):
            await asyncio.sleep(_PAUSE_S)
            logger.warning("claims: job %s goes back to the queue: %s", self.job.id, error)
            await asyncio.to_thread(store.release, *by)
        else:
            problem = problem_of(error)
            if problem.status >= 500:
                logger.error("claims: job %s failed", self.job.id, exc_info=error)
            body = problem.body(f"/v1/jobs/{self.job.id}")
            if await asyncio.to_thread(store.fail, *by, body):
                self._count_end("failed", cause=cause_of(body))

    def _count_end(self, state: str, **cause: str) -> None:
        job = self.job
        observe_end(state, megapixels=job.megapixels, seconds=time.time() - job.submitted_at, **cause)


def problem_of(error: Exception) -> Problem:
    """What the owner of a picture is told. What nobody foresaw stays in the log."""
    from faithdiff.errors import InputError
    from serve.guest import NotEnoughMemory

    if isinstance(error, Problem):
        return error
    if isinstance(error, InputError | RequestError):
        return Problem(422, "refused-by-model", str(error))
    if isinstance(error, FloatingPointError):
        return Problem(500, "not-finite", "picture: the model gives no finite result for it; send another picture")
    if isinstance(error, NotEnoughMemory):
        return Problem(500, "not-enough-memory", str(error))
    return internal_error()


def _snapshot_name(job: Job) -> str:
    return f"jobs/{job.id}/canvas.safetensors"

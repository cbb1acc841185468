"""Jobs of a real store, worked off by runners with nano; what happens when a replica dies, stalls or is stopped."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from faithdiff import FaithDiffPipeline
from faithdiff.request import RestorationRequest
from serve.claims import ClaimConfig, JobRunner
from serve.engine import EngineConfig
from serve.form import UpscaleRequest
from serve.job_run import Surroundings, Unreachable
from serve.jobs import Job, JobState, JobStore, NewJob, new_job_id
from serve.served_model import ModelConfig, ServedModel, load_model
from sr_platform.errors import StorageError
from sr_platform.storage import Storage

pytestmark = pytest.mark.anyio

CFG = ClaimConfig(poll_s=0.05, heartbeat_s=0.05, lease_s=30.0, snapshot_every_s=0.1)
HASTY = CFG.model_copy(update={"lease_s": 1.0})
"""Of replicas that are lost: a busy machine may keep a heartbeat waiting for longer."""
TILE_PX = 64


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model() -> Iterator[ServedModel]:
    cfg = ModelConfig(tile_px=TILE_PX, engine=EngineConfig(memory_bytes=10**9, preview_every_s=0.0))
    made = load_model("nano", cfg)
    yield made
    made.engine.close()


@pytest.fixture
def around(store: JobStore, storage: Storage) -> Callable[..., Surroundings]:
    return lambda owner, **settings: Surroundings(store, storage, owner, **settings)


@pytest.fixture
def submit(store: JobStore, storage: Storage, to_file: Callable[..., bytes]) -> Callable[..., str]:
    """`submit(steps=3, side_px=64, ...)` -> the id of a new job of a square picture."""

    def new(*, steps: int = 3, side_px: int = 64, priority: int = 5, depth: Any = np.uint8, **fields: Any) -> str:
        request = UpscaleRequest(scale=1, num_inference_steps=steps, **fields)
        job_id, now_s, megapixels = new_job_id(), time.time(), side_px * side_px / 1e6
        storage.write_bytes_atomic(f"jobs/{job_id}/input", to_file(_picture(side_px), "PNG"))
        job, is_new = store.submit(
            NewJob(
                id=job_id,
                key_id="anybody",
                idempotency_key=None,
                request_digest="0" * 64,
                request=request.model_dump(mode="json"),
                input_name=f"jobs/{job_id}/input",
                input_size_px=(side_px, side_px),
                megapixels=megapixels,
                num_tiles=1,
                work=megapixels * steps,
                estimated_s=1.0,
                priority=priority,
                webhook_url=None,
                trace_id="ab" * 16,
                expires_at=now_s + 600,
                submitted_at=now_s,
            )
        )
        assert is_new
        return job.id

    return new


def _picture(side_px: int) -> np.ndarray:
    return np.random.default_rng(side_px).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)


def _restored(model: ServedModel, side_px: int, steps: int, **fields: Any) -> np.ndarray:
    request = UpscaleRequest(scale=1, num_inference_steps=steps, **fields)
    settings = RestorationRequest(**request.restoration_fields(), tile_px=TILE_PX)
    pipeline = FaithDiffPipeline.from_pretrained("nano")
    restoration = pipeline.prepare(_picture(side_px), settings)
    pipeline._denoise(restoration, None)
    return pipeline.finish(restoration).array


def _result(store: JobStore, storage: Storage, job_id: str) -> np.ndarray:
    job = _get(store, job_id)
    assert job.state is JobState.DONE, job
    assert job.result is not None
    return np.asarray(Image.open(BytesIO(storage.read_bytes(job.result.name))))


def _get(store: JobStore, job_id: str) -> Job:
    job = store.get(job_id, None)
    assert job is not None
    return job


async def _until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    ends_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_s, "it did not come to pass"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def running(around: Surroundings, model: ServedModel, cfg: ClaimConfig = CFG) -> Any:
    runner = JobRunner(around, cfg, lambda: model)
    runner.start()
    try:
        yield runner
    finally:
        await runner.stop(grace_s=0.0)


def _vanish(runner: JobRunner) -> None:
    """As if the process were gone: nothing is told any more, and nothing published."""
    for loop in runner._loops:
        loop.cancel()
    for run in runner._runs.values():
        run.give_up()


async def test_jobs_are_worked_off_with_progress_and_previews(
    store: JobStore, storage: Storage, model: ServedModel, around: Any, submit: Any
) -> None:
    ids = [submit(steps=12), submit(side_px=96, steps=6), submit(seed=4)]
    seen: list[Job] = []
    async with running(around("one"), model) as runner:
        while _get(store, ids[0]).state in (JobState.QUEUED, JobState.RUNNING):
            seen.append(_get(store, ids[0]))
            await asyncio.sleep(0.01)
        await _until(lambda: all(_get(store, job_id).state is JobState.DONE for job_id in ids))
        await _until(lambda: runner.num_running == 0)
    assert {job.phase for job in seen} & {"encode", "denoise", "decode"}
    assert any(0 < job.step < 12 for job in seen)
    assert any(job.preview for job in seen)
    assert np.array_equal(_result(store, storage, ids[1]), _restored(model, 96, 6))
    done = _get(store, ids[2])
    assert (done.model_version, done.attempt) == ("nano", 1)
    assert done.device_seconds is not None
    assert done.device_seconds > 0
    assert sorted(name.rsplit("/", 1)[1] for name in storage.list("jobs/")) == ["input"] * 3 + ["result-1"] * 3


async def test_a_new_job_is_taken_although_the_next_look_is_far_away(
    store: JobStore, model: ServedModel, around: Any, submit: Any
) -> None:
    async with running(around("one"), model, CFG.model_copy(update={"poll_s": 600.0})):
        await asyncio.sleep(0.1)
        for _ in range(2):
            job_id = submit(steps=1)
            await _until(lambda job_id=job_id: _get(store, job_id).state is JobState.DONE)  # type: ignore[misc]


async def test_the_job_of_a_replica_that_is_gone_goes_on_from_its_latents(
    store: JobStore, storage: Storage, model: ServedModel, around: Any, submit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = submit(side_px=96, steps=25)
    async with running(around("first"), model, HASTY) as first:
        await _until(lambda: any(name.endswith("canvas.safetensors") for name in storage.list("jobs/")))
        stored_at = _get(store, job_id).step
        _vanish(first)
        assert _get(store, job_id).state is JobState.RUNNING
        async with running(around("second"), model):
            await _until(lambda: _get(store, job_id).attempt == 2)
            await _until(lambda: _get(store, job_id).step > 0)
            assert _get(store, job_id).step >= min(1, stored_at)
            await _until(lambda: _get(store, job_id).state is JobState.DONE)
    assert np.array_equal(_result(store, storage, job_id), _restored(model, 96, 25))
    job = _get(store, job_id)
    assert (job.attempt, job.num_lost_attempts) == (2, 1)
    assert job.result is not None
    assert job.result.name.endswith("result-2")
    assert "starts from its beginning" not in caplog.text


async def test_what_a_stalled_replica_publishes_late_is_not_heard_and_leaves_no_file(
    store: JobStore, storage: Storage, model: ServedModel, around: Any, submit: Any
) -> None:
    job_id = submit(side_px=96, steps=25)
    async with running(around("stalled"), model) as stalled:
        await _until(lambda: _get(store, job_id).state is JobState.RUNNING)
        for loop in stalled._loops:  # it computes on, and tells nothing
            loop.cancel()
        store.release(job_id, "stalled", 1)
        async with running(around("next"), model):
            await _until(lambda: _get(store, job_id).state is JobState.DONE)
        await _until(lambda: stalled.num_running == 0)
    done = _get(store, job_id)
    assert done.result is not None
    assert (done.attempt, done.result.name) == (2, f"jobs/{job_id}/result-2")
    assert set(storage.list("jobs/")) == {f"jobs/{job_id}/input", done.result.name}


async def test_latents_that_are_still_being_stored_when_their_job_is_done_do_not_stay(
    store: JobStore, storage: Storage, model: ServedModel, around: Any, submit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, write, begun = submit(side_px=96, steps=25), Storage.write_bytes_atomic, threading.Event()

    def slow(self: Storage, name: str, data: bytes) -> None:
        if name.endswith("canvas.safetensors"):
            begun.set()
            ends_s = time.monotonic() + 30.0
            while _get(store, job_id).state is JobState.RUNNING and time.monotonic() < ends_s:
                time.sleep(0.01)
        write(self, name, data)

    monkeypatch.setattr(Storage, "write_bytes_atomic", slow)
    async with running(around("one"), model) as runner:
        await _until(lambda: _get(store, job_id).state is JobState.DONE)
        await _until(lambda: runner.num_running == 0)
        assert begun.is_set()
        await asyncio.sleep(0.2)
    assert sorted(storage.list("jobs/")) == [f"jobs/{job_id}/input", f"jobs/{job_id}/result-1"]


async def test_a_stopped_replica_finishes_what_it_can_and_hands_the_rest_over(
    store: JobStore, storage: Storage, model: ServedModel, around: Any, submit: Any
) -> None:
    long_id = submit(side_px=96, steps=25)
    async with running(around("first"), model) as first:
        await _until(lambda: _get(store, long_id).step > 2)
        await first.stop(grace_s=0.0)
        job = _get(store, long_id)
        assert job.state is JobState.QUEUED
        assert job.num_lost_attempts == 0
        async with running(around("second"), model):
            await _until(lambda: _get(store, long_id).state is JobState.DONE)
    assert np.array_equal(_result(store, storage, long_id), _restored(model, 96, 25))
    short_id = submit(steps=2)
    async with running(around("third"), model) as third:
        await _until(lambda: _get(store, short_id).state is not JobState.QUEUED)
        await third.stop(grace_s=60.0)
        assert _get(store, short_id).state is JobState.DONE


async def test_a_cancelled_job_frees_the_engine_within_a_step(
    store: JobStore, model: ServedModel, around: Any, submit: Any
) -> None:
    job_id = submit(side_px=96, steps=200)
    async with running(around("one"), model):
        await _until(lambda: _get(store, job_id).step > 1)
        store.request_cancel(job_id, None)
        told_at = _get(store, job_id).step
        await _until(lambda: _get(store, job_id).state is JobState.CANCELLED)
        await _until(lambda: model.engine.load().entries == 0)
    assert _get(store, job_id).step < told_at + 100


async def test_a_job_that_fits_no_replica_fails_and_says_which_size_would(
    store: JobStore, model: ServedModel, around: Any, submit: Any
) -> None:
    small_memory = load_model("nano", ModelConfig(tile_px=TILE_PX, engine=EngineConfig(memory_bytes=20_000_000)))
    too_large, fits = submit(side_px=768), submit(side_px=64)
    async with running(around("small"), small_memory):
        await _until(lambda: _get(store, too_large).state is JobState.FAILED)
        await _until(lambda: _get(store, fits).state is JobState.DONE)
    small_memory.engine.close()
    problem = _get(store, too_large).problem
    assert problem is not None
    assert problem["type"].endswith("refused-by-model")
    assert "at most" in problem["detail"]


async def test_a_replica_leaves_a_job_that_only_a_larger_one_can_hold(
    store: JobStore, model: ServedModel, around: Any, submit: Any
) -> None:
    small_memory = load_model("nano", ModelConfig(tile_px=TILE_PX, engine=EngineConfig(memory_bytes=20_000_000)))
    large, fits = submit(side_px=768, steps=1), submit(side_px=64)
    async with running(around("small", largest_megapixels=lambda: 100.0), small_memory):
        await _until(lambda: _get(store, fits).state is JobState.DONE)
        await asyncio.sleep(0.3)
        assert _get(store, large).state is JobState.QUEUED
    small_memory.engine.close()


async def test_storage_that_fails_for_a_while_sends_the_job_back_to_the_queue(
    store: JobStore, storage: Storage, model: ServedModel, around: Any, submit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, write, failures = submit(), Storage.write_bytes_atomic, iter(range(1))

    def unsteady(self: Storage, name: str, data: bytes) -> None:
        if "result" in name and next(failures, None) is not None:
            raise StorageError("storage: it does not answer")
        write(self, name, data)

    monkeypatch.setattr(Storage, "write_bytes_atomic", unsteady)
    async with running(around("one"), model):
        await _until(lambda: _get(store, job_id).state is JobState.DONE)
    job = _get(store, job_id)
    assert (job.attempt, job.num_lost_attempts) == (2, 0)


async def test_a_caption_becomes_the_prompt_where_one_was_asked_for(
    store: JobStore, storage: Storage, model: ServedModel, around: Any, submit: Any
) -> None:
    seen: list[tuple[int, ...]] = []

    async def caption(rgb: np.ndarray) -> str:
        seen.append(rgb.shape)
        if len(seen) == 1:
            raise Unreachable("captioner: none is there yet")
        return "A green field."

    asked, plain = submit(auto_prompt=True), submit()
    async with running(around("one", caption=caption), model):
        await _until(lambda: all(_get(store, job_id).state is JobState.DONE for job_id in (asked, plain)))
    assert seen == [(64, 64, 3)] * 2
    assert np.array_equal(_result(store, storage, asked), _restored(model, 64, 3, prompt="A green field."))
    assert np.array_equal(_result(store, storage, plain), _restored(model, 64, 3))


async def test_nothing_is_claimed_while_the_model_changes(
    store: JobStore, model: ServedModel, around: Any, submit: Any
) -> None:
    running_id = submit(side_px=96, steps=20)
    async with running(around("one"), model) as runner:
        await _until(lambda: runner.num_running == 1)
        pausing = asyncio.create_task(runner.pause())
        await asyncio.sleep(0)
        waiting_id = submit()
        await pausing
        assert _get(store, running_id).state is JobState.DONE
        assert _get(store, waiting_id).state is JobState.QUEUED
        runner.resume()
        await _until(lambda: _get(store, waiting_id).state is JobState.DONE)

"""The engine on the nano model: bits, cancellation, failures, resumption, room. Nothing here depends on timing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

import numpy as np
import pytest
import torch

import serve.device
from faithdiff import FaithDiffPipeline
from faithdiff.canvas_state import CanvasState
from faithdiff.errors import Cancelled, InputError
from faithdiff.request import RestorationRequest
from serve.engine import Busy, Engine, EngineConfig, Ticket, TooLarge
from serve.guest import NotEnoughMemory

STEPS = 3


@pytest.fixture(scope="module")
def pipeline() -> FaithDiffPipeline:
    """Nano with an alignment module that does something: its zero-initialised layers are given weights."""
    pipe = FaithDiffPipeline.from_pretrained("nano")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*pipe.unet.alignment.proj.parameters(), *pipe.unet.alignment.condition.conv_out.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return pipe


@pytest.fixture
def engine(pipeline: FaithDiffPipeline) -> Iterator[Engine]:
    engine = Engine(pipeline, EngineConfig(memory_bytes=2 * 10**9, preview_every_s=0))
    yield engine
    engine.close()


def request(**fields: Any) -> RestorationRequest:
    return RestorationRequest(
        **{"scale": 1, "num_inference_steps": STEPS, "tile_px": 64, "tile_stride_px": 48, **fields}
    )


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def bits(result: Any) -> bytes:
    return np.asarray(result.image).tobytes()


def alone(pipeline: FaithDiffPipeline, lq: np.ndarray, settings: RestorationRequest) -> bytes:
    """Through FaithDiffPipeline's own call."""
    names = [name for name in RestorationRequest.__dataclass_fields__ if name != "switches"]
    return bits(pipeline(lq, **{name: getattr(settings, name) for name in names}))


CROWD = [
    (picture(64, 64, 1), request(seed=1, prompt="a face")),
    (picture(40, 100, 2), request(seed=2, guidance_scale=7.5)),
    (picture(100, 90, 3), request(seed=3)),
    (picture(64, 64, 4), request(seed=4, guidance_scale=1.0)),
    (picture(32, 48, 5), request(seed=5, scale=2, start_from="noise")),
    (picture(128, 64, 6), request(seed=6, tile_px=128, num_inference_steps=5)),
    (picture(16, 528, 7), request(seed=7, vae_tile_px=512, num_inference_steps=1, tile_px=512)),
    (picture(64, 64, 8), request(seed=1, prompt="another face")),
    (picture(30, 30, 9), request(seed=9, color_fix="wavelet")),
]


class Passes:
    """Stands in for `step_tiles`: notes whose tiles are in each pass, and may do something first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[set[int]] = []
        self.before: Callable[[int, list[Any]], None] = lambda number, jobs: None
        real = serve.device.step_tiles

        def step_tiles(unet: Any, jobs: list[Any], **settings: Any) -> None:
            self.seen.append({id(job.canvas) for job in jobs})
            self.before(len(self.seen), jobs)
            real(unet, jobs, **settings)

        monkeypatch.setattr(serve.device, "step_tiles", step_tiles)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


def test_nine_mixed_pictures_together_give_the_bytes_each_has_alone(engine, pipeline):
    tickets = [engine.submit(lq, settings, name=str(i), priority=i) for i, (lq, settings) in enumerate(CROWD)]
    together = [bits(ticket.future.result()) for ticket in tickets]
    assert together == [alone(pipeline, lq, settings) for lq, settings in CROWD]
    assert {ticket.progress().phase for ticket in tickets} == {"done"}
    assert all(ticket.progress().device_seconds > 0 for ticket in tickets)


def test_neighbours_that_are_cancelled_change_no_byte(engine, pipeline):
    lq, settings = CROWD[2]
    neighbours = [engine.submit(*CROWD[i], name=f"neighbour {i}") for i in (0, 1, 5)]
    ticket = engine.submit(lq, settings, name="stays")
    when_at_step(ticket, 1, lambda: [neighbour.cancel() for neighbour in neighbours])
    assert bits(ticket.future.result()) == alone(pipeline, lq, settings)


def when_at_step(ticket: Ticket, step: int, act: Callable[[], Any]) -> None:
    """Acts as soon as the picture has taken a step, or is done."""
    while ticket.progress().step < step and not ticket.future.done():
        wait([ticket.future], timeout=0.005)
    act()


@pytest.mark.parametrize("index", [2, 6])
def test_a_picture_resumed_from_any_step_gives_the_same_bytes(index, engine, pipeline):
    lq, settings = CROWD[index]
    expected = alone(pipeline, lq, settings)
    restoration = pipeline.prepare(lq, settings)
    for step in range(settings.num_inference_steps + 1):
        assert restoration.canvas.step == step
        state = CanvasState.from_bytes(pipeline.state(restoration).to_bytes())
        assert bits(engine.submit(lq, settings, name="resumed", resume=state).future.result()) == expected
        if step < settings.num_inference_steps:
            serve.device.step_tiles(pipeline.unet, jobs_of(restoration.canvas))
            with torch.inference_mode():
                restoration.canvas.finish_step()


def jobs_of(canvas: Any) -> list[Any]:
    return [serve.device.TileJob(canvas, tile) for tile in canvas.pending_tiles()]


def test_a_snapshot_taken_under_way_goes_on_in_another_engine(engine, pipeline, passes):
    lq, settings = CROWD[2]
    reached, go_on = threading.Event(), threading.Event()
    tiles = pipeline.prepare(lq, settings).canvas.plan.num_tiles

    def stop_in_the_second_step(number: int, jobs: list[Any]) -> None:
        if number == tiles + 2:
            reached.set()
            go_on.wait()

    passes.before = stop_in_the_second_step
    ticket = engine.submit(lq, settings, name="first")
    assert ticket.snapshot() is None
    reached.wait()
    state = ticket.snapshot()
    ticket.cancel()
    go_on.set()
    assert state is not None
    assert state.step == 1
    passes.before = lambda number, jobs: None
    other = Engine(pipeline, EngineConfig(memory_bytes=10**9))
    resumed = other.submit(lq, settings, name="second", resume=CanvasState.from_bytes(state.to_bytes()))
    assert bits(resumed.future.result()) == alone(pipeline, lq, settings)
    other.close()


def test_a_snapshot_of_another_request_is_left_aside(engine, pipeline, caplog):
    lq, settings = CROWD[0]
    restoration = pipeline.prepare(lq, request(seed=77))
    ticket = engine.submit(lq, settings, name="p", resume=pipeline.state(restoration))
    assert bits(ticket.future.result()) == alone(pipeline, lq, settings)
    assert "starts again" in caplog.text


def test_cancelling_frees_the_device_within_the_pass_that_runs(engine, passes):
    lq, settings = CROWD[2]
    tickets: list[Ticket] = []
    ready = threading.Event()

    def cancel_in_the_third_pass(number: int, jobs: list[Any]) -> None:
        ready.wait()
        if number == 3:
            tickets[0].cancel()

    passes.before = cancel_in_the_third_pass
    tickets.append(engine.submit(lq, settings, name="p"))
    ready.set()
    with pytest.raises(Cancelled):
        tickets[0].future.result()
    assert len(passes.seen) == 3
    assert engine.load().entries == 0


def test_cancelling_ends_encoding_at_the_next_band(engine, pipeline, monkeypatch):
    """A picture in bands has hundreds of breaks; none is reached after the one at which it is cancelled."""
    monkeypatch.setattr(serve.device, "_SHORTEST_TURN_S", 0)
    tickets: list[Ticket] = []
    breaks = []
    submitted = threading.Event()
    real = serve.device.Device._pass_on

    def pass_on(self: Any, guest: Any) -> None:
        submitted.wait()
        breaks.append(guest.phase)
        if len(breaks) == 5:
            tickets[0].cancel()
        real(self, guest)

    monkeypatch.setattr(serve.device.Device, "_pass_on", pass_on)
    tickets.append(engine.submit(*CROWD[6], name="p"))
    submitted.set()
    with pytest.raises(Cancelled):
        tickets[0].future.result()
    assert breaks == ["encode"] * 5


def test_cancelling_the_future_cancels_the_work(engine, passes):
    tickets: list[Ticket] = []
    submitted = threading.Event()

    def cancel(number: int, jobs: list[Any]) -> None:
        submitted.wait()
        tickets[0].future.cancel()

    passes.before = cancel
    tickets.append(engine.submit(*CROWD[2], name="p"))
    submitted.set()
    wait([tickets[0].future])
    assert tickets[0].future.cancelled()
    assert len(passes.seen) == 1


def test_an_asyncio_task_that_gives_up_frees_the_engine(engine, passes):
    async def give_up() -> None:
        loop = asyncio.get_running_loop()
        future = asyncio.wrap_future(engine.submit(*CROWD[2], name="p").future)
        passes.before = lambda number, jobs: loop.call_soon_threadsafe(future.cancel)
        with pytest.raises(asyncio.CancelledError):
            await future
        while engine.load().entries:
            await asyncio.sleep(0.01)

    asyncio.run(give_up())
    assert len(passes.seen) < 27


def test_a_large_encode_lets_others_have_their_steps_in_between(engine, monkeypatch):
    """The order of phases on the device: a small picture is done before a banded one is encoded."""
    monkeypatch.setattr(serve.device, "_SHORTEST_TURN_S", 0)
    order = []
    encoding = threading.Event()
    real = serve.device.Device._pass_on

    def pass_on(self: Any, guest: Any) -> None:
        if not encoding.is_set():
            encoding.set()
            submitted.wait()
        order.append(guest.number)
        real(self, guest)

    submitted = threading.Event()
    monkeypatch.setattr(serve.device.Device, "_pass_on", pass_on)
    large = engine.submit(picture(64, 1100), request(vae_tile_px=512, num_inference_steps=20), name="large")
    encoding.wait()
    small = engine.submit(picture(64, 64), request(), name="small")
    submitted.set()
    small.future.result()
    assert large.progress().phase == "encode"
    large.cancel()
    assert len(set(order)) == 2


def test_a_picture_whose_numbers_break_fails_alone(engine, pipeline):
    broken = request(noise=torch.full((1, 4, 8, 8), float("nan")))
    tickets = [engine.submit(picture(64, 64), broken, name="broken"), engine.submit(*CROWD[0], name="whole")]
    with pytest.raises(FloatingPointError, match="not finite"):
        tickets[0].future.result()
    assert bits(tickets[1].future.result()) == alone(pipeline, *CROWD[0])


def test_a_setting_that_the_pipeline_refuses_fails_its_picture_alone(engine, pipeline):
    wrong = engine.submit(picture(64, 64), request(noise=torch.zeros(1, 4, 2, 2)), name="wrong")
    right = engine.submit(*CROWD[0], name="right")
    with pytest.raises(InputError, match="noise has shape"):
        wrong.future.result()
    assert bits(right.future.result()) == alone(pipeline, *CROWD[0])
    with pytest.raises(InputError, match="picture: got"):
        engine.submit(np.zeros((4, 4), np.uint8), request(), name="no picture")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("out of it")])
@pytest.mark.parametrize(("times", "ends_well"), [(1, True), (2, False)])
def test_memory_that_runs_out_in_a_step_costs_a_retry_and_then_that_picture(
    times, ends_well, error, engine, pipeline, passes
):
    victim_shape = (8, 12)

    def run_out(number: int, jobs: list[Any]) -> None:
        nonlocal times
        if times and jobs[0].canvas.plan.canvas == victim_shape:
            times -= 1
            raise error

    passes.before = run_out
    tickets = [engine.submit(picture(64, 96), request(), name="victim"), engine.submit(*CROWD[0], name="other")]
    if ends_well:
        assert bits(tickets[0].future.result()) == alone(pipeline, picture(64, 96), request())
    else:
        with pytest.raises(NotEnoughMemory, match="memory ran out twice"):
            tickets[0].future.result()
    assert bits(tickets[1].future.result()) == alone(pipeline, *CROWD[0])


@pytest.mark.parametrize("half", ["encode", "decode"])
@pytest.mark.parametrize(("times", "ends_well"), [(1, True), (2, False)])
def test_memory_that_runs_out_outside_of_steps_costs_a_retry_too(half, times, ends_well, engine, pipeline, monkeypatch):
    real = getattr(pipeline, half)
    expected = alone(pipeline, *CROWD[0])

    def run_out(*args: Any, **settings: Any) -> Any:
        nonlocal times
        if times:
            times -= 1
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
        return real(*args, **settings)

    monkeypatch.setattr(pipeline, half, run_out, raising=True)
    future = engine.submit(*CROWD[0], name="p").future
    if ends_well:
        assert bits(future.result()) == expected
    else:
        with pytest.raises(NotEnoughMemory):
            future.result()


def test_an_accelerator_that_fails_is_told_and_takes_nothing_more(engine, passes):
    def fail(number: int, jobs: list[Any]) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")

    passes.before = fail
    with pytest.raises(torch.AcceleratorError):
        engine.submit(*CROWD[0], name="p").future.result()
    assert engine.load().failure == "the accelerator fails: CUDA error: an illegal memory access was encountered"
    assert engine.load().free_megapixels == 0
    with pytest.raises(Busy, match="accelerator"):
        engine.submit(*CROWD[0], name="q")


def test_previews_are_made_when_asked_for(engine, passes):
    pictures = []
    tickets: list[Ticket] = []
    submitted = threading.Event()

    def look(number: int, jobs: list[Any]) -> None:
        submitted.wait()
        pictures.append(tickets[0].preview())

    passes.before = look
    tickets.append(engine.submit(picture(64, 64), request(), name="p"))
    submitted.set()
    tickets[0].future.result()
    assert pictures[0] is None
    assert [preview.size for preview in pictures[1:]] == [(64, 64)] * 2


def test_a_picture_that_is_done_before_its_first_preview_is_due_gets_none(pipeline, monkeypatch):
    made: list[Any] = []
    monkeypatch.setattr(pipeline, "preview", made.append)
    patient = Engine(pipeline, EngineConfig(memory_bytes=2 * 10**9, preview_every_s=600))
    try:
        ticket = patient.submit(picture(64, 64), request(), name="p")
        while not ticket.future.done():
            assert ticket.preview() is None
            time.sleep(0.001)
    finally:
        patient.close()
    assert made == []


def test_load_says_what_is_in_hand_and_what_was_done(engine, passes):
    loads = []
    passes.before = lambda number, jobs: loads.append(engine.load())
    engine.submit(*CROWD[2], name="p").future.result()
    first, last = loads[0], engine.load()
    assert (first.entries, first.entries_by_phase) == (1, {"denoise": 1})
    assert first.megapixels == pytest.approx(0.009)
    assert first.megapixel_steps_left == pytest.approx(0.027)
    assert first.megapixel_steps_per_s is None
    assert 0 < first.free_megapixels <= first.max_megapixels
    assert (last.entries, last.megapixels, last.megapixel_steps_left) == (0, 0, 0)
    assert last.megapixel_steps_per_s == pytest.approx(0.027 / sum(last.seconds_by_phase.values()), rel=0.01)
    assert set(last.seconds_by_phase) == {"encode", "denoise", "decode"}
    assert last.batch_fill == 1


def test_a_picture_too_large_is_refused_before_any_work_and_told_what_fits(pipeline, passes):
    engine = Engine(pipeline, EngineConfig(memory_bytes=60_000_000))
    with pytest.raises(TooLarge, match=r"2000x4000 px at scale 2 .* at most (\d+)x(\d+) px fit") as refusal:
        engine.submit(picture(4000, 2000), request(scale=2, tile_px=256), name="p")
    width, height = (int(word) for word in str(refusal.value).split("at most ")[1].split(" px")[0].split("x"))
    assert height == pytest.approx(2 * width, abs=2)
    request_that_fits = request(scale=2, tile_px=256, tile_stride_px=None, num_inference_steps=1)
    engine.submit(picture(height, width), request_that_fits, name="fits").cancel()
    assert not passes.seen
    engine.close()


def test_no_more_are_taken_than_fit_together(pipeline, passes):
    go_on = threading.Event()
    passes.before = lambda number, jobs: go_on.wait()
    engine = Engine(pipeline, EngineConfig(memory_bytes=10**9, max_entries=2))
    tickets = [engine.submit(*CROWD[0], name=str(i)) for i in range(2)]
    assert engine.load().free_megapixels == 0
    with pytest.raises(Busy, match="2 pictures are in hand"):
        engine.submit(*CROWD[0], name="third")
    go_on.set()
    wait([ticket.future for ticket in tickets])
    assert engine.load().free_megapixels > 0
    engine.submit(*CROWD[0], name="third").future.result()
    engine.close()


def test_closing_cancels_what_is_in_hand(pipeline, passes):
    engine = Engine(pipeline, EngineConfig(memory_bytes=10**9))
    tickets = [engine.submit(*CROWD[2], name=str(i)) for i in range(3)]
    engine.close()
    assert all(ticket.future.done() for ticket in tickets)
    with pytest.raises(Busy, match="closed"):
        engine.submit(*CROWD[0], name="late")

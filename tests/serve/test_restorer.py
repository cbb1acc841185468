from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import faithdiff
from faithdiff import FaithDiffPipeline
from faithdiff.errors import InputError
from serve.engine import EngineConfig, TooLarge
from serve.form import UpscaleRequest
from serve.restorer import Busy, Restorer
from serve.served_model import ModelConfig
from sr_platform.errors import RequestError
from sr_platform.model_registry import MANIFEST_DIGEST_TAG
from sr_platform.tracking import Tracking, tracking_uri

PRESET_PATH = Path(faithdiff.__file__).parent / "presets" / "nano"

QUICK = UpscaleRequest(scale=2, num_inference_steps=2, seed=5)
ENDLESS = UpscaleRequest(scale=2, num_inference_steps=200)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def restorer() -> Iterator[Restorer]:
    made = Restorer("nano", ModelConfig(engine=EngineConfig(max_entries=2, memory_bytes=2 * 10**9)))
    yield made
    made.close()


async def test_a_picture_is_restored_as_by_the_pipeline_itself(restorer: Restorer, picture: np.ndarray) -> None:
    picture.flags.writeable = False
    restored = await restorer.restore(picture, QUICK)
    direct = FaithDiffPipeline.from_pretrained("nano")(picture.copy(), scale=2, num_inference_steps=2, seed=5)
    assert np.array_equal(restored.image, direct.array)
    assert restored.image.shape == (48, 64, 3)
    assert restored.model.version == restored.report["model_version"] == "nano"
    assert restored.report["seconds"]["encode"] > 0


async def test_tiles_and_bands_are_those_of_its_settings(picture: np.ndarray) -> None:
    sizes = {"tile_px": 64, "vae_tile_px": 64}
    made = Restorer("nano", ModelConfig(**sizes, engine=EngineConfig(memory_bytes=2 * 10**9)))
    try:
        large = np.tile(picture, (3, 3, 1))
        restored = await made.restore(large, QUICK)
    finally:
        made.close()
    nano = FaithDiffPipeline.from_pretrained("nano")
    direct = nano(large, scale=2, num_inference_steps=2, seed=5, **sizes)
    assert np.array_equal(restored.image, direct.array)
    assert restored.report["tiles"] == direct.report["tiles"] > 1


async def test_sixteen_bits_come_back_as_sixteen_bits(restorer: Restorer, picture: np.ndarray) -> None:
    restored = await restorer.restore(picture.astype(np.uint16) * 257, QUICK)
    assert restored.image.dtype == np.uint16


async def test_the_event_loop_stays_free_while_a_picture_is_restored(restorer: Restorer, picture: np.ndarray) -> None:
    work = asyncio.create_task(restorer.restore(picture, ENDLESS))
    await asyncio.sleep(0.2)
    started_s = time.perf_counter()
    await asyncio.sleep(0)
    restorer.check()
    assert time.perf_counter() - started_s < 0.5
    assert not work.done()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work


async def test_a_request_that_is_given_up_makes_room_within_a_step(restorer: Restorer, picture: np.ndarray) -> None:
    works = [asyncio.create_task(restorer.restore(picture, ENDLESS)) for _ in range(2)]
    await asyncio.sleep(0.3)
    with pytest.raises(Busy):
        await restorer.restore(picture, QUICK)
    for work in works:
        work.cancel()
    await asyncio.gather(*works, return_exceptions=True)
    served = restorer.model()
    assert served is not None
    ends_s = time.monotonic() + 20
    while served.engine.load().entries:
        assert time.monotonic() < ends_s
        await asyncio.sleep(0.01)
    assert (await restorer.restore(picture, QUICK)).image.shape == (48, 64, 3)


async def test_what_the_pipeline_refuses_is_passed_on(restorer: Restorer) -> None:
    with pytest.raises(InputError, match="picture"):
        await restorer.restore(np.zeros((4, 4), np.uint8), QUICK)


async def test_a_picture_that_would_not_fit_alone_is_refused_before_work_starts(restorer: Restorer) -> None:
    huge = np.broadcast_to(np.uint8(0), (8000, 8000, 3))
    started_s = time.perf_counter()
    with pytest.raises(TooLarge, match="at most"):
        await restorer.restore(huge, UpscaleRequest(scale=4))
    assert time.perf_counter() - started_s < 5


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`register(digest)` makes a new version of nano the champion."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(tmp_path))
    tracking = Tracking.open(default_path=tmp_path, experiment="test")
    run_id = tracking.start("train", params={}, tags={})

    def register(digest: str) -> None:
        tags = {MANIFEST_DIGEST_TAG: digest}
        tracking.register_model(
            str(PRESET_PATH), name="faithdiff-nano", alias="champion", run_id=run_id, digest=digest, tags=tags
        )

    return register


async def test_a_new_version_behind_the_alias_is_taken_up_when_what_is_in_hand_is_done(
    registry: Any, tmp_path: Path, picture: np.ndarray
) -> None:
    registry("sha256:abc")
    restorer = Restorer("models:/faithdiff-nano@champion", ModelConfig(cache_path=tmp_path / "cache"))
    assert await restorer.park_new_version() is None
    registry("sha256:def")
    before = asyncio.create_task(restorer.restore(picture, QUICK))
    await asyncio.sleep(0)
    parked = await restorer.park_new_version()
    assert parked is not None
    drained = asyncio.Event()

    async def drain() -> None:
        with pytest.raises(Busy, match="another version"):
            await restorer.restore(picture, QUICK)
        drained.set()

    await restorer.change_to(parked, drain)
    assert drained.is_set()
    first, second = await before, await restorer.restore(picture, QUICK)
    assert (first.model.version, first.model.manifest_digest) == ("faithdiff-nano/1", "sha256:abc")
    assert second.model.version == second.report["model_version"] == "faithdiff-nano/2"
    assert second.model.manifest_digest == "sha256:def"
    assert np.array_equal(first.image, second.image)
    restorer.close()


async def test_a_version_that_cannot_be_served_leaves_the_old_one_serving(
    registry: Any, tmp_path: Path, picture: np.ndarray
) -> None:
    registry("sha256:abc")
    restorer = Restorer("models:/faithdiff-nano@champion", ModelConfig(cache_path=tmp_path / "cache"))
    registry("sha256:def")
    parked = await restorer.park_new_version()
    assert parked is not None
    del parked.pipeline.unet.down_blocks[0]  # it loads, and cannot take its first step

    async def nothing_to_drain() -> None: ...

    with pytest.raises(Exception, match=r"."):
        await restorer.change_to(parked, nothing_to_drain)
    assert (await restorer.restore(picture, QUICK)).model.version == "faithdiff-nano/1"
    restorer.close()


def test_cold_start_is_measured_in_its_parts(restorer: Restorer) -> None:
    info = restorer.info
    assert info.load_s > 0
    assert info.compile_s > 0
    assert info.download_s >= 0


@pytest.mark.parametrize("model", ["nanoo", "/no/such/folder", "models:/x"])
def test_a_model_that_does_not_exist_is_named(model: str) -> None:
    with pytest.raises((InputError, RequestError), match=model):
        Restorer(model, ModelConfig())

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

import faithdiff
from faithdiff import FaithDiffPipeline
from faithdiff.errors import InputError
from serve.form import UpscaleRequest
from serve.restorer import Busy, Restorer, RestorerConfig
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
def restorer() -> Restorer:
    return Restorer("nano", RestorerConfig(max_waiting=1))


async def test_a_picture_is_restored_as_by_the_pipeline_itself(restorer: Restorer, picture: np.ndarray) -> None:
    picture.flags.writeable = False
    restored = await restorer.restore(picture, QUICK)
    direct = FaithDiffPipeline.from_pretrained("nano")(picture.copy(), scale=2, num_inference_steps=2, seed=5)
    assert np.array_equal(restored.image, np.asarray(direct.image))
    assert restored.image.shape == (48, 64, 3)
    assert restored.model.version == restored.report["model_version"] == "nano"
    assert restored.report["seconds"]["denoise"] > 0


async def test_the_event_loop_stays_free_while_a_picture_is_restored(restorer: Restorer, picture: np.ndarray) -> None:
    work = asyncio.create_task(restorer.restore(picture, ENDLESS))
    await asyncio.sleep(0.2)
    started_s = time.perf_counter()
    info = await restorer.describe()
    assert time.perf_counter() - started_s < 0.1
    assert (info.model, info.device, info.manifest_digest) == ("nano", "cpu", None)
    assert not work.done()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work


async def test_a_request_that_is_given_up_makes_room_within_a_step(restorer: Restorer, picture: np.ndarray) -> None:
    work = asyncio.create_task(restorer.restore(picture, ENDLESS))
    await asyncio.sleep(0.3)
    work.cancel()
    started_s = time.perf_counter()
    await restorer.restore(picture, QUICK)
    assert time.perf_counter() - started_s < 3
    assert work.cancelled()


async def test_more_requests_than_may_wait_are_refused_and_the_others_finish(
    restorer: Restorer, picture: np.ndarray
) -> None:
    results = await asyncio.gather(*(restorer.restore(picture, QUICK) for _ in range(4)), return_exceptions=True)
    done = [r for r in results if not isinstance(r, BaseException)]
    refused = [r for r in results if isinstance(r, Busy)]
    assert (len(done), len(refused)) == (2, 2)
    assert np.array_equal(done[0].image, done[1].image)
    assert (await restorer.restore(picture, QUICK)).image.shape == (48, 64, 3)


async def test_what_the_pipeline_refuses_is_passed_on(restorer: Restorer) -> None:
    with pytest.raises(InputError, match="picture"):
        await restorer.restore(np.zeros((4, 4), np.uint8), QUICK)


async def test_a_registered_model_brings_its_version_and_the_digest_of_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: np.ndarray
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(tmp_path))
    tracking = Tracking.open(default_path=tmp_path, experiment="test")
    run_id = tracking.start("train", params={}, tags={})
    tags = {MANIFEST_DIGEST_TAG: "sha256:abc"}
    tracking.register_model(
        str(PRESET_PATH), name="faithdiff-nano", alias="champion", run_id=run_id, digest="", tags=tags
    )
    restorer = Restorer("models:/faithdiff-nano@champion", RestorerConfig(cache_path=tmp_path / "cache"))
    restored = await restorer.restore(picture, QUICK)
    assert restored.model.version == restored.report["model_version"] == "faithdiff-nano/1"
    assert restored.model.manifest_digest == "sha256:abc"


@pytest.mark.parametrize("model", ["nanoo", "/no/such/folder", "models:/x"])
def test_a_model_that_does_not_exist_is_named(model: str) -> None:
    with pytest.raises((InputError, RequestError), match=model):
        Restorer(model, RestorerConfig())

"""Training on encoded samples: the same numbers as without, no VAE and no text encoders, and never a wrong model's."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from faithdiff import FaithDiffPipeline
from faithdiff.encodings import Encoding
from pipelines import train as job
from pipelines.stages.encode import Encode, EncodeConfig
from pipelines.stages.sample import Sample
from pipelines.training.batch_split import BatchSplit
from pipelines.training.batches import CropConfig, MicroBatches
from pipelines.training.inputs import FrozenModels, StoredInputs, find_stored_inputs
from pipelines.training.recipe import TrainConfig
from pipelines.training.request import check_request
from sr_platform.config import load_config
from sr_platform.errors import InputDataError
from sr_platform.publication import commit_dataset, publish_shard
from sr_platform.sample_reader import SampleReader
from sr_platform.shards import Source, read_manifest
from sr_platform.storage import open_storage
from sr_platform.tracking import Tracking

SIDE_PX = 32
TINY = ["--size-px", "32", "--global-batch", "4", "--align.num-updates", "4", "--unified.num-updates", "2"]
TINY += ["--align.warmup-updates", "0", "--unified.warmup-updates", "0", "--log-every-updates", "1"]
TINY += ["--validation.num-pictures", "0"]
SOURCE = Source(name="own", uri="x", licence="CC0", terms="Be kind.", num_pictures=8, sha256="")


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def publish(folder: Path, encode: Encode | None) -> str:
    """URI of a dataset of eight samples of 32 x 32 px, encoded or not."""
    rng, samples = np.random.default_rng(0), []
    for i in range(8):
        hq = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((SIDE_PX, SIDE_PX))
        caption = f"picture {i}"
        members = {"hq.png": png(hq), "lq.png": png(hq.resize((8, 8)))}
        members["json"] = json.dumps({"caption": caption}).encode()
        if encode:
            crop = Sample(0, 1, "a.png", height_px=SIDE_PX, width_px=SIDE_PX, hq=hq.tobytes(), caption=caption)
            members["latents.safetensors"] = encode.encode(crop).latents
        samples.append((f"s{i}", members))
    storage = open_storage(str(folder))
    report = publish_shard(storage, name="tiny", index=0, samples=samples)
    commit_dataset(storage, [report], recipe={}, sources=[SOURCE], counts={})
    return str(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish(tmp_path_factory.mktemp("plain"), None)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish(tmp_path_factory.mktemp("encoded"), Encode(EncodeConfig(model="nano")))


@pytest.fixture(scope="module")
def encoded_latents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish(tmp_path_factory.mktemp("latents"), Encode(EncodeConfig(model="nano", text=False)))


def config(*flags: str) -> TrainConfig:
    return load_config(TrainConfig, ["train_nano.yaml", *TINY, *flags], job="train")


def batch_and_models(uri: str, stored: StoredInputs, *, size_px: int = SIDE_PX) -> tuple[Any, FrozenModels]:
    split, crop = BatchSplit(16, 1, 16), CropConfig(size_px=size_px, caption_dropout=0.4)
    batches = MicroBatches(SampleReader(uri), split, rank=0, seed=3, crop=crop, reads=stored.reads)
    pipeline = FaithDiffPipeline.from_pretrained("nano")
    device, dtype = torch.device("cpu"), torch.float32
    models = FrozenModels(pipeline, device=device, dtype=dtype, seed=3, noise_offset=0.02, stored=stored)
    return batches[0], models


def assert_same_inputs(stored_uri: str, plain_uri: str, stored: StoredInputs, *, size_px: int = SIDE_PX) -> None:
    batch, models = batch_and_models(stored_uri, stored, size_px=size_px)
    other, all_models = batch_and_models(plain_uri, StoredInputs(), size_px=size_px)
    assert any(other.flips)
    assert any(other.dropped)
    assert not all(other.flips)
    assert not all(other.dropped)
    actual, expected = models.encode(batch), all_models.encode(other)
    torch.testing.assert_close(actual.latents, expected.latents, rtol=1e-5, atol=1e-5)
    for name, tensor in expected.conditions.items():
        torch.testing.assert_close(actual.conditions[name], tensor, rtol=1e-5, atol=1e-5)
    assert torch.equal(actual.draws.noise, expected.draws.noise)


def test_an_encoded_dataset_gives_the_same_inputs_without_pictures_vae_or_text_encoders(encoded, plain) -> None:
    stored = find_stored_inputs(SampleReader(encoded), "nano", size_px=SIDE_PX)
    assert stored.reads == ("latents.safetensors",)
    batch, models = batch_and_models(encoded, stored)
    assert (batch.hq, models.vae, models.text_encoders) == (None, None, [])
    assert_same_inputs(encoded, plain, stored)


def test_latents_of_another_size_are_left_and_the_text_is_used(encoded, plain) -> None:
    stored = find_stored_inputs(SampleReader(encoded), "nano", size_px=16)
    assert stored.vae_digest == ""
    assert stored.reads == ("hq.png", "latents.safetensors")
    assert_same_inputs(encoded, plain, stored, size_px=16)


def test_a_dataset_of_latents_alone_leaves_the_text_to_the_text_encoders(encoded_latents, plain) -> None:
    stored = find_stored_inputs(SampleReader(encoded_latents), "nano", size_px=SIDE_PX)
    assert (bool(stored.vae_digest), stored.text_digest) == (True, "")
    assert_same_inputs(encoded_latents, plain, stored)
    assert find_stored_inputs(SampleReader(encoded_latents), "nano", size_px=16) == StoredInputs()


def test_a_plain_dataset_has_nothing_stored(plain) -> None:
    assert find_stored_inputs(SampleReader(plain), "nano", size_px=SIDE_PX) == StoredInputs()
    assert StoredInputs().reads == ("hq.png",)


@pytest.mark.parametrize(("part", "named"), [("vae", "VAE"), ("text_encoder_2", "text encoders")])
def test_another_models_encodings_are_refused_before_anything_starts(encoded, tmp_path, part: str, named: str) -> None:
    pipeline = FaithDiffPipeline.from_pretrained("nano")
    with torch.no_grad():
        next(getattr(pipeline, part).parameters()).add_(1e-3)
    pipeline.save_pretrained(tmp_path / "model")
    flags = ["--data", encoded, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    with pytest.raises(InputDataError, match=f"encoded by other {named} than those of .*encode.model") as refusal:
        job.main(["train_nano.yaml", *TINY, *flags])
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_sample_that_another_model_encoded_or_that_is_damaged_stops_the_training(encoded) -> None:
    stored = find_stored_inputs(SampleReader(encoded), "nano", size_px=SIDE_PX)
    batch, models = batch_and_models(encoded, stored)
    encoding = Encoding.from_bytes(batch.encoded[1])
    other = dataclasses.replace(encoding, digests=dataclasses.replace(encoding.digests, vae="other"))
    with pytest.raises(InputDataError, match="sample number 1 was encoded by other models"):
        models.encode(dataclasses.replace(batch, encoded=[batch.encoded[0], other.to_bytes(), *batch.encoded[2:]]))
    with pytest.raises(InputDataError, match="prepare the dataset again"):
        models.encode(dataclasses.replace(batch, encoded=[b"damaged", *batch.encoded[1:]]))


@pytest.fixture
def losses_of(
    lone_process_group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[float]]:
    """`losses_of(uri)` trains stage one for four updates in this process."""
    from mlflow import MlflowClient
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.training.stages import stage_job
    from pipelines.training.updates import train_loop_per_worker

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs = Tracking.open(default_path=tmp_path, experiment="encoded")

    def run(uri: str) -> list[float]:
        out = tmp_path / hashlib.sha256(uri.encode()).hexdigest()
        request = check_request(config("--data", uri, "--num-workers", "1", "--stage", "align", "--out", str(out)))
        run_id = runs.start("align", params={}, tags={})
        started = stage_job(request, "align", request.model, request.model_digest, tracking_uri=runs.uri, run_id=run_id)
        values, alone = started.model_dump(mode="json"), ScalingConfig(num_workers=0)
        TorchTrainer(train_loop_per_worker, train_loop_config=values, scaling_config=alone).fit()
        history = MlflowClient(runs.uri).get_metric_history(run_id, "train/loss")
        return [m.value for m in sorted(history, key=lambda m: m.step)]

    return run


@pytest.mark.ray
def test_the_loss_curve_is_that_of_training_without_encodings(losses_of, plain, encoded, monkeypatch) -> None:
    expected = losses_of(plain)
    monkeypatch.setattr("diffusers.AutoencoderKL.encode", None)  # a call would raise
    assert losses_of(encoded) == pytest.approx(expected, rel=1e-5)
    assert len(expected) == 4


def test_a_trained_model_gets_the_card_of_its_data_and_stages(losses_of, plain, tmp_path: Path) -> None:
    losses_of(plain)
    (path,) = tmp_path.glob("*/models/align/README.md")
    card = path.read_text()
    assert "# faithdiff-nano (align)" in card
    assert "| own | CC0 | Be kind. |" in card
    assert "align (4 updates), crops of 32 px" in card
    assert read_manifest(plain).digest in card

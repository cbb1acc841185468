"""Validation shows what the weights can do by now, on any number of ranks, and leaves training as it was."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from faithdiff.loss import FaithDiffForTraining, noise_for, trained_parameters
from faithdiff.pipeline import FaithDiffPipeline
from faithdiff.schedule import alphas_cumprod
from faithdiff.variants import with_architecture
from pipelines.training.batch_split import BatchSplit
from pipelines.training.batches import decode
from pipelines.training.deepspeed_config import initialize
from pipelines.training.recipe import StageConfig, TrainConfig, ValidationConfig
from pipelines.training.validation import Validation, comparison, copy_of, psnr_db
from sr_platform.errors import InputDataError
from sr_platform.sample_reader import SampleReader
from sr_platform.storage import open_storage

CFG = ValidationConfig(every_updates=5, num_pictures=3, num_inference_steps=2)


@cache
def nano() -> FaithDiffPipeline:
    return FaithDiffPipeline.from_pretrained("nano")


def training_module(dtype: torch.dtype = torch.float32) -> FaithDiffForTraining:
    """Nano as stage 2 trains it, with an alignment module that does something already."""
    pipeline = nano()
    module = FaithDiffForTraining(
        copy.deepcopy(pipeline.unet), copy.deepcopy(pipeline.lq_encoder), alphas_cumprod(pipeline.scheduler.config)
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in module.unet.alignment.proj.parameters():
        parameter.data.normal_(0, 0.05, generator=generator)
    trained_parameters(module, ("alignment", "lq_encoder", "unet"))
    module.unet.enable_gradient_checkpointing()
    return module.to(dtype)


def flags(module: torch.nn.Module) -> Any:
    modes = [
        (name, part.training, getattr(part, "gradient_checkpointing", None)) for name, part in module.named_modules()
    ]
    return modes, [(name, p.requires_grad, p.is_inference(), p.data_ptr()) for name, p in module.named_parameters()]


def test_the_first_pictures_are_restored_compared_and_measured(prepared_dataset: str, tmp_path: Path) -> None:
    reader, module, quality_db = SampleReader(prepared_dataset), training_module(), list[float]()
    result = Validation(CFG, str(tmp_path), reader, nano()).run(10, module)
    assert result.pictures == {key: f"{tmp_path}/{key}/update_00000010.png" for key in reader.keys[:3]}
    sizes = {Image.open(path).size for path in result.pictures.values()}
    assert sizes == {(3 * 3 * 72 + 2 * 4, 3 * 64 + 18)}  # 72 x 64 px, three times as large
    for index, path in enumerate(result.pictures.values()):
        hq = decode(reader[index]["hq.png"])
        assert hq is not None
        strip = np.asarray(Image.open(path))[18:]
        lq, restored, shown = (strip[1::3, left + 1 : left + 216 : 3] for left in (0, 220, 440))
        assert np.array_equal(shown, hq)
        assert np.array_equal(lq[::4, ::4], decode(reader[index]["lq.png"]))
        quality_db.append(psnr_db(restored, hq))
    assert result.metrics["validation/psnr"] == pytest.approx(np.mean(quality_db))
    assert result.metrics.keys() == {"validation/psnr"}
    assert 4 < result.metrics["validation/psnr"] < 40


def test_a_picture_is_what_the_pipeline_restores_with_the_same_weights(prepared_dataset: str, tmp_path: Path) -> None:
    reader, module = SampleReader(prepared_dataset), training_module()
    validation = Validation(CFG, str(tmp_path), reader, nano())
    picture, sample = validation.share[1], reader[1]
    components = {**nano().components, "unet": copy.deepcopy(module.unet).eval(), "lq_encoder": module.lq_encoder}
    expected = FaithDiffPipeline(**components)(
        Image.open(io.BytesIO(sample["lq.png"])),
        scale=4,
        prompt="picture 1 of shard 0",
        num_inference_steps=2,
        seed=picture.seed,
    )
    unet, lq_encoder = (copy_of(part, is_needed=True) for part in (module.unet, module.lq_encoder))
    restored = validation._restored(picture, unet, lq_encoder)
    assert restored is not None
    # How memory is aligned may decide a last bit, which an untrained network enlarges: up to 2 levels were seen.
    difference = np.abs(restored.astype(int) - np.asarray(expected.image))
    assert difference.max() <= 4
    assert difference.mean() < 0.1
    assert len({other.seed for other in validation.share}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_left_as_it_was(prepared_dataset: str, tmp_path: Path, dtype: torch.dtype) -> None:
    module = training_module(dtype)
    before, weights = flags(module), copy.deepcopy(module.state_dict())
    vae_before = flags(nano().vae)
    validation = Validation(CFG, str(tmp_path), SampleReader(prepared_dataset), nano())
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = validation.run(10, module)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state
    assert flags(module) == before
    assert flags(nano().vae) == vae_before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    assert validation.run(20, module).metrics == first.metrics


def test_other_weights_give_another_picture(prepared_dataset: str, tmp_path: Path) -> None:
    module = training_module()
    validation = Validation(CFG, str(tmp_path), SampleReader(prepared_dataset), nano())
    before = validation.run(10, module)
    module.unet.conv_out.weight.data *= 0.5
    assert validation.run(20, module).metrics != before.metrics


@pytest.mark.parametrize("architecture", [{"features": "last"}, {"control": True}], ids=str)
def test_an_ablation_is_copied_as_it_is(architecture: dict[str, Any]) -> None:
    pipeline = with_architecture(nano(), **architecture)
    for live in (pipeline.unet, pipeline.lq_encoder):
        copied = copy_of(live, is_needed=True)
        assert copied.config == live.config
        assert copied.state_dict().keys() == live.state_dict().keys()
        assert all(torch.equal(tensor, live.state_dict()[name]) for name, tensor in copied.state_dict().items())


def test_a_picture_that_is_not_finite_is_left_out(prepared_dataset: str, tmp_path: Path) -> None:
    module = training_module()
    module.unet.conv_out.bias.data.fill_(math.nan)
    result = Validation(CFG, str(tmp_path), SampleReader(prepared_dataset), nano()).run(10, module)
    assert result.metrics == {"validation/failed_pictures": 3.0}
    assert result.pictures == {}


def test_a_damaged_picture_is_named(prepared_dataset: str, tmp_path: Path) -> None:
    class Damaged(SampleReader):
        def read_members(self, wanted: Any) -> list[dict[str, bytes]]:
            return [{**members, "lq.png": members["lq.png"][:50]} for members in super().read_members(wanted)]

    with pytest.raises(InputDataError, match="a picture of sample s0-0 is damaged"):
        Validation(CFG, str(tmp_path), Damaged(prepared_dataset), nano())


def test_comparisons_go_to_storage(prepared_dataset: str, s3_uri: str) -> None:
    validation = Validation(CFG, f"{s3_uri}/validation/align", SampleReader(prepared_dataset), nano())
    result = validation.run(10, training_module())
    names = [f"validation/align/{key}/update_00000010.png" for key in result.pictures]
    assert open_storage(s3_uri).list() == names
    assert list(result.pictures.values()) == [f"{s3_uri}/{name}" for name in names]


def test_psnr_is_that_of_the_formula() -> None:
    black, gray = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert psnr_db(gray, black) == pytest.approx(20 * math.log10(5))
    assert psnr_db(black, black) == 100.0
    assert comparison({"a": gray, "b": black}).size == (2 * 160 + 4, 160 + 18)


def trained(data: str, folder: str, is_validated: bool) -> tuple[dict[str, float], dict[str, str], float, float]:
    """An update with ZeRO 3, perhaps after validation: the results of that, the loss, and the sum of all weights."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    stage = {"num_updates": 10, "learning_rate": 1e-3}
    values = {"data": data, "align": stage, "unified": stage, "global_batch": 2, "zero_stage": 3}
    validation = Validation(CFG, folder, SampleReader(data), nano(), rank=rank, world_size=world_size)
    module = training_module()
    module.unet.disable_gradient_checkpointing()
    split = BatchSplit.derive(2, world_size, 1)
    engine = initialize(module, TrainConfig.model_validate(values), StageConfig.model_validate(stage), split)
    metrics, pictures = dict[str, float](), dict[str, str]()
    if is_validated:
        result = validation.run(10, engine.module)
        metrics, pictures = result.metrics, result.pictures
    generator = torch.Generator().manual_seed(rank)
    conditions = {
        "lq": torch.rand(1, 3, 32, 32, generator=generator),
        "prompt_embeds": torch.rand(1, 77, 96, generator=generator),
        "pooled_prompt_embeds": torch.rand(1, 64, generator=generator),
        "time_ids": torch.full((1, 6), 32.0),
    }
    loss = engine(torch.rand(1, 4, 4, 4, generator=generator), noise_for(0, [rank], (4, 4, 4)), conditions).mean()
    engine.backward(loss)
    engine.step()
    weights = copy_of(engine.module.unet, is_needed=True)
    return metrics, pictures, loss.item(), sum(p.double().abs().sum().item() for p in weights.parameters())


def test_ranks_that_share_parameters_share_pictures_and_train_on_bit_equal(
    two_ranks: Callable[..., list[Any]], prepared_dataset: str, tmp_path: Path
) -> None:
    with_it = two_ranks(trained, prepared_dataset, str(tmp_path), True)
    without = two_ranks(trained, prepared_dataset, str(tmp_path), False)
    assert [result[2:] for result in with_it] == [result[2:] for result in without]
    assert with_it[0][:2] == with_it[1][:2]
    assert len(with_it[0][1]) == 3
    assert all(Path(path).is_file() for path in with_it[0][1].values())

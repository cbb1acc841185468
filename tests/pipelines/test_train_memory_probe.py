from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from faithdiff.loss import FaithDiffForTraining, trained_parameters
from faithdiff.nano import NANO_PATH
from faithdiff.pipeline import FaithDiffPipeline
from faithdiff.schedule import alphas_cumprod
from pipelines.training.memory_probe import fitting_micro_batch, largest_fitting, optimizer_bytes
from pipelines.training.recipe import TrainConfig
from pipelines.training.start_model import trainable_module
from sr_platform.errors import ConfigError

MIB = 2**20


@pytest.fixture(scope="module")
def module() -> FaithDiffForTraining:
    pipeline = FaithDiffPipeline.from_pretrained(NANO_PATH)
    module = FaithDiffForTraining(pipeline.unet, pipeline.lq_encoder, alphas_cumprod(pipeline.scheduler.config))
    trained_parameters(module, ("alignment", "lq_encoder", "unet"))
    return module


def recipe(**values: Any) -> TrainConfig:
    stage = {"num_updates": 1, "learning_rate": 1e-4}
    base = {"data": "x", "size_px": 64, "global_batch": 256, "num_workers": 1, "align": stage, "unified": stage}
    return TrainConfig.model_validate({**base, **values})


def fitting(module: FaithDiffForTraining, limit_mib: int, **values: Any) -> int:
    options = {"multiple_of": values.pop("multiple_of", 1), "world_size": values.pop("world_size", 1)}
    return fitting_micro_batch(
        module, recipe(**values), device=torch.device("cpu"), limit_bytes=limit_mib * MIB, **options
    )


def test_more_memory_takes_larger_micro_batches_up_to_the_limit(module: FaithDiffForTraining) -> None:
    before = {name: (p.data_ptr(), p.dtype) for name, p in module.named_parameters()}
    found = [fitting(module, limit_mib, max_micro_batch=32) for limit_mib in (125, 160, 220, 100_000)]
    assert found == sorted(found)
    assert 1 <= found[0] < found[1] < found[2] <= found[3] == 32
    assert fitting(module, 160, max_micro_batch=32) == found[1]
    assert {name: (p.data_ptr(), p.dtype) for name, p in module.named_parameters()} == before
    assert all(parameter.grad is None for parameter in module.parameters())


def test_free_memory_is_what_the_weights_leave(module: FaithDiffForTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[torch.dtype] = []

    def free_bytes(device: torch.device) -> int:
        placed.append(next(module.parameters()).dtype)
        return 2**40

    monkeypatch.setattr("pipelines.training.memory_probe._free_bytes", free_bytes)
    config = recipe(precision="bf16", max_micro_batch=1)
    fitting_micro_batch(module, config, device=torch.device("cpu"), world_size=1)
    assert placed == [torch.bfloat16]


def test_a_micro_batch_is_no_more_than_a_ranks_share_and_keeps_groups_whole(module: FaithDiffForTraining) -> None:
    assert fitting(module, 100_000, global_batch=24, world_size=4, max_micro_batch=32) == 6
    whole = fitting(module, 200, max_micro_batch=32)
    assert fitting(module, 200, max_micro_batch=32, multiple_of=4) == whole // 4 * 4


def test_gradient_checkpointing_and_offloading_make_room(module: FaithDiffForTraining) -> None:
    plain = fitting(module, 160)
    assert fitting(module, 160, offload_optimizer=True) > plain
    module.unet.enable_gradient_checkpointing()
    module.lq_encoder.enable_gradient_checkpointing()
    try:
        assert fitting(module, 160) > plain
    finally:
        module.unet.disable_gradient_checkpointing()
        module.lq_encoder.disable_gradient_checkpointing()


def test_too_little_memory_for_one_sample_says_what_to_change(module: FaithDiffForTraining) -> None:
    message = r"probe_memory: even one sample does not fit: 1 need .* GiB of .* GiB .*; set gradient_checkpointing"
    with pytest.raises(ConfigError, match=message):
        fitting(module, 4)
    with pytest.raises(ConfigError, match=re.escape("even 16 samples do not fit")):
        fitting(module, 120, multiple_of=16)


def test_ranks_share_the_optimiser_as_zero_does(module: FaithDiffForTraining) -> None:
    def bytes_of(**values: Any) -> int:
        return optimizer_bytes(module, recipe(**values), world_size=4)

    assert bytes_of(zero_stage=1, precision="bf16") > bytes_of(zero_stage=2, precision="bf16")
    assert bytes_of(zero_stage=2) > bytes_of(zero_stage=2, offload_optimizer=True)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_ranks_share_the_moving_average_always(module: FaithDiffForTraining, zero_stage: int) -> None:
    def extra_bytes(**values: Any) -> int:
        sizes = [
            optimizer_bytes(module, recipe(zero_stage=zero_stage, average_decay=decay, **values), world_size=4)
            for decay in (0.0, 0.99)
        ]
        return sizes[1] - sizes[0]

    assert extra_bytes() == sum(parameter.numel() for parameter in module.parameters())
    assert extra_bytes(offload_optimizer=True) == 0


def test_pictures_that_see_each_other_are_probed_together() -> None:
    pipeline = FaithDiffPipeline.from_pretrained(NANO_PATH)
    config = recipe(alignment_attention="batch", attention_group=4, global_batch=16)
    together = trainable_module(pipeline, config, "align")
    found = fitting_micro_batch(
        together, config, device=torch.device("cpu"), world_size=1, multiple_of=4, limit_bytes=100_000 * MIB
    )
    assert found == 16


def test_validation_needs_room_for_copies_of_the_weights(module: FaithDiffForTraining) -> None:
    values = {"max_micro_batch": 8, "offload_optimizer": True}
    copies_mib = sum(parameter.numel() for parameter in module.parameters()) * 4 // MIB
    least = next(limit for limit in range(20, 400, 5) if fits(module, limit, **values))
    with_pictures = {**values, "validation": {"num_pictures": 1}}
    assert not fits(module, least + copies_mib // 2, **with_pictures)
    # Pictures are restored when no activations are there: beyond that room they cost no samples.
    enough = least + 2 * copies_mib
    assert fitting(module, enough, **with_pictures) == fitting(module, enough, **values)


def fits(module: FaithDiffForTraining, limit_mib: int, **values: Any) -> bool:
    try:
        return fitting(module, limit_mib, **values) > 0
    except ConfigError:
        return False


@pytest.mark.parametrize("limit", range(35))
def test_the_largest_fitting_count_is_found(limit: int) -> None:
    tried: list[int] = []

    def fits(count: int) -> bool:
        tried.append(count)
        return count <= limit

    assert largest_fitting(fits, 32) == min(limit, 32)
    assert max(tried) <= 32
    assert len(tried) <= 11

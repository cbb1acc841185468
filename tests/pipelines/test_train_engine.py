"""The training engine on real gloo ranks: every way to share the work gives the update of a plain PyTorch loop."""

from __future__ import annotations

import copy
import re
from functools import cache
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from faithdiff.loss import FaithDiffForTraining, noise_for
from faithdiff.nano import NANO_PATH
from faithdiff.pipeline import FaithDiffPipeline
from faithdiff.schedule import alphas_cumprod
from pipelines.training.batch_split import BatchSplit
from pipelines.training.deepspeed_config import (
    check_override,
    deepspeed_config,
    initialize,
    learning_rate_factor,
    set_learning_rate,
    zero_stage,
)
from pipelines.training.recipe import StageConfig, TrainConfig
from pipelines.training.stages import stage_params
from sr_platform.errors import ConfigError
from sr_platform.tracking import flatten

NUM_UPDATES, GLOBAL_BATCH = 3, 8
STAGES = {
    "align": StageConfig(num_updates=10, learning_rate=1e-3, warmup_updates=1),
    "unified": StageConfig(num_updates=10, learning_rate=1e-3, lq_encoder_learning_rate=1e-4),
}
TRAINED = {"align": ("unet.alignment.",), "unified": ("unet.", "lq_encoder.")}


@cache
def nano() -> Any:
    return FaithDiffPipeline.from_pretrained(NANO_PATH)


def training_module(stage: str, *, checkpointing: bool = False) -> FaithDiffForTraining:
    """Nano as a stage trains it, with an alignment module that does something already."""
    pipeline = nano()
    module = FaithDiffForTraining(
        copy.deepcopy(pipeline.unet), copy.deepcopy(pipeline.lq_encoder), alphas_cumprod(pipeline.scheduler.config)
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if name.startswith("unet.alignment.") and not parameter.detach().any():
            parameter.data.normal_(0, 0.02, generator=generator)
        parameter.requires_grad_(name.startswith(TRAINED[stage]))
    if checkpointing:
        module.unet.enable_gradient_checkpointing()
        module.lq_encoder.enable_gradient_checkpointing()
    return module


def inputs(samples: list[int], size_px: int = 32) -> tuple[Any, ...]:
    """Arguments of `FaithDiffForTraining.forward`: sample by sample a function of its number."""
    latent = size_px // 8

    def draw(*shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(sample)) for sample in samples])

    conditions = {
        "lq": draw(3, size_px, size_px).clamp(-1, 1),
        "prompt_embeds": draw(77, 96),
        "pooled_prompt_embeds": draw(64),
        "time_ids": torch.tensor([[size_px, size_px, 0, 0, size_px, size_px]] * len(samples), dtype=torch.float32),
    }
    return draw(4, latent, latent), noise_for(0, samples, (4, latent, latent)), conditions


def factor(stage: StageConfig, update: int) -> float:
    return learning_rate_factor(update, warmup_updates=stage.warmup_updates, num_updates=stage.num_updates)


def recipe(**values: Any) -> TrainConfig:
    stages = {name: config.model_dump() for name, config in STAGES.items()}
    return TrainConfig.model_validate({"data": "x", "global_batch": GLOBAL_BATCH, "size_px": 32, **stages, **values})


def run_engine(stage: str, values: dict[str, Any], num_updates: int = NUM_UPDATES) -> dict[str, Any]:
    """On each rank: trains, and returns losses by update, final weights and first moments after one update."""
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed allows it on GPUs only
    cfg, world_size = recipe(**values), torch.distributed.get_world_size()
    split = BatchSplit.derive(GLOBAL_BATCH, world_size, cfg.max_micro_batch)
    module = training_module(stage, checkpointing=cfg.gradient_checkpointing)
    engine = initialize(module, cfg, STAGES[stage], split, compile_backend="aot_eager")
    losses, moments = [], {}
    for update in range(num_updates):
        set_learning_rate(engine, factor(STAGES[stage], update))
        total = torch.zeros(())
        for micro_step in range(split.accumulation):
            samples = [slot.sample for slot in split.slots(update, micro_step, torch.distributed.get_rank())]
            loss = engine(*inputs(samples)).mean()
            engine.backward(loss)
            engine.step()
            total += loss.detach() / split.accumulation
        torch.distributed.all_reduce(total)
        losses.append(total.item() / world_size)
        if update == 0:
            moments = state_of(engine, "exp_avg")
    weights = state_of(engine, "weight")
    norm = float(engine.get_global_grad_norm())
    engine.destroy()
    return {"losses": losses, "moments": moments, "weights": weights, "norm": norm}


def state_of(engine: Any, kind: str) -> dict[str, Any]:
    """fp32 weights or moments of all trained parameters, whole, as NumPy arrays."""
    found = {}
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed links moments to parameters after the first group's first step, when other groups have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            if engine.optimizer is engine.basic_optimizer:
                value = parameter if kind == "weight" else engine.optimizer.state[parameter][kind]
            elif kind == "weight":
                value = safe_get_full_fp32_param(parameter)
            else:
                value = safe_get_full_optimizer_state(parameter, kind)
            found[name] = value.detach().float().numpy().copy().reshape(-1)
    return found


def run_plain(stage: str, num_updates: int = NUM_UPDATES) -> dict[str, Any]:
    """The same training as a loop without DeepSpeed: one process, the whole batch at once."""
    cfg, module, config = recipe(), training_module(stage).train(), STAGES[stage]
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    rates = [config.lq_encoder_learning_rate if name.startswith("lq") else config.learning_rate for name in parameters]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters.values(), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=cfg.optimizer.weight_decay)
    losses, moments = [], {}
    for update in range(num_updates):
        loss = module(*inputs(list(range(update * GLOBAL_BATCH, (update + 1) * GLOBAL_BATCH)))).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters.values(), cfg.optimizer.max_grad_norm)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor(config, update)
        optimizer.step()
        losses.append(loss.item())
        if update == 0:
            moments = {n: optimizer.state[p]["exp_avg"].numpy().copy().reshape(-1) for n, p in parameters.items()}
    weights = {name: parameter.detach().numpy().reshape(-1) for name, parameter in parameters.items()}
    return {"losses": losses, "moments": moments, "weights": weights, "norm": norm.item()}


plain = cache(run_plain)


def distance(actual: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest difference over all parameters, relative to the largest value of any."""
    assert actual.keys() == expected.keys()
    largest = max(abs(value).max() for value in expected.values())
    return float(max(abs(actual[name] - expected[name]).max() for name in expected) / largest)


def agree(results: list[dict[str, Any]], expected: dict[str, Any], *, weights: float) -> None:
    """Losses to 2e-6, the gradient of the first update to 1e-5 of its largest value, final weights to `weights`."""
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], abs=2e-6)
        assert result["norm"] == pytest.approx(expected["norm"], rel=1e-4)
        # The first moment after one update is (1 - beta1) x gradient.
        assert distance(result["moments"], expected["moments"]) < 1e-5
        assert distance(result["weights"], expected["weights"]) < weights


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_with_accumulation_make_the_update_of_a_plain_loop(two_ranks: Any, zero_stage: int) -> None:
    results = two_ranks(run_engine, "unified", {"zero_stage": zero_stage, "max_micro_batch": 2})
    # Or the first update, whose gradients are compared, would say nothing about clipping.
    assert plain("unified", 1)["norm"] > 1.2 * recipe().optimizer.max_grad_norm
    # AdamW divides gradients near zero by themselves: rounding alone can turn their sign.
    agree(results, plain("unified"), weights=1e-3)


SETTINGS: dict[str, dict[str, Any]] = {
    "zero 3": {
        "zero_stage": 3,
        "max_micro_batch": 2,
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    },
    "zero 2 as on a GPU": {
        "zero_stage": 2,
        "max_micro_batch": 2,
        "deepspeed": {"zero_optimization": {"contiguous_gradients": True, "overlap_comm": True}},
    },
    "offloading": {"offload_optimizer": True},
    "offloading, zero 3": {"offload_optimizer": True, "zero_stage": 3},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "compiled": {"compile": True},
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[pytest.mark.soak] if name in ("zero 3", "offloading, zero 3") else [])
        for name, settings in SETTINGS.items()
    ],
)
def test_how_memory_and_time_are_saved_does_not_change_the_update(two_ranks: Any, settings: dict[str, Any]) -> None:
    agree(two_ranks(run_engine, "align", settings, 2), plain("align", 2), weights=1e-5)


@pytest.mark.parametrize("zero_stage", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_bf16_sums_in_fp32_so_ranks_and_micro_batches_hardly_matter(two_ranks: Any, zero_stage: int) -> None:
    values = {"precision": "bf16", "zero_stage": zero_stage}
    coarse = two_ranks(run_engine, "align", {**values, "max_micro_batch": 4}, 2)[0]
    fine = two_ranks(run_engine, "align", {**values, "max_micro_batch": 1}, 2)[0]
    exact = plain("align", 2)
    assert coarse["losses"] == pytest.approx(exact["losses"], abs=2e-3)
    assert distance(coarse["moments"], fine["moments"]) < distance(coarse["moments"], exact["moments"]) < 5e-2


def test_in_bf16_zero_3_makes_the_update_of_a_plain_loop(two_ranks: Any) -> None:
    results = two_ranks(run_engine, "align", {"precision": "bf16", "zero_stage": 3, "max_micro_batch": 4}, 1)
    exact = plain("align", 2)
    for result in results:
        # Its linear layers round once more than those of other stages, before the bias is added.
        assert result["losses"] == pytest.approx(exact["losses"][:1], abs=2e-3)
        assert distance(result["moments"], exact["moments"]) < 5e-2


def first_update(values: dict[str, Any]) -> bool:
    """On each rank: whether an update at learning rate 0 left the exact weights and still gathered moments."""
    result = run_engine("align", values, 1)
    start = {name: p.detach().reshape(-1).numpy() for name, p in training_module("align").named_parameters()}
    is_still = all((value == start[name]).all() for name, value in result["weights"].items())
    return is_still and any(value.any() for value in result["moments"].values())


CASES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2), ("bf16", 3), ("fp16", 2)]


@pytest.mark.parametrize(("precision", "zero_stage"), CASES)
def test_training_starts_from_exact_weights_at_the_learning_rate_that_was_set(
    two_ranks: Any, precision: str, zero_stage: int
) -> None:
    assert factor(STAGES["align"], 0) == 0
    assert two_ranks(first_update, {"precision": precision, "zero_stage": zero_stage}) == [True, True]


def test_raw_settings_replace_generated_ones_mapping_by_mapping() -> None:
    split = BatchSplit.derive(8, 2, 2)
    raw = {"zero_optimization": {"overlap_comm": True}, "steps_per_print": 5, "prescale_gradients": True}
    check_override(recipe(deepspeed=raw))
    generated, config = deepspeed_config(recipe(), split), deepspeed_config(recipe(deepspeed=raw), split)
    assert config["zero_optimization"] == {**generated["zero_optimization"], "overlap_comm": True}
    assert (config["steps_per_print"], config["prescale_gradients"]) == (5, True)
    assert generated["steps_per_print"] != 5
    assert generated["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"train_batch_size": 4}, "deepspeed.train_batch_size: the recipe decides it; set global_batch instead"),
        ({"train_micro_batch_size_per_gpu": 4}, "set max_micro_batch instead"),
        ({"gradient_accumulation_steps": 1}, "set max_micro_batch instead"),
        ({"gradient_clipping": 0.5}, "set optimizer.max_grad_norm instead"),
        ({"optimizer": {"type": "Lamb"}}, "set optimizer instead"),
        ({"scheduler": {"type": "OneCycle"}}, "set learning_rate and warmup_updates of the stage instead"),
        ({"zero_optimization": {"stage": 3}}, "deepspeed.zero_optimization.stage: the recipe decides it; set zero_st"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "set offload_optimizer instead"),
        ({"bf16": {"enabled": True}}, "deepspeed.bf16.enabled: the recipe decides it; set precision instead"),
        ({"fp16": {"enabled": False}}, "deepspeed.fp16.enabled: the recipe decides it; set precision instead"),
        ({"fp16": True}, "deepspeed.fp16: got True; give a mapping of its settings"),
        ({"zero_optimization": None}, "deepspeed.zero_optimization: got None; give a mapping of its settings"),
        ({"optimizer": {}, "bf16": {"enabled": True}}, "optimizer instead; deepspeed.bf16.enabled"),
    ],
)
def test_what_the_recipe_decides_is_no_raw_setting(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_override(recipe(deepspeed=raw))


def test_raw_settings_stand_among_the_parameters_of_the_stages_run() -> None:
    raw = {"zero_optimization": {"overlap_comm": True}, "prescale_gradients": True}
    params = flatten(stage_params(recipe(deepspeed=raw), "align"))
    assert params["deepspeed.zero_optimization.overlap_comm"] is True
    assert params["deepspeed.prescale_gradients"] is True


def test_slots_without_a_sample_are_given_to_deepspeed_too() -> None:
    config = deepspeed_config(recipe(), BatchSplit.derive(8, 3, 4))
    assert "train_batch_size" not in config
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] == 3


def test_zero_0_is_for_fp32_without_offloading() -> None:
    cases = {"fp32": 0, "bf16": 1, "fp16": 1}
    assert {p: zero_stage(recipe(zero_stage=0, precision=p)) for p in cases} == cases
    assert zero_stage(recipe(zero_stage=0, offload_optimizer=True)) == 1
    # The optimiser clips there, and DeepSpeed clips at 1 unless told not to.
    assert deepspeed_config(recipe(zero_stage=0), BatchSplit.derive(8, 2, 2))["gradient_clipping"] == 0
    assert zero_stage(recipe(zero_stage=3, offload_optimizer=True, precision="bf16")) == 3


def test_the_loss_scale_is_the_recipes() -> None:
    scale = {"initial_power": 12, "growth_interval": 500, "floor": 4.0}
    config = deepspeed_config(recipe(precision="fp16", loss_scale=scale), BatchSplit.derive(8, 2, 2))
    assert config["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 12,
        "loss_scale_window": 500,
        "hysteresis": 1,
    }

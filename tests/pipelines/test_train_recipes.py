"""All training recipes: they load, say the paper's or the released script's numbers, and ablate what they claim to."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml

from faithdiff.bundle import PRESETS_PATH, list_presets
from faithdiff.loss import NoiseDraws, noise_for
from pipelines.training.batch_split import BatchSplit
from pipelines.training.recipe import TrainConfig
from pipelines.training.start_model import load_model, trainable_module
from sr_platform.config import RECIPES_PATH, load_config
from sr_platform.tracking import flatten

TRAINING = sorted(
    path.relative_to(RECIPES_PATH).as_posix()
    for pattern in ("train_*.yaml", "sdxl_stage*.yaml", "ablations/*.yaml")
    for path in RECIPES_PATH.glob(pattern)
)
SIZES = {"nano": "train_nano.yaml", "8xh100": "train_sdxl_8xh100.yaml"}
# What a row of the paper's Tables 5 and 6 changes in the full method, with the numbers of its own stage left out.
ROWS: dict[str, dict[str, Any]] = {
    "no_alignment": {"architecture.alignment": "sum"},
    "no_pretraining": {"stage": "unified"},
    "last_features": {"architecture.features": "last"},
    "encoder_tuned": {
        "architecture.control": True,
        "align.trains": ("alignment", "control"),
        "unified.trains": ("alignment", "lq_encoder", "control"),
    },
    "encoder_fixed": {"unified.trains": ("alignment", "unet")},
    "separate": {"unified.trains": ("alignment", "unet")},
}


def recipe(name: str, *flags: str) -> TrainConfig:
    return load_config(TrainConfig, [name, "--data", "x", *flags], job="train")


def changes(base: TrainConfig, other: TrainConfig) -> dict[str, Any]:
    """Every setting of `other` that differs from `base`, by its dotted name."""
    before, after = flatten(base.model_dump()), flatten(other.model_dump())
    return {name: value for name, value in after.items() if name not in before or before[name] != value}


@pytest.mark.parametrize("name", TRAINING)
def test_a_recipe_is_complete_but_for_data_and_starts_from_something_that_can_exist(name: str) -> None:
    cfg = recipe(name)
    assert cfg.model in list_presets() or cfg.model.startswith("models:/faithdiff-sdxl-")
    assert (cfg.max_updates, cfg.resume_from, cfg.deepspeed) == (None, None, {})
    assert cfg.attention_group % min(cfg.max_micro_batch, cfg.attention_group) == 0
    assert cfg.validation is not None


@pytest.mark.parametrize("name", TRAINING)
def test_a_recipe_says_at_its_head_what_it_is_and_what_of_it_was_run(name: str) -> None:
    text = (RECIPES_PATH / name).read_text(encoding="utf-8")
    head = text[: min(text.index(f"\n{key}:") for key in yaml.safe_load(text) if f"\n{key}:" in text)]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "\n# Run: " in head
    if recipe(name).use_gpu:
        assert "on a GPU" in head.split("# Run: ")[1]


def test_recipes_of_training_are_where_the_documentation_looks_for_them() -> None:
    gpus = ("8xh100", "2xa800", "released")
    stages = {f"sdxl_stage{number}_{hardware}.yaml" for number in (1, 2) for hardware in gpus}
    whole = {"train_nano.yaml", "train_sdxl_8xh100.yaml", "train_sdxl_2xa800.yaml", "train_sdxl_1xh100.yaml"}
    ablations = {f"ablations/{row}_{size}.yaml" for row in ("full", *ROWS) for size in SIZES}
    assert set(TRAINING) == stages | whole | ablations


@pytest.mark.parametrize(
    "name", ["train_sdxl_8xh100.yaml", "train_sdxl_2xa800.yaml", "sdxl_stage1_8xh100.yaml", "sdxl_stage2_2xa800.yaml"]
)
def test_the_papers_numbers(name: str) -> None:
    cfg = recipe(name)
    assert (cfg.align.num_updates, cfg.align.learning_rate) == (6000, 5e-5)
    assert (cfg.unified.num_updates, cfg.unified.learning_rate) == (40000, 1e-5)
    assert cfg.unified.lq_encoder_learning_rate == 5e-6
    assert (cfg.global_batch, cfg.size_px, cfg.caption_dropout) == (256, 512, 0.2)
    assert (cfg.optimizer.beta1, cfg.optimizer.beta2, cfg.optimizer.weight_decay) == (0.9, 0.999, 1e-2)
    assert cfg.alignment_attention == "tokens"
    assert (cfg.architecture.alignment, cfg.architecture.features) == ("transformer", "penultimate")
    assert not cfg.architecture.control


def test_other_hardware_gives_the_same_result() -> None:
    eight = recipe("train_sdxl_8xh100.yaml")
    for name in ("train_sdxl_2xa800.yaml", "sdxl_stage1_2xa800.yaml", "sdxl_stage2_8xh100.yaml"):
        assert recipe(name).digest == eight.digest
    assert set(changes(eight, recipe("train_sdxl_2xa800.yaml"))) == {"num_workers", "probe_memory"}


@pytest.mark.parametrize(
    ("name", "accumulation"),
    [
        ("train_sdxl_8xh100.yaml", 2),
        ("train_sdxl_2xa800.yaml", 8),
        ("train_sdxl_1xh100.yaml", 16),
        ("sdxl_stage2_released.yaml", 4),
    ],
)
def test_sixteen_samples_at_once_fit_the_batch_of_256(name: str, accumulation: int) -> None:
    cfg = recipe(name)
    split = BatchSplit.derive(cfg.global_batch, cfg.num_workers, cfg.max_micro_batch)
    assert (split.micro_batch, split.accumulation) == (16, accumulation)


def test_one_gpu_keeps_no_average_and_measures_what_fits() -> None:
    cfg = recipe("train_sdxl_1xh100.yaml")
    assert (cfg.num_workers, cfg.average_decay, cfg.probe_memory, cfg.precision) == (1, 0.0, True, "bf16")
    assert not cfg.offload_optimizer


@pytest.mark.parametrize("hardware", ["8xh100", "2xa800", "released"])
def test_stage_two_starts_from_what_stage_one_registers(hardware: str) -> None:
    first, second = (recipe(f"sdxl_stage{number}_{hardware}.yaml") for number in (1, 2))
    assert (first.stages, second.stages) == (("align",), ("unified",))
    assert second.model == f"models:/{first.registered_model}@{first.alias}"
    assert second.registered_model != first.registered_model
    same = {"stage", "model", "registered_model"}
    assert set(changes(first, second)) == same
    assert first.digest == second.digest


def test_the_released_numbers_where_they_are_the_papers() -> None:
    paper, released = recipe("train_sdxl_8xh100.yaml"), recipe("sdxl_stage1_released.yaml")
    assert released.align == paper.align
    assert released.optimizer == paper.optimizer
    for name in ("global_batch", "size_px", "caption_dropout", "noise_offset", "model", "architecture"):
        assert getattr(released, name) == getattr(paper, name), name


def test_the_released_numbers_item_by_item() -> None:
    cfg = recipe("sdxl_stage2_released.yaml")
    assert (cfg.alignment_attention, cfg.attention_group) == ("batch", 16)  # item 1
    assert cfg.model.startswith("models:/faithdiff-sdxl-released-stage1")  # item 4
    assert recipe("sdxl_stage1_released.yaml").model == "sdxl_untrained"
    assert (cfg.unified.learning_rate, cfg.unified.lq_encoder_learning_rate) == (5e-5, 5e-6)  # item 5
    assert (cfg.num_workers, cfg.max_micro_batch, cfg.global_batch) == (4, 16, 256)  # items 6, 8
    assert (cfg.optimizer.weight_decay, cfg.optimizer.max_grad_norm, cfg.noise_offset) == (1e-2, 1.0, 0.02)  # item 7
    assert (cfg.align.warmup_updates, cfg.unified.warmup_updates) == (300, 300)
    assert (cfg.trained_parts("align"), cfg.trained_parts("unified")) == (  # item 9
        ("alignment",),
        ("alignment", "lq_encoder", "unet"),
    )
    assert cfg.validation is not None  # items 10, 11
    assert (cfg.validation.num_inference_steps, cfg.validation.guidance_scale) == (20, 5.0)
    assert (cfg.validation.start_from, cfg.validation.every_updates, cfg.validation.num_pictures) == ("noise", 500, 10)
    assert cfg.size_px == 512  # item 13
    assert cfg.mixture == "proportional"  # item 14
    # Beside the list: average, precision, seed, checkpoints.
    assert (cfg.average_decay, cfg.average_every_updates, cfg.export) == (0.9999, 100, "raw")
    assert (cfg.precision, cfg.loss_scale.initial_power, cfg.loss_scale.growth_interval) == ("fp16", 16, 1000)
    assert (cfg.seed, cfg.checkpoint_every_updates, cfg.zero_stage, cfg.data_workers) == (42, 2000, 2, 4)
    assert cfg.gradient_checkpointing


def test_the_released_recipe_names_all_eighteen_differences() -> None:
    lines = (RECIPES_PATH / "sdxl_stage1_released.yaml").read_text().splitlines()
    numbers = [int(line[1:4]) for line in lines if line[:1] == "#" and line[1:4].strip().isdigit() and line[4:5] == " "]
    assert numbers == list(range(1, 19))


@pytest.mark.parametrize("size", SIZES)
def test_the_full_row_is_the_base_recipe_under_another_name(size: str) -> None:
    base, full = recipe(SIZES[size]), recipe(f"ablations/full_{size}.yaml")
    assert set(changes(base, full)) == {"registered_model", "alias", "experiment"}
    assert full.digest == base.digest


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_papers_ablations_changes_just_what_it_is_called_after(row: str, size: str) -> None:
    full, ablation = recipe(f"ablations/full_{size}.yaml"), recipe(f"ablations/{row}_{size}.yaml")
    changed = changes(full, ablation)
    assert changed.pop("alias") == row
    if row == "no_alignment":  # What is not there attends to nothing.
        assert changed.pop("alignment_attention", "model") == "model"
    added = {name for name in changed if name.startswith("encoder")}
    assert bool(added) == (row == "separate")
    assert {name: value for name, value in changed.items() if name not in added} == ROWS[row]


@pytest.mark.parametrize("size", SIZES)
def test_separately_tuned_parts_get_the_updates_that_they_get_together(size: str) -> None:
    cfg = recipe(f"ablations/separate_{size}.yaml")
    assert cfg.stages == ("align", "encoder", "unified")
    assert cfg.encoder is not None
    assert cfg.encoder.model_dump(exclude={"trains"}) == cfg.unified.model_dump(exclude={"trains"})
    assert cfg.trained_parts("encoder") == ("alignment", "lq_encoder")
    assert cfg.trained_parts("unified") == ("alignment", "unet")


@pytest.mark.parametrize("row", ["full", *ROWS])
def test_every_tensor_that_a_stage_of_a_row_trains_gets_a_gradient_and_no_other_does(row: str) -> None:
    cfg = recipe(f"ablations/{row}_nano.yaml")
    for stage in cfg.stages:
        module = trainable_module(load_model("nano", cfg.architecture), cfg, stage)
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=1e-2)
        for _ in range(4):  # What starts at zero, three layers in a row here, passes no gradient on before it moves.
            optimizer.zero_grad()
            module(*tiny_batch()).mean().backward()
            optimizer.step()
        still = [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()]
        assert still == [], f"{stage} trains nothing of these"
        assert {part_of(name) for name in trained} == set(cfg.trained_parts(stage))
        assert all(parameter.grad is None for name, parameter in module.named_parameters() if name not in trained)


def part_of(parameter: str) -> str:
    """alignment, control, lq_encoder or unet."""
    room, part, *_ = parameter.split(".")
    return part if room == "unet" and part in ("alignment", "control") else room


def tiny_batch() -> tuple[torch.Tensor, NoiseDraws, dict[str, torch.Tensor]]:
    """The arguments of the trained module for one picture of 64 x 64 px, for the nano preset."""
    generator = torch.Generator().manual_seed(0)
    unet = read_unet_config()
    conditions = {
        "lq": torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1,
        "prompt_embeds": torch.randn(1, 77, unet["cross_attention_dim"], generator=generator),
        "pooled_prompt_embeds": torch.randn(1, read_text_width(unet), generator=generator),
        "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]),
    }
    draws = noise_for(0, [0], (4, 8, 8), noise_offset=0.02, num_train_timesteps=1000)
    return torch.randn(1, 4, 8, 8, generator=generator), draws, conditions


def read_unet_config() -> dict[str, Any]:
    return dict(json.loads((PRESETS_PATH / "nano" / "unet" / "config.json").read_text()))


def read_text_width(unet: dict[str, Any]) -> int:
    """Width of the pooled text embedding: what six embedded sizes leave of the UNet's projection."""
    width: int = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    return width


@pytest.mark.parametrize("size", SIZES)
def test_no_ablation_moves_the_alias_of_a_model_that_is_served(size: str) -> None:
    rows = [recipe(f"ablations/{row}_{size}.yaml") for row in ("full", *ROWS)]
    assert len({cfg.alias for cfg in rows}) == len(rows)
    assert {cfg.registered_model for cfg in rows} == {recipe(SIZES[size]).registered_model + "-ablations"}

from __future__ import annotations

import pytest

from faithdiff.bundle import list_presets
from pipelines.training.batch_split import BatchSplit
from pipelines.training.deepspeed_config import deepspeed_config, learning_rate_factor
from pipelines.training.recipe import StageConfig, TrainConfig
from sr_platform.config import load_config
from sr_platform.errors import ConfigError


def recipe(name: str, *flags: str) -> TrainConfig:
    return load_config(TrainConfig, [name, "--data", "x", *flags], job="train")


def test_the_learning_rate_is_the_released_cosine_counted_in_updates(golden) -> None:
    table = golden("case08_tables").about["lr_schedule_by_optimizer_step"]["stage1_ideal"]
    actual = {
        update: 5e-5 * learning_rate_factor(int(update), warmup_updates=300, num_updates=6000) for update in table
    }
    assert actual == pytest.approx(table, rel=1e-9, abs=1e-18)


def test_the_sdxl_recipe_is_the_papers() -> None:
    cfg = recipe("train_sdxl_8xh100.yaml")
    assert (cfg.align.num_updates, cfg.align.learning_rate, cfg.align.warmup_updates) == (6000, 5e-5, 300)
    assert (cfg.unified.num_updates, cfg.unified.learning_rate) == (40000, 1e-5)
    assert (cfg.unified.lq_encoder_learning_rate, cfg.unified.warmup_updates) == (5e-6, 300)
    assert (cfg.global_batch, cfg.size_px, cfg.caption_dropout, cfg.noise_offset) == (256, 512, 0.2, 0.02)
    optimizer = cfg.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay) == (0.9, 0.999, 1e-8, 0.01)
    assert (optimizer.max_grad_norm, cfg.precision, cfg.zero_stage, cfg.gradient_checkpointing) == (
        1.0,
        "bf16",
        2,
        True,
    )
    assert BatchSplit.derive(cfg.global_batch, cfg.num_workers, cfg.max_micro_batch).accumulation == 2


@pytest.mark.parametrize("name", ["train_nano.yaml", "train_sdxl_8xh100.yaml"])
def test_every_recipe_starts_from_a_preset_that_exists(name: str) -> None:
    assert recipe(name).model in list_presets()


def test_the_deepspeed_configuration_follows_from_the_recipe() -> None:
    cfg = recipe("train_sdxl_8xh100.yaml")
    config = deepspeed_config(cfg, BatchSplit.derive(256, 8, 16))
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 8 == 256
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["stage"] == 2
    assert config["gradient_clipping"] == 1.0
    override = cfg.model_copy(update={"deepspeed": {"zero_optimization": {"overlap_comm": False}}})
    changed = deepspeed_config(override, BatchSplit.derive(256, 8, 16))
    assert changed["zero_optimization"] == config["zero_optimization"] | {"overlap_comm": False}


def test_stages_end_early_on_the_same_learning_rate_curve() -> None:
    cfg = recipe("train_nano.yaml", "--max-updates", "5")
    assert cfg.stages == ("align", "unified")
    assert (cfg.last_update("align"), cfg.align.num_updates) == (5, 30)
    assert recipe("train_nano.yaml", "--stage", "unified").stages == ("unified",)
    assert recipe("train_nano.yaml", "--max-updates", "500").last_update("unified") == 30


def test_the_digest_changes_with_the_result_and_not_with_where_it_goes() -> None:
    base = recipe("train_nano.yaml")
    assert recipe("train_nano.yaml", "--out", "elsewhere", "--log-every-updates", "7").digest == base.digest
    elsewhere = ["--num-workers", "3", "--zero-stage", "0", "--max-micro-batch", "1", "--data", "y", "--model", "z"]
    assert recipe("train_nano.yaml", *elsewhere).digest == base.digest
    for flags in (["--seed", "1"], ["--align.learning-rate", "2e-3"], ["--optimizer.beta2", "0.99"]):
        assert recipe("train_nano.yaml", *flags).digest != base.digest


def test_warm_up_cannot_outlast_the_stage() -> None:
    with pytest.raises(ValueError, match="warmup_updates must be below num_updates=3"):
        StageConfig(num_updates=3, learning_rate=1e-3, warmup_updates=3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alignment-attention", "batch", "--attention-group", "3"], "not divisible by attention_group=3"),
        (["--alignment-attention", "tokens", "--architecture.alignment", "sum"], "architecture.alignment=sum has none"),
        (["--stage", "encoder"], "stage=encoder needs the recipe's encoder stage"),
        (["--unified.trains", "control"], "unified.trains names control; set architecture.control too"),
        (["--min-workers", "3"], "min_workers=3 is above num_workers=2"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe("train_nano.yaml", *flags)


def test_a_recipe_with_an_encoder_stage_runs_it_between_the_others() -> None:
    encoder = StageConfig(num_updates=3, learning_rate=1e-4)
    cfg = recipe("train_nano.yaml").model_copy(update={"encoder": encoder})
    assert cfg.stages == ("align", "encoder", "unified")
    assert [cfg.trained_parts(stage) for stage in cfg.stages] == [
        ("alignment",),
        ("alignment", "lq_encoder"),
        ("alignment", "lq_encoder", "unet"),
    ]

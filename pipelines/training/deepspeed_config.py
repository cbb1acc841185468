"""Recipe -> DeepSpeed: its configuration, the optimiser with its parameter groups, the learning-rate curve."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from faithdiff.loss import FaithDiffForTraining
from pipelines.training.batch_split import BatchSplit
from pipelines.training.guard import clip_and_skip_on_device
from pipelines.training.recipe import StageConfig, TrainConfig
from sr_platform.config import merged
from sr_platform.errors import ConfigError

logger = logging.getLogger(__name__)

BUCKET_NUMEL = 200_000_000
"""Gradients that are reduced at once: 0.8 GB in fp32, twice with `overlap_comm`."""
_PERSISTENT_NUMEL = 1_000_000
"""ZeRO 3 keeps parameters below this whole: all that SDXL has with 640 channels, a twentieth of its weights."""
_DECIDED = {
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "max_micro_batch",
    "gradient_accumulation_steps": "max_micro_batch",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "learning_rate and warmup_updates of the stage",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer": "offload_optimizer",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
}
"""DeepSpeed's settings that are no raw ones -> the recipe's."""


def check_override(cfg: TrainConfig) -> None:
    """Raises ConfigError where the recipe's `deepspeed` entries set what another of its settings decides."""
    wrong = []
    for path, setting in _DECIDED.items():
        section, _, key = path.rpartition(".")
        given = cfg.deepspeed.get(section, {}) if section else cfg.deepspeed
        if not isinstance(given, dict):
            wrong.append(f"deepspeed.{section}: got {given!r}; give a mapping of its settings")
        elif key in given:
            wrong.append(f"deepspeed.{path}: the recipe decides it; set {setting} instead")
    if wrong:
        raise ConfigError("; ".join(dict.fromkeys(wrong)))


def deepspeed_config(cfg: TrainConfig, split: BatchSplit) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`; the recipe's `deepspeed` entries replace generated ones."""
    config: dict[str, Any] = {
        # Not train_batch_size: slots without a sample may make it larger than the global batch.
        "train_micro_batch_size_per_gpu": split.micro_batch,
        "gradient_accumulation_steps": split.accumulation,
        # Under ZeRO 0 the optimiser clips, see `clip_and_skip_on_device`; left out, DeepSpeed would clip at 1.
        "gradient_clipping": cfg.optimizer.max_grad_norm if zero_stage(cfg) else 0.0,
        "zero_optimization": _zero_config(cfg),
        "zero_allow_untested_optimizer": True,
        # Its own optimiser for offloading wants a compiler; torch's fused AdamW runs on CPUs too.
        "zero_force_ds_cpu_optimizer": False,
        # This timer waits for the GPU twice per micro-batch.
        "timers": {"throughput": {"enabled": False}},
        "wall_clock_breakdown": False,
        "steps_per_print": 2**31,
    }
    return merged(config | _precision_config(cfg), cfg.deepspeed)


def zero_stage(cfg: TrainConfig) -> int:
    """The stage that runs: DeepSpeed's stage 0 knows neither fp32 sums of half-precision gradients nor offloading.

    Stage 1 gives what stage 0 would, in less memory.
    """
    return max(cfg.zero_stage, int(cfg.precision != "fp32" or cfg.offload_optimizer))


def _zero_config(cfg: TrainConfig) -> dict[str, Any]:
    stage = zero_stage(cfg)
    config: dict[str, Any] = {"stage": stage}
    if stage:
        config |= {
            # Neither saves anything on a CPU, where the buffer of the first is the dearest part of an update.
            "contiguous_gradients": cfg.use_gpu,
            "overlap_comm": cfg.use_gpu,
            "reduce_bucket_size": BUCKET_NUMEL,
            "allgather_bucket_size": BUCKET_NUMEL,
        }
    if stage == 3:
        config["stage3_param_persistence_threshold"] = _PERSISTENT_NUMEL
    if cfg.offload_optimizer:
        config["offload_optimizer"] = {"device": "cpu", "pin_memory": cfg.use_gpu}
    return config


def _precision_config(cfg: TrainConfig) -> dict[str, Any]:
    if cfg.precision == "fp32":
        return {}
    # Micro-batches and ranks are summed in fp32, or their number would decide the rounding.
    sums = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    if cfg.precision == "bf16":
        return {"bf16": {"enabled": True}, **sums}
    scale = {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": cfg.loss_scale.initial_power,
        "loss_scale_window": cfg.loss_scale.growth_interval,
        "hysteresis": 1,
    }
    return {"fp16": scale, **sums}


def learning_rate_factor(update: int, *, warmup_updates: int, num_updates: int) -> float:
    """Share of the peak learning rate in update number `update` (from 0): linear warm-up, then half a cosine to 0."""
    if update < warmup_updates:
        return update / max(1, warmup_updates)
    progress = (update - warmup_updates) / max(1, num_updates - warmup_updates)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(engine: Any, factor: float) -> None:
    """Every group's learning rate for the coming update: `factor` times its peak."""
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]


def parameter_groups(model: FaithDiffForTraining, stage: StageConfig) -> list[dict[str, Any]]:
    """The trained parameters with their peak learning rates: LQ encoder, and everything else."""
    encoder: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (encoder if name.startswith("lq_encoder.") else rest).append(parameter)
    rates = [("unet", rest, stage.learning_rate), ("lq_encoder", encoder, stage.lq_encoder_learning_rate)]
    return [
        {"params": parameters, "lr": rate, "peak_lr": rate, "name": name}
        for name, parameters, rate in rates
        if parameters
    ]


def initialize(
    model: FaithDiffForTraining,
    cfg: TrainConfig,
    stage: StageConfig,
    split: BatchSplit,
    *,
    compile_backend: str = "inductor",
) -> Any:
    """The DeepSpeed engine around `model`, whose frozen parameters have no gradients and no optimiser state.

    Its learning rates are the peaks until `set_learning_rate` is called.
    """
    import deepspeed  # takes seconds, which a check of the request need not wait for

    # DeepSpeed would compile a shared-memory collective on a CPU; gloo does without it and without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if zero_stage(cfg) != cfg.zero_stage:
        logger.info("zero_stage: 1 in place of 0, which DeepSpeed has only for fp32 without offloading")
    optimizer = torch.optim.AdamW(
        parameter_groups(model, stage),
        betas=(cfg.optimizer.beta1, cfg.optimizer.beta2),
        eps=cfg.optimizer.eps,
        weight_decay=cfg.optimizer.weight_decay,
        fused=True,
    )
    if zero_stage(cfg) == 0:
        clip_and_skip_on_device(optimizer, cfg.optimizer.max_grad_norm)
    if cfg.compile:
        compile_blocks(model, backend=compile_backend)
    rounded = [p for p in model.parameters() if p.requires_grad] if cfg.precision != "fp32" else []
    # DeepSpeed rounds weights into storage of its own: these keep the old.
    exact = [parameter.detach() for parameter in rounded]
    engine, *_ = deepspeed.initialize(
        model=model.train(), optimizer=optimizer, config=deepspeed_config(cfg, split), dist_init_required=False
    )
    # Its fp32 masters are made of rounded weights.
    for parameter, weight in zip(rounded, exact, strict=True):
        deepspeed.utils.safe_set_full_fp32_param(parameter, weight.to(engine.device))
    return engine


def compile_blocks(model: FaithDiffForTraining, *, backend: str) -> None:
    """Compiles the UNet's transformer blocks, which share one graph per width, and the LQ encoder's down blocks."""
    model.unet.compile_repeated_blocks(backend=backend)
    for block in model.lq_encoder.down_blocks:
        block.compile(backend=backend)

"""Recipe -> DeepSpeed: its configuration, the optimiser with its parameter groups, the learning-rate curve."""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_set_full_fp32_param
from torch import nn

from faithdiff.loss import FaithDiffForTraining
from pipelines.training.batches import BatchSplit
from pipelines.training.recipe import StageConfig, TrainConfig


def deepspeed_config(cfg: TrainConfig, split: BatchSplit) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`; the recipe's `deepspeed` entries replace generated ones."""
    config: dict[str, Any] = {
        "train_batch_size": split.global_batch,
        "train_micro_batch_size_per_gpu": split.micro_batch,
        "gradient_accumulation_steps": split.accumulation,
        "gradient_clipping": cfg.optimizer.max_grad_norm,
        "zero_optimization": {"stage": cfg.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    if cfg.precision == "bf16":
        config["bf16"] = {"enabled": True}
        # Micro-batches are summed in fp32, or the accumulation would decide the rounding.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config | cfg.deepspeed


def learning_rate_factor(update: int, *, warmup_updates: int, num_updates: int) -> float:
    """Share of the peak learning rate in update number `update` (from 0): linear warm-up, then half a cosine to 0."""
    if update < warmup_updates:
        return update / max(1, warmup_updates)
    progress = (update - warmup_updates) / max(1, num_updates - warmup_updates)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model: FaithDiffForTraining, stage: StageConfig) -> list[dict[str, Any]]:
    """The trained parameters with their peak learning rates: LQ encoder, and everything else."""
    encoder: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (encoder if name.startswith("lq_encoder.") else rest).append(parameter)
    groups = [
        {"params": rest, "lr": stage.learning_rate, "name": "unet"},
        {"params": encoder, "lr": stage.lq_encoder_learning_rate, "name": "lq_encoder"},
    ]
    return [group for group in groups if group["params"]]


def initialize(model: FaithDiffForTraining, cfg: TrainConfig, stage: StageConfig, split: BatchSplit) -> Any:
    """The DeepSpeed engine around `model`, whose frozen parameters have no gradients and no optimiser state."""
    # DeepSpeed would compile a shared-memory collective on a CPU; gloo does without it and without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    optimizer = torch.optim.AdamW(
        parameter_groups(model, stage),
        betas=(cfg.optimizer.beta1, cfg.optimizer.beta2),
        eps=cfg.optimizer.eps,
        weight_decay=cfg.optimizer.weight_decay,
        fused=cfg.use_gpu,
    )

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda update: learning_rate_factor(
                update, warmup_updates=stage.warmup_updates, num_updates=stage.num_updates
            ),
        )

    is_rounded = cfg.precision == "bf16"
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    exact = {name: parameter.detach().clone() for name, parameter in trained} if is_rounded else {}
    engine, *_ = deepspeed.initialize(
        model=model.train(),
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=deepspeed_config(cfg, split),
        dist_init_required=False,
    )
    # DeepSpeed takes its fp32 masters from weights that it has rounded to bf16 already.
    for name, parameter in trained if is_rounded else ():
        safe_set_full_fp32_param(parameter, exact[name].to(engine.device))
    return engine

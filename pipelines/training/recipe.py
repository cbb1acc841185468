"""What a training recipe says; everything is counted in optimiser updates and samples, nothing in workers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from sr_platform.config import StrictConfig

Stage = Literal["align", "unified"]
_STAGES: dict[str, tuple[Stage, ...]] = {"align": ("align",), "unified": ("unified",), "both": ("align", "unified")}


class StageConfig(StrictConfig):
    """One of the two stages."""

    num_updates: PositiveInt
    """Optimiser updates; the cosine ends here."""
    learning_rate: PositiveFloat
    """Peak learning rate of the alignment module, and in the unified stage of the UNet."""
    lq_encoder_learning_rate: PositiveFloat = 5e-6
    """Peak learning rate of the LQ encoder, which the unified stage alone trains."""
    warmup_updates: NonNegativeInt = 0
    """Updates over which the learning rate rises linearly from 0."""

    @model_validator(mode="after")
    def _warm_up_ends(self) -> StageConfig:
        if self.warmup_updates >= self.num_updates:
            raise ValueError(f"warmup_updates must be below num_updates={self.num_updates}")
        return self


class OptimizerConfig(StrictConfig):
    """AdamW and gradient clipping."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 1e-2
    max_grad_norm: PositiveFloat = 1.0
    """Gradients of an update are scaled down to this norm."""


class TrainConfig(StrictConfig):
    """Both stages of one training."""

    data: str
    """URI of a prepared dataset: a folder, file:// or s3://."""
    align: StageConfig
    """Stage 1: the alignment module alone."""
    unified: StageConfig
    """Stage 2: LQ encoder, alignment module and UNet."""
    out: Path = Path("out/train")
    """Folder of checkpoints, models and (without MLFLOW_TRACKING_URI) the MLflow database. All nodes must see it."""
    model: str = "nano"
    """Model to start from: a preset, a folder, or models:/name@alias."""
    stage: Literal["align", "unified", "both"] = "both"
    num_workers: PositiveInt = 2
    """Ray Train workers, one process each."""
    max_updates: PositiveInt | None = None
    """End each stage after so many updates, on the learning-rate curve of the whole stage."""
    seed: NonNegativeInt = 0

    global_batch: PositiveInt = 256
    """Samples per update, over all workers and micro-batches."""
    max_micro_batch: PositiveInt = 32
    """Most samples a worker takes through the network at once; accumulation follows from it."""
    size_px: PositiveInt = Field(default=512, multiple_of=8)
    """Side of the high-quality crops."""
    caption_dropout: float = Field(default=0.2, ge=0, le=1)
    """Share of samples trained with the empty caption."""
    noise_offset: NonNegativeFloat = 0.02
    """Standard deviation of the noise that a whole channel shares."""
    alignment_attention: Literal["model", "tokens", "value"] = "model"
    """What alignment blocks attend to: as the model says, a picture's tokens (paper), or nothing (released)."""

    optimizer: OptimizerConfig = OptimizerConfig()
    average_decay: float = Field(default=0.0, ge=0, lt=1)
    """Upper limit of the moving average's decay per update; 0 keeps no average."""
    export: Literal["raw", "averaged"] = "raw"
    """Which weights the written model holds."""

    use_gpu: bool = False
    """One GPU per worker."""
    cpus_per_worker: PositiveFloat = 1.0
    """Logical CPUs that Ray reserves per worker."""
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shares out between workers: nothing, optimiser state, gradients too, parameters too."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    data_workers: NonNegativeInt = 0
    """Processes per worker that decode and cut samples ahead; 0 does it in the training process."""
    data_cache: Path | None = None
    """Folder on a local disk with room for all shards: those on S3 are fetched whole, once, and read from there."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed settings that replace generated ones, as they are."""

    log_every_updates: PositiveInt = 10
    """Updates between two looks at the loss, which is then also checked to be finite."""
    checkpoint_every_updates: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 2
    max_failures: NonNegativeInt = 2
    """Worker failures after which the run goes on from its last checkpoint."""

    experiment: str = "faithdiff"
    """MLflow experiment."""
    registered_model: str = Field(default="faithdiff", pattern=r"^[^/:@]+$")
    """Name in the model registry."""
    alias: str = Field(default="candidate", pattern=r"^(?!v?\d+$|latest$)[A-Za-z0-9_-]+$")
    """Alias moved to the new version."""

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if self.global_batch % self.num_workers:
            raise ValueError(
                f"global_batch={self.global_batch} is not divisible by num_workers={self.num_workers}; change one"
            )
        if self.export == "averaged" and not self.average_decay:
            raise ValueError("export=averaged needs average_decay above 0")
        if self.average_decay and self.zero_stage == 3:
            raise ValueError("average_decay needs zero_stage 0, 1 or 2")
        if self.average_decay and self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError("average_decay in bf16 needs zero_stage 1 or 2, which keep fp32 weights")
        return self

    @property
    def stages(self) -> tuple[Stage, ...]:
        return _STAGES[self.stage]

    def stage_config(self, stage: Stage) -> StageConfig:
        return self.align if stage == "align" else self.unified

    def last_update(self, stage: Stage) -> int:
        """How many updates the stage runs."""
        num_updates = self.stage_config(stage).num_updates
        return num_updates if self.max_updates is None else min(num_updates, self.max_updates)

    @property
    def digest(self) -> str:
        """Changes with anything that decides the result; not with paths, logging or what is kept."""
        incidental = {"out", "stage", "log_every_updates", "keep_checkpoints", "max_failures", "data_workers"}
        values = self.model_dump(mode="json", exclude=incidental | {"experiment", "cpus_per_worker", "data_cache"})
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

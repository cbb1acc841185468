"""What a training recipe says; everything is counted in optimiser updates and samples, nothing in workers.

Settings that decide the result are in the recipe's digest. Those that decide only where, how fast and how visibly it is
reached (`_INCIDENTAL`) are not: a run may go on with other workers, another micro-batch or another ZeRO stage.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from faithdiff.parts import Part
from sr_platform.config import StrictConfig

Stage = Literal["align", "encoder", "unified"]

_DEFAULT_PARTS: dict[Stage, tuple[Part, ...]] = {
    "align": ("alignment",),
    "encoder": ("alignment", "lq_encoder"),
    "unified": ("alignment", "lq_encoder", "unet"),
}
_INCIDENTAL = {
    *("data", "out", "model", "stage", "num_workers", "min_workers", "max_micro_batch", "probe_memory", "use_gpu"),
    *("cpus_per_worker", "zero_stage", "offload_optimizer", "gradient_checkpointing", "compile", "data_workers"),
    *("data_cache", "log_every_updates", "checkpoint_every_updates", "keep_checkpoints", "keep_every_updates"),
    *("max_failures", "experiment", "registered_model", "alias", "validation"),
}


class StageConfig(StrictConfig):
    """One stage of training."""

    num_updates: PositiveInt
    """Optimiser updates; the cosine ends here."""
    learning_rate: PositiveFloat
    """Peak learning rate of the alignment module, UNet and control branch."""
    lq_encoder_learning_rate: PositiveFloat = 5e-6
    """Peak learning rate of the LQ encoder, in stages that train it."""
    warmup_updates: NonNegativeInt = 0
    """Updates over which the learning rate rises linearly from 0."""
    trains: tuple[Part, ...] | None = None
    """What is trained, everything else is frozen; by default what the stage trains in the paper."""

    @model_validator(mode="after")
    def _fits_together(self) -> StageConfig:
        if self.warmup_updates >= self.num_updates:
            raise ValueError(f"warmup_updates must be below num_updates={self.num_updates}")
        if self.trains is not None and not self.trains:
            raise ValueError("trains must name at least one of alignment, lq_encoder, unet, control")
        return self


class OptimizerConfig(StrictConfig):
    """AdamW and gradient clipping."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean of gradients."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the mean of squared gradients."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the latter."""
    weight_decay: NonNegativeFloat = 1e-2
    """Share of the learning rate by which weights shrink at every update."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients of an update are scaled down to this norm."""


class LossScaleConfig(StrictConfig):
    """Dynamic loss scale of fp16: halved when gradients overflow, doubled after a while without."""

    initial_power: NonNegativeInt = 16
    """The scale starts at 2 ** initial_power."""
    growth_interval: PositiveInt = 1000
    """Updates without overflow before the scale is doubled."""
    floor: PositiveFloat = 1.0
    """Training stops with an error when the scale falls below: gradients have collapsed."""


class ArchitectureConfig(StrictConfig):
    """How the low-quality picture enters the UNet; anything but the defaults is an ablation of the paper."""

    alignment: Literal["transformer", "sum"] = "transformer"
    """Alignment module as in the paper, or the embedded LQ features simply added to the latent features."""
    features: Literal["penultimate", "last"] = "penultimate"
    """Which layer of the VAE encoder gives the LQ features: the one before the last, or the latents themselves."""
    control: bool = False
    """Condition a ControlNet-style copy of the UNet's encoder, whose features modulate the UNet's skips (SFT)."""


class ValidationConfig(StrictConfig):
    """Fixed pictures that are restored while training goes on."""

    every_updates: PositiveInt = 500
    """Updates between two restorations; one more comes at the end of a stage."""
    data: str | None = None
    """URI of a prepared dataset; by default the training data."""
    num_pictures: NonNegativeInt = 0
    """Its first pictures, in the order of the shards; 0 restores none."""
    num_inference_steps: PositiveInt = 20
    """Steps of each restoration."""
    guidance_scale: PositiveFloat = 5.0
    """How strongly the caption steers."""
    start_from: Literal["lq", "noise"] = "lq"
    """What a restoration begins with: the noisy low-quality picture, or noise alone."""
    seed: NonNegativeInt = 0
    """Of the restorations' noise."""


class TrainConfig(StrictConfig):
    """All stages of one training."""

    data: str
    """URI of a prepared dataset: a folder, file:// or s3://."""
    align: StageConfig
    """Stage 1: the alignment module alone."""
    unified: StageConfig
    """Stage 2: LQ encoder, alignment module and UNet."""
    encoder: StageConfig | None = None
    """A stage between both that tunes the LQ encoder with the UNet fixed; part of the paper's ablations only."""
    architecture: ArchitectureConfig = ArchitectureConfig()
    out: str = "out/train"
    """URI of checkpoints and models; a local folder also holds the MLflow database without MLFLOW_TRACKING_URI.
    All nodes must see it: with several, give s3:// or a shared file system."""
    model: str = "nano"
    """Model to start from: a preset, a folder, or models:/name@alias."""
    resume_from: str | None = None
    """URI of a checkpoint, of any number of workers, whose weights, moments and update the first stage goes on from."""
    stage: Literal["align", "encoder", "unified", "both"] = "both"
    """Which stage runs; both: all that the recipe has."""
    num_workers: PositiveInt = 2
    """Ray Train workers, one process each; the most, where `min_workers` is given."""
    min_workers: PositiveInt | None = None
    """Go on with as few workers as this when nodes are lost, and with more again when they come back."""
    max_updates: PositiveInt | None = None
    """End each stage after so many updates, on the learning-rate curve of the whole stage."""
    seed: NonNegativeInt = 0
    """Of everything random: order of samples, crops, flips, noise, timesteps, dropped captions."""

    global_batch: PositiveInt = 256
    """Samples per update, over all workers and micro-batches."""
    max_micro_batch: PositiveInt = 32
    """Most samples a worker takes through the network at once; accumulation follows from it."""
    probe_memory: bool = False
    """Before each stage measure how many samples fit into memory, and take no more."""
    size_px: PositiveInt = Field(default=512, multiple_of=8)
    """Side of the high-quality crops."""
    caption_dropout: float = Field(default=0.2, ge=0, le=1)
    """Share of samples trained with the empty caption."""
    noise_offset: NonNegativeFloat = 0.02
    """Standard deviation of the noise that a whole channel shares."""
    mixture: Literal["dataset", "proportional"] = "dataset"
    """Shares of the groups in the draws: as the dataset says, or as many as each group has samples."""
    alignment_attention: Literal["model", "tokens", "value", "batch"] = "model"
    """What alignment blocks attend to: as the model says, a picture's tokens (paper), nothing, or, at each pixel, the
    other pictures of a group of `attention_group` (released script; such a model restores with "value")."""
    attention_group: PositiveInt = 16
    """Consecutive samples that see each other with alignment_attention=batch: the released batch of one GPU."""

    optimizer: OptimizerConfig = OptimizerConfig()
    average_decay: float = Field(default=0.0, ge=0, lt=1)
    """Upper limit of the moving average's decay per update; 0 keeps no average."""
    average_every_updates: PositiveInt = 1
    """Updates between two steps of the moving average, whose decay is not corrected for it."""
    export: Literal["raw", "averaged"] = "raw"
    """Which weights the written model holds."""

    use_gpu: bool = False
    """One GPU per worker."""
    cpus_per_worker: PositiveFloat = 1.0
    """Logical CPUs that Ray reserves per worker."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the network's arithmetic; the optimiser's weights are fp32 always."""
    loss_scale: LossScaleConfig = LossScaleConfig()
    """For fp16."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shares out between workers: nothing, optimiser state, gradients too, parameters too. With bf16,
    fp16 or offloading 0 is 1, which gives the same."""
    offload_optimizer: bool = False
    """Keep optimiser state and its arithmetic in the CPU's memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the UNet's transformer blocks and the LQ encoder's: minutes at the start, then faster on a GPU."""
    data_workers: NonNegativeInt = 0
    """Processes per worker that decode and cut samples ahead; 0 does it in the training process."""
    data_cache: Path | None = None
    """Folder on a local disk with room for all shards: those on S3 are fetched whole, once, and read from there."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed settings that replace generated ones, mapping by mapping, given in a recipe; logged with the run."""

    log_every_updates: PositiveInt = 10
    """Updates between two looks at the losses."""
    checkpoint_every_updates: PositiveInt = 1000
    """What a lost worker costs at most; training goes on while a checkpoint is written."""
    keep_checkpoints: PositiveInt = 2
    """The newest ones, of each stage."""
    keep_every_updates: PositiveInt | None = None
    """Checkpoints at multiples of this stay for good."""
    validation: ValidationConfig = ValidationConfig()
    """Pictures restored on the way."""
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
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers={self.min_workers} is above num_workers={self.num_workers}; lower it")
        if self.num_workers > self.global_batch:
            raise ValueError(
                f"num_workers={self.num_workers} is above global_batch={self.global_batch}: some would have no sample; "
                "change one"
            )
        if self.export == "averaged" and not self.average_decay:
            raise ValueError("export=averaged needs average_decay above 0")
        if self.alignment_attention == "batch" and self.global_batch % self.attention_group:
            raise ValueError(
                f"global_batch={self.global_batch} is not divisible by attention_group={self.attention_group}; "
                "change one"
            )
        if self.alignment_attention != "model" and self.architecture.alignment == "sum":
            raise ValueError(
                f"alignment_attention={self.alignment_attention} needs an alignment module, and "
                "architecture.alignment=sum has none; leave one out"
            )
        if self.alignment_attention == "batch" and self.attention_group > self.max_micro_batch:
            raise ValueError(
                f"attention_group={self.attention_group} samples go through the network together, and "
                f"max_micro_batch={self.max_micro_batch} is less; raise it"
            )
        if self.stage == "encoder" and self.encoder is None:
            raise ValueError("stage=encoder needs the recipe's encoder stage; give encoder or another stage")
        self._check_parts()
        return self

    def _check_parts(self) -> None:
        for stage in self.stages:
            trains = self.trained_parts(stage)
            if "control" in trains and not self.architecture.control:
                raise ValueError(f"{stage}.trains names control; set architecture.control too")

    @property
    def stages(self) -> tuple[Stage, ...]:
        if self.stage != "both":
            return (self.stage,)
        return ("align", "unified") if self.encoder is None else ("align", "encoder", "unified")

    def stage_config(self, stage: Stage) -> StageConfig:
        config = {"align": self.align, "encoder": self.encoder, "unified": self.unified}[stage]
        assert config is not None, stage
        return config

    def trained_parts(self, stage: Stage) -> tuple[Part, ...]:
        """What the stage trains."""
        trains = self.stage_config(stage).trains
        return _DEFAULT_PARTS[stage] if trains is None else trains

    def last_update(self, stage: Stage) -> int:
        """How many updates the stage runs."""
        num_updates = self.stage_config(stage).num_updates
        return num_updates if self.max_updates is None else min(num_updates, self.max_updates)

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result: no paths, hardware, logging or what is kept."""
        return self.model_dump(mode="json", exclude=_INCIDENTAL)

    @property
    def digest(self) -> str:
        """Changes with anything that decides the result."""
        return hashlib.sha256(json.dumps(self.deciding, sort_keys=True).encode()).hexdigest()

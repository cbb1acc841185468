"""Batches -> updates: what one Ray Train worker does from start to end of a stage.

Ray calls `train_loop_per_worker` on every rank, and again after a failure. The worker's current directory is one of
Ray's, so every path that comes in is absolute.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import Tensor

from faithdiff.loss import FaithDiffForTraining, trained_parameters
from faithdiff.pipeline import FaithDiffPipeline
from faithdiff.schedule import alphas_cumprod
from pipelines.training.batches import Batch, BatchSplit, CropConfig, MicroBatches, micro_batches
from pipelines.training.deepspeed_config import initialize, learning_rate_factor
from pipelines.training.inputs import FrozenModels, StoredInputs
from pipelines.training.recipe import Stage, TrainConfig
from sr_platform.checkpoints import (
    ParameterAverage,
    consolidated_parameters,
    restore_train_state,
    save_train_state,
)
from sr_platform.config import StrictConfig
from sr_platform.sample_reader import SampleReader
from sr_platform.tracking import Metric, RunLog


class StageJob(StrictConfig):
    """One stage as the workers get it. Paths are absolute."""

    train: TrainConfig
    stage: Stage
    model: str
    """Folder or preset to start from."""
    model_out: Path
    """Folder of the trained model; it appears only when complete."""
    model_version: str
    """What the trained model calls itself in reports."""
    tracking_uri: str
    run_id: str
    """MLflow run of this stage, which exists already."""
    stored: StoredInputs = StoredInputs()
    """What the dataset holds ready for the model."""


@dataclass
class Progress:
    """What happened since the last look; losses stay on the device until then."""

    losses: list[Tensor] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)


def train_loop_per_worker(values: dict[str, Any]) -> dict[str, float]:
    """Trains one stage and writes its model; rank 0's last metrics come back as the result of the run."""
    job = StageJob.model_validate(values)
    worker = Worker(job)
    metrics = worker.run()
    worker.write_model()
    return metrics


class Worker:
    """One rank: its share of the model, of the data and of every update."""

    def __init__(self, job: StageJob) -> None:
        cfg, context = job.train, ray.train.get_context()
        self.job, self.cfg, self.stage = job, cfg, cfg.stage_config(job.stage)
        self.rank, world_size = context.get_world_rank(), context.get_world_size()
        self.split = BatchSplit.derive(cfg.global_batch, world_size, cfg.max_micro_batch)
        device = ray.train.torch.get_device()
        if cfg.use_gpu:
            torch.set_float32_matmul_precision("high")
        # Stages see other crops and other noise of the same pictures.
        seed = zlib.crc32(f"{cfg.seed} {job.stage}".encode())
        crop = CropConfig(size_px=cfg.size_px, caption_dropout=cfg.caption_dropout)
        reader, reads = SampleReader(cfg.data, cfg.data_cache), job.stored.reads
        self.data = MicroBatches(reader, self.split, rank=self.rank, seed=seed, crop=crop, reads=reads)
        pipeline = load_model(job)
        dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
        self.frozen = FrozenModels(
            pipeline, device=device, dtype=dtype, seed=seed, noise_offset=cfg.noise_offset, stored=job.stored
        )
        self.engine = initialize(trainable_module(pipeline, job), cfg, self.stage, self.split)
        self.average = ParameterAverage(self.engine, cfg.average_decay) if cfg.average_decay else None
        self.log = RunLog(job.tracking_uri, job.run_id) if self.rank == 0 else None

    def run(self) -> dict[str, float]:
        """Every update from the last checkpoint to the end of the stage; returns the last metrics."""
        first, last = restore_train_state(self.engine, average=self.average), self.cfg.last_update(self.job.stage)
        batches = micro_batches(self.data, first, last, num_workers=self.cfg.data_workers)
        progress, metrics = Progress(), dict[str, float]()
        for update in range(first + 1, last + 1):
            progress.losses.append(self._update(batches))
            if self.average is not None:
                self.average.step(update)
            is_checkpoint = update % self.cfg.checkpoint_every_updates == 0 or update == last
            if is_checkpoint or update % self.cfg.log_every_updates == 0:
                metrics = self._look(update, progress)
                progress = Progress()
            if is_checkpoint:
                save_train_state(self.engine, update=update, metrics=metrics, average=self.average)
                progress = Progress()
        return metrics

    def write_model(self) -> None:
        """The whole model as a folder, in fp32: what was trained from here, all else from where the run started."""
        average = self.average if self.cfg.export == "averaged" else None
        trained = consolidated_parameters(self.engine, average)
        if self.rank != 0:
            return
        pipeline = load_model(self.job)
        module = trainable_module(pipeline, self.job)
        expected = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        assert trained.keys() == expected, sorted(trained.keys() ^ expected)
        module.load_state_dict(trained, strict=False)
        pipeline.model_version = self.job.model_version
        pipeline.save_pretrained(self.job.model_out)

    def _update(self, batches: Iterator[Batch]) -> Tensor:
        """One optimiser update; returns this rank's mean loss, which nothing has waited for."""
        losses = []
        for _ in range(self.split.accumulation):
            inputs = self.frozen.encode(next(batches))
            loss = self.engine(inputs.latents, inputs.draws, inputs.conditions)
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def _look(self, update: int, progress: Progress) -> dict[str, float]:
        """Metrics of the updates since the last look, in MLflow, after a check that every loss was finite.

        Raises:
            FloatingPointError: some loss was not; on all ranks alike, and before a checkpoint could hold its weights.
        """
        stacked = torch.stack(progress.losses).float()
        torch.distributed.all_reduce(stacked)
        losses = (stacked / self.split.world_size).tolist()
        first = update - len(losses) + 1
        self._check_finite(first, losses)
        seconds = time.monotonic() - progress.started_s
        latest = {
            "train/loss": losses[-1],
            "train/lr": self._learning_rate(update),
            "train/grad_norm": float(self.engine.get_global_grad_norm() or 0.0),
            "train/samples_per_s": len(losses) * self.split.global_batch / seconds,
            "train/updates_per_s": len(losses) / seconds,
        }
        if self.log is not None:
            curve = [Metric("train/loss", loss, first + i) for i, loss in enumerate(losses[:-1])]
            curve += [Metric("train/lr", self._learning_rate(u), u) for u in range(first, update)]
            self.log.log(curve + [Metric(key, value, update) for key, value in latest.items()])
            self.log.log([Metric("train/updates", update, update)])
        return latest

    def _learning_rate(self, update: int) -> float:
        """Of the alignment module and UNet in update number `update`, counted from 1."""
        stage = self.stage
        return stage.learning_rate * learning_rate_factor(
            update - 1, warmup_updates=stage.warmup_updates, num_updates=stage.num_updates
        )

    def _check_finite(self, first: int, losses: list[float]) -> None:
        for update, loss in enumerate(losses, start=first):
            if loss - loss != 0:
                start = (update - 1) * self.split.global_batch
                numbers = range(start, start + self.split.global_batch)
                keys = [self.data.reader.keys[self.data.order.index(n)] for n in numbers]
                raise FloatingPointError(
                    f"train: the loss of update {update} of stage {self.job.stage} is {loss} "
                    f"(learning rate {self._learning_rate(update):.3g}); no checkpoint holds its weights. "
                    f"Samples of the update: {', '.join(keys)}"
                )


def load_model(job: StageJob) -> FaithDiffPipeline:
    """The model that the stage starts from, in fp32 on the CPU."""
    pipeline = FaithDiffPipeline.from_pretrained(job.model)
    if job.train.alignment_attention != "model":
        pipeline.unet.set_alignment_attention(job.train.alignment_attention)
    return pipeline


def trainable_module(pipeline: FaithDiffPipeline, job: StageJob) -> FaithDiffForTraining:
    """UNet and LQ encoder of `pipeline` as one module in which only what the stage trains has gradients."""
    module = FaithDiffForTraining(pipeline.unet, pipeline.lq_encoder, alphas_cumprod(pipeline.scheduler.config))
    trained_parameters(module, job.stage)
    if job.train.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        pipeline.lq_encoder.enable_gradient_checkpointing()
    return module

"""Looks -> metrics in MLflow: what rank 0 tells about a stage, by the names that people will search for.

    train/loss, train/lr            every update        train/loss_smoothed       at looks, about the last fifty updates
    train/loss_by_timestep/000-099  at looks            train/grad_norm           of the last update, before clipping
    perf/tflops, perf/share_of_peak                     per worker, forward and backward, against the measured peak
    perf/data_wait_share            of the time         perf/checkpoint_s         in which training stood still for one
    perf/peak_memory_gib            of one worker       system/*                  of the machine of rank 0
    run/workers, run/micro_batch    from every start    run/accumulation          on

Everything goes through a buffer that outlasts the tracking server; what is not sent yet travels in the checkpoints.
"""

from __future__ import annotations

import resource
from typing import Any

import torch

from pipelines.training.batch_split import BatchSplit
from pipelines.training.deepspeed_config import learning_rate_factor
from pipelines.training.progress import Look, SmoothedLoss
from pipelines.training.stage_job import StageJob
from sr_platform.run_log import Metric, RunLog
from sr_platform.system_metrics import SystemMetrics

_FLUSH_TIMEOUT_S = 10.0


class Reporter:
    """Rank 0's account of one stage."""

    def __init__(self, job: StageJob, split: BatchSplit, flops_per_sample: int, peak_flops: float) -> None:
        """`flops_per_sample`: forward and backward of the network that is trained, frozen models aside."""
        self.job, self.split, self.flops_per_sample, self.peak_flops = job, split, flops_per_sample, peak_flops
        self.stage = job.config
        self.log = RunLog(job.tracking_uri, job.run_id)
        self.system = SystemMetrics(self.log)
        self.system.start()
        self.smoothed = SmoothedLoss()
        self.latest: dict[str, float] = {}
        self.validated = 0
        """Update of the last validation."""
        self.is_told = False

    def look(self, update: int, look: Look, engine: Any) -> None:
        """Logs the curve of the updates since the last look, and everything else at the last of them."""
        first = update - len(look.losses) + 1
        curve = [Metric("train/loss", loss, first + i) for i, loss in enumerate(look.losses)]
        for number in range(first, update + 1):
            curve += [Metric(key, rate, number) for key, rate in self.learning_rates(number).items()]
        values = {"train/loss_smoothed": self.smoothed.add(look.losses), **look.buckets}
        values |= self._gradients(engine) | self._speed(look) | _memory(engine.device)
        values["train/updates"] = update
        if not self.is_told:
            values |= self._attempt()
            self.is_told = True
        self.log.log(curve + [Metric(key, value, update) for key, value in values.items()])
        self.latest = {"train/loss": look.losses[-1], **self.learning_rates(update), **values}

    def learning_rates(self, update: int) -> dict[str, float]:
        """In update number `update`, counted from 1, of everything that the stage trains."""
        stage = self.stage
        factor = learning_rate_factor(update - 1, warmup_updates=stage.warmup_updates, num_updates=stage.num_updates)
        rates = {"train/lr": stage.learning_rate * factor}
        if "lq_encoder" in self.job.train.trained_parts(self.job.stage):
            rates["train/lr_lq_encoder"] = stage.lq_encoder_learning_rate * factor
        return rates

    def validation(self, update: int, metrics: dict[str, float], pictures: dict[str, str]) -> None:
        """Metrics of validation, and its pictures: key -> URI of a PNG."""
        self.log.log([Metric(key, value, update) for key, value in metrics.items()])
        for key, uri in pictures.items():
            self.log.image(f"validation/{key}", uri, update)
        self.latest |= metrics
        self.validated = update

    def checkpoint(self, update: int, seconds: float) -> None:
        """How long training stood still for a checkpoint."""
        self.log.log([Metric("perf/checkpoint_s", seconds, update)])

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a restarted worker goes on with this account."""
        return {
            "loss_smoothed": [self.smoothed.total, self.smoothed.weight],
            "run_id": self.job.run_id,
            "pending_log": self.log.pending(),
            "metrics": self.latest,
            "validated": self.validated,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.smoothed = SmoothedLoss(*state["loss_smoothed"])
        if state["run_id"] == self.job.run_id:
            self.log.restore(state["pending_log"])
        self.latest = dict(state["metrics"])
        self.validated = state["validated"]

    def close(self) -> list[dict[str, Any]]:
        """Waits a little for the tracking server; returns what it has not taken, for the driver to deliver."""
        self.system.stop()
        self.log.flush(_FLUSH_TIMEOUT_S)
        pending = self.log.pending()
        self.log.close()
        return pending

    def _gradients(self, engine: Any) -> dict[str, float]:
        values = {"train/grad_norm": float(engine.get_global_grad_norm() or 0.0)}
        if self.job.train.precision == "fp16":
            values["train/loss_scale"] = float(engine.optimizer.loss_scale)
            values["train/skipped_updates"] = float(engine.skipped_steps)
        return values

    def _attempt(self) -> dict[str, float]:
        """How this start shares an update out; another start may do so otherwise."""
        return {
            "run/workers": self.split.world_size,
            "run/micro_batch": self.split.micro_batch,
            "run/accumulation": self.split.accumulation,
        }

    def _speed(self, look: Look) -> dict[str, float]:
        updates_per_s = len(look.losses) / look.seconds
        samples_per_s = updates_per_s * self.split.global_batch
        flops = self.flops_per_sample * samples_per_s / self.split.world_size
        return {
            "train/updates_per_s": updates_per_s,
            "train/samples_per_s": samples_per_s,
            "perf/tflops": flops / 1e12,
            "perf/share_of_peak": flops / self.peak_flops,
            "perf/data_wait_share": look.data_wait_share,
        }


def _memory(device: torch.device) -> dict[str, float]:
    """The most that this worker has held so far: of its GPU, or of the machine's memory."""
    if device.type == "cuda":
        return {"perf/peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    return {"perf/peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}

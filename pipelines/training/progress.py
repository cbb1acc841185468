"""Losses, timesteps and waits of the updates since the last look -> metrics; nothing waits for the device in between.

In : per micro-batch the losses of its samples [B] (on the device), their timesteps and weights.
Out: one mean loss per update, exact for the global batch, and metrics by their names in MLflow.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
import torch.distributed
from torch import Tensor

from pipelines.training.batch_split import BatchSplit

NUM_BUCKETS = 10
_SMOOTHING = 0.98
"""Decay per update of the smoothed loss: about the last fifty updates."""


@dataclass
class SmoothedLoss:
    """Exponential average over updates, corrected for its start at zero; part of every checkpoint."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, losses: list[float]) -> float:
        for loss in losses:
            self.total = _SMOOTHING * self.total + (1 - _SMOOTHING) * loss
            self.weight = _SMOOTHING * self.weight + (1 - _SMOOTHING)
        return self.total / self.weight


@dataclass(frozen=True)
class Look:
    """What the ranks saw together since the last look."""

    losses: list[float]
    """Mean loss of every update, over its global batch."""
    buckets: dict[str, float]
    """Mean loss by tenth of the timesteps that occurred, by metric name."""
    seconds: float
    """The same on all ranks, as everything here."""
    data_wait_share: float
    """Share of the time in which the slowest-fed rank waited for its samples."""


@dataclass
class Progress:
    """The updates since the last look of one rank; tensors stay on the device until then."""

    split: BatchSplit
    num_train_timesteps: int
    losses: list[Tensor] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    data_wait_s: float = 0.0
    started_s: float = field(default_factory=time.monotonic)

    def add(self, losses: Tensor, timesteps: Tensor, weights: Tensor) -> None:
        """One micro-batch, all [B] and detached."""
        self.losses.append(losses)
        self.timesteps.append(timesteps)
        self.weights.append(weights)

    @property
    def num_updates(self) -> int:
        return len(self.losses) // self.split.accumulation

    def look(self) -> Look:
        """Waits for the device, and sums over all ranks, which must call this together."""
        losses = torch.cat(self.losses).double()
        weights = torch.cat(self.weights).to(losses.device).double()
        # A slot that does not count must not spread what is not finite.
        losses = torch.where(weights > 0, losses, 0.0)
        bucket = torch.cat(self.timesteps).to(losses.device) * NUM_BUCKETS // self.num_train_timesteps
        by_bucket = losses.new_zeros(2, NUM_BUCKETS)
        by_bucket[0].index_add_(0, bucket, losses)
        by_bucket[1].index_add_(0, bucket, weights)
        sums = torch.cat([losses.view(self.num_updates, -1).sum(1), by_bucket.flatten()])
        torch.distributed.all_reduce(sums)
        seconds = time.monotonic() - self.started_s
        slowest = sums.new_tensor([seconds, self.data_wait_s / seconds])
        torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
        seconds, wait_share = slowest.tolist()
        values = sums.tolist()
        means = [total / self.split.global_batch for total in values[: self.num_updates]]
        totals, counts = values[self.num_updates :][:NUM_BUCKETS], values[-NUM_BUCKETS:]
        return Look(means, self._named(totals, counts), seconds, wait_share)

    def _named(self, totals: list[float], counts: list[float]) -> dict[str, float]:
        width = self.num_train_timesteps / NUM_BUCKETS
        names = [
            f"train/loss_by_timestep/{round(i * width):03d}-{round((i + 1) * width) - 1:03d}"
            for i in range(NUM_BUCKETS)
        ]
        return {name: total / count for name, total, count in zip(names, totals, counts, strict=True) if count}

"""How the samples of an update are shared between workers and micro-batches, for any number of both.

Every rank runs `accumulation` micro-batches of `micro_batch` slots. Where the slots are more than the samples (8
samples on 3 workers), the rest repeat samples with weight 0: they cost time and change nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Slot(NamedTuple):
    """A place in a micro-batch."""

    sample: int
    """Number in the stream of samples."""
    weight: float
    """1, or 0 for a repeated sample that must not count."""


@dataclass(frozen=True)
class BatchSplit:
    """The global batch of an update on `world_size` ranks."""

    global_batch: int
    world_size: int
    micro_batch: int

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and update."""
        return math.ceil(self.global_batch / (self.world_size * self.micro_batch))

    @property
    def num_slots(self) -> int:
        """Slots of all ranks in an update, at least the global batch."""
        return self.world_size * self.micro_batch * self.accumulation

    @property
    def loss_scale(self) -> float:
        """Factor that turns a micro-batch's weighted sum of losses into what the mean over micro-batches must average.

        The mean over all ranks and micro-batches is then the mean over the samples of the update.
        """
        return self.world_size * self.accumulation / self.global_batch

    @classmethod
    def derive(cls, global_batch: int, world_size: int, max_micro_batch: int, *, multiple_of: int = 1) -> BatchSplit:
        """The micro-batch from max_micro_batch / 2 to max_micro_batch that wastes the fewest slots, then the largest.

        `multiple_of` samples must stay together in one micro-batch (alignment attention over the batch).

        Raises:
            ValueError: `multiple_of` is above max_micro_batch.
        """
        if multiple_of > max_micro_batch:
            raise ValueError(
                f"max_micro_batch={max_micro_batch} is below attention_group={multiple_of}, whose samples must be in "
                "one micro-batch; raise it"
            )
        share = math.ceil(global_batch / (world_size * multiple_of))
        largest = min(share, max_micro_batch // multiple_of)
        splits = [cls(global_batch, world_size, size * multiple_of) for size in range(largest // 2 + 1, largest + 1)]
        return min(splits, key=lambda split: (split.num_slots, -split.micro_batch))

    def slots(self, update: int, micro_step: int, rank: int) -> list[Slot]:
        """What `rank` sees in the given micro-step of the given update (both from 0)."""
        first = (micro_step * self.world_size + rank) * self.micro_batch
        start = update * self.global_batch
        return [
            Slot(start + slot % self.global_batch, float(slot < self.global_batch))
            for slot in range(first, first + self.micro_batch)
        ]

from __future__ import annotations

from collections import Counter

import pytest

from pipelines.training.batch_split import BatchSplit


@pytest.mark.parametrize(
    ("global_batch", "workers", "largest", "micro_batch", "accumulation"),
    [
        (256, 8, 16, 16, 2),  # the paper's batch on 8 GPUs
        (256, 2, 16, 16, 8),  # the paper's own 2 GPUs
        (8, 3, 4, 3, 1),  # one slot too many
        (24, 2, 5, 4, 3),
        (256, 3, 16, 11, 8),  # 264 slots; the only divisor of 86 would be micro-batches of 2
        (7, 1, 1, 1, 7),
        (4, 1, 100, 4, 1),
    ],
)
def test_the_micro_batch_is_large_and_wastes_little(global_batch, workers, largest, micro_batch, accumulation) -> None:
    split = BatchSplit.derive(global_batch, workers, largest)
    assert (split.micro_batch, split.accumulation) == (micro_batch, accumulation)


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("largest", [1, 2, 3, 8])
@pytest.mark.parametrize("global_batch", [7, 8, 12])
def test_every_sample_of_an_update_counts_once_whatever_the_split(
    workers: int, largest: int, global_batch: int
) -> None:
    split = BatchSplit.derive(global_batch, workers, largest)
    assert split.micro_batch <= largest
    for update in (0, 3):
        weights: Counter[int] = Counter()
        for rank in range(workers):
            for micro_step in range(split.accumulation):
                slots = split.slots(update, micro_step, rank)
                assert len(slots) == split.micro_batch
                for sample, weight in slots:
                    weights[sample] += weight
        assert weights == {n: 1 for n in range(update * global_batch, (update + 1) * global_batch)}


def test_the_mean_over_ranks_and_micro_batches_is_the_mean_over_samples() -> None:
    split = BatchSplit.derive(8, 3, 2)
    losses = [float(n * n) for n in range(8)]
    parts = [
        sum(weight * losses[sample] for sample, weight in split.slots(0, step, rank)) * split.loss_scale
        for rank in range(3)
        for step in range(split.accumulation)
    ]
    assert sum(parts) / len(parts) == pytest.approx(sum(losses) / 8)


def test_samples_that_attend_to_each_other_stay_in_one_micro_batch() -> None:
    for workers, largest in ((1, 9), (2, 4), (3, 6), (2, 5)):
        split = BatchSplit.derive(24, workers, largest, multiple_of=4)
        assert split.micro_batch % 4 == 0
        for rank in range(workers):
            for step in range(split.accumulation):
                samples = [slot.sample for slot in split.slots(2, step, rank)]
                for first in range(0, len(samples), 4):
                    group = samples[first : first + 4]
                    assert group[0] % 4 == 0
                    assert group == list(range(group[0], group[0] + 4))
    with pytest.raises(ValueError, match=r"max_micro_batch=3 is below attention_group=4.*raise it"):
        BatchSplit.derive(24, 1, 3, multiple_of=4)

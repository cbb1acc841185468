"""Losses of micro-batches -> losses of updates, by timestep, over ranks; here one rank."""

from __future__ import annotations

import pytest
import torch

from pipelines.training.batch_split import BatchSplit
from pipelines.training.progress import Progress, SmoothedLoss


def test_a_look_gives_the_mean_over_the_global_batch_and_over_tenths_of_the_timesteps(lone_process_group) -> None:
    progress = Progress(BatchSplit(3, 1, 2), num_train_timesteps=1000)
    for losses, timesteps, weights in [
        ([1.0, 2.0], [0, 99], [1, 1]),
        ([6.0, float("nan")], [999, 0], [1, 0]),
        ([4.0, 4.0], [100, 199], [1, 1]),
        ([7.0, 9.0], [999, 0], [1, 0]),
    ]:
        progress.add(torch.tensor(losses), torch.tensor(timesteps), torch.tensor(weights))
    assert progress.num_updates == 2
    look = progress.look()
    assert look.losses == pytest.approx([3.0, 5.0])
    assert look.buckets == pytest.approx(
        {
            "train/loss_by_timestep/000-099": 1.5,
            "train/loss_by_timestep/100-199": 4.0,
            "train/loss_by_timestep/900-999": 6.5,
        }
    )
    assert look.data_wait_share == 0
    assert look.seconds > 0


def test_the_smoothed_loss_is_corrected_for_its_start_and_goes_on_where_it_was() -> None:
    smoothed = SmoothedLoss()
    assert smoothed.add([2.0]) == pytest.approx(2.0)
    assert smoothed.add([2.0, 2.0]) == pytest.approx(2.0)
    resumed = SmoothedLoss(smoothed.total, smoothed.weight)
    assert resumed.add([3.0]) == smoothed.add([3.0])
    assert 2.0 < smoothed.add([]) < 3.0

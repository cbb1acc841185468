"""Lost workers, nodes and drivers, and nodes that say goodbye: training ends with the weights of an undisturbed run.

A shorter storm, with bad storage and tracking besides, is in test_train_outages.py.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from sr_platform.checkpoints import list_checkpoints

NUM_UPDATES = 120
FLAGS = ["--size-px", "32", "--global-batch", "4", "--stage", "align", "--align.num-updates", str(NUM_UPDATES)]
FLAGS += ["--align.warmup-updates", "4", "--log-every-updates", "4", "--checkpoint-every-updates", "8"]
FLAGS += ["--max-failures", "20", "--validation.num-pictures", "1", "--validation.every-updates", "60"]
FLAGS += ["--num-workers", "2"]
# Ray looks for notices every five seconds and training asks as often: it must last longer than that.
DRAIN_FLAGS = ["--align.num-updates", "1500", "--validation.num-pictures", "0", "--log-every-updates", "25"]
DRAIN_FLAGS += ["--min-workers", "1", "--max-failures", "0", "--checkpoint-every-updates", "120"]
DRAIN_FLAGS += ["--keep-checkpoints", "99"]


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_losses_leave_the_weights_of_an_undisturbed_run_bit_for_bit(
    cluster, training, undisturbed, trained_weights, seed: int
) -> None:
    job = training(cluster, FLAGS)
    job.random = np.random.default_rng(seed)
    storm(job, ["worker", "driver", "node", "worker", "node", "worker", "driver", "node", "worker", "driver"])
    assert_bit_equal(job, trained_weights, undisturbed(FLAGS))


def storm(training: Any, kinds: list[str]) -> None:
    """One loss of each kind at a random update, the next one only after training has come further again."""
    training.start()
    reached = 0
    share = NUM_UPDATES // (len(kinds) + 1)
    for kind in kinds:
        training.reach(reached + 1)
        time.sleep(training.random.uniform(0, 0.5))
        reached = max(training.update, reached + int(training.random.integers(1, share)))
        training.kill(kind)
    training.end()


def assert_bit_equal(training: Any, trained_weights: Any, calm: Any) -> None:
    actual, expected = trained_weights(f"{training.out}/models/align"), trained_weights(calm.model_uri)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())
    assert list_checkpoints(training.checkpoints) == [NUM_UPDATES - 8, NUM_UPDATES]


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_node_that_says_goodbye_is_left_with_a_checkpoint_and_training_goes_on_with_fewer_workers(
    cluster, training
) -> None:
    """With no failure allowed, and long before the notice has run out; to the end of training: test_train_elastic."""
    job, every = training(cluster, [*FLAGS, *DRAIN_FLAGS]), 120
    job.start()
    job.reach(every)
    job.drain(job.training_node(), notice_s=600)
    parting = job.parting_update(every)
    job.reach(parting + every)
    assert job.world_size(every) == job.world_size(parting) == 2
    assert job.world_size(job.update) == 1

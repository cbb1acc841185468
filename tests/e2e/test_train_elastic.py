"""Training with fewer workers than wished: it grows when a node comes, and goes on without one that is lost."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sr_platform.checkpoints import list_checkpoints

NUM_UPDATES = 300
FLAGS = ["--size-px", "32", "--global-batch", "4", "--stage", "align", "--align.num-updates", str(NUM_UPDATES)]
FLAGS += ["--align.warmup-updates", "4", "--log-every-updates", "5", "--checkpoint-every-updates", "10"]
FLAGS += ["--keep-checkpoints", "99", "--num-workers", "2", "--validation.num-pictures", "0"]
RESIZE_INTERVAL_S = 60.0
"""After a start Ray Train waits so long before it looks whether more workers have room."""


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_node_that_comes_later_is_trained_on(
    lone_node_cluster, training, undisturbed, trained_weights, learnt_difference
) -> None:
    job = training(lone_node_cluster, [*FLAGS, "--min-workers", "1", "--max-failures", "0"])
    job.start()
    job.reach(20)
    (worker,) = job.workers()
    lone_node_cluster.add_node(num_cpus=1)
    # However fast the machine is: it must not be done before Ray looks.
    worker.suspend()
    time.sleep(RESIZE_INTERVAL_S)
    worker.resume()
    job.end(600)
    change = assert_sizes(job, first=1, last=2)
    assert 20 <= change < NUM_UPDATES
    assert_learnt(job, undisturbed, trained_weights, learnt_difference, FLAGS)


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_node_that_is_lost_is_done_without(
    cluster, training, undisturbed, trained_weights, learnt_difference
) -> None:
    job = training(cluster, [*FLAGS, "--min-workers", "1", "--max-failures", "1"])
    job.start()
    job.reach(40)
    cluster.remove_node(job.training_node(), allow_graceful=False)
    job.end(600)
    change = assert_sizes(job, first=2, last=1)
    assert 40 <= change < NUM_UPDATES
    assert_learnt(job, undisturbed, trained_weights, learnt_difference, FLAGS)


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_node_that_says_goodbye_costs_no_failure_and_no_update(
    cluster, training, undisturbed, trained_weights, learnt_difference
) -> None:
    # Ray looks for notices every five seconds and training asks as often: it must last longer than that.
    last, every = 1500, 250
    flags = [*FLAGS, "--align.num-updates", str(last), "--checkpoint-every-updates", str(every)]
    job = training(cluster, [*flags, "--min-workers", "1", "--max-failures", "0"])
    job.start()
    job.reach(every)
    job.drain(job.training_node(), notice_s=600)
    started_s = time.monotonic()
    job.end(600)
    assert time.monotonic() - started_s < 300
    parting = job.parting_update(every)
    assert list_checkpoints(job.checkpoints) == sorted([parting, *range(every, last + 1, every)])
    assert job.world_size(every) == job.world_size(parting) == 2
    assert job.world_size(last) == 1
    assert_learnt(job, undisturbed, trained_weights, learnt_difference, flags)


def assert_sizes(job: Any, *, first: int, last: int) -> int:
    """The last update of the workers that there were at first; their number changed once."""
    saved = list_checkpoints(job.checkpoints)
    assert saved == list(range(10, NUM_UPDATES + 1, 10))
    sizes = [job.world_size(update) for update in saved]
    assert first in sizes, sizes
    assert last in sizes, sizes
    change = sizes.index(last)
    assert sizes == [first] * change + [last] * (len(sizes) - change)
    print(f"{first} -> {last} workers after update {saved[change - 1]}")
    return saved[change - 1]


def assert_learnt(job: Any, undisturbed: Any, trained_weights: Any, learnt_difference: Any, flags: Any) -> None:
    """What a run on two workers without losses has learnt."""
    actual, expected = trained_weights(f"{job.out}/models/align"), trained_weights(undisturbed(flags).model_uri)
    difference = learnt_difference(actual, expected)
    print(f"differs by {difference:.1e} of what was learnt")
    # Sums are taken in another order on one worker, and AdamW turns rounding noise into whole steps.
    assert difference < 2e-2

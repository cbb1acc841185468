"""The stream of samples is a function of seed and number alone."""

from __future__ import annotations

import numpy as np
import pytest

from sr_platform.errors import InputDataError
from sr_platform.sample_order import SampleOrder

NATURE, FACES, TEXT = np.arange(0, 41), np.arange(41, 48), np.arange(48, 50)
GROUPS = {"nature": NATURE, "faces": FACES, "text": TEXT}


def test_without_a_mixture_every_epoch_visits_every_sample_once_in_another_order() -> None:
    order = SampleOrder(9, 23)
    epochs = [[order.index(epoch * 23 + i) for i in range(23)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[1] == [SampleOrder(9, 23).index(23 + i) for i in range(23)]
    assert epochs[1] != [SampleOrder(10, 23).index(23 + i) for i in range(23)]


def test_the_order_of_a_seed_never_changes() -> None:
    assert [SampleOrder(9, 23).index(n) for n in (0, 1, 2, 22, 23, 24, 10**9)] == [17, 5, 1, 19, 3, 7, 14]
    # Groups without shares leave it as it is.
    assert SampleOrder(9, 23, groups={"nature": np.arange(23)}).index(24) == SampleOrder(9, 23).index(24)
    mixed = SampleOrder(9, 50, groups=GROUPS, mixture={"nature": 0.7, "faces": 0.25, "text": 0.05})
    assert [mixed.index(n) for n in (0, 1, 2, 3, 4, 5, 10**9)] == [37, 3, 45, 48, 38, 19, 18]


@pytest.mark.parametrize("share", [0.125, 0.5, 1 / 3, 0.9])
def test_any_stretch_of_draws_is_within_one_of_the_shares(share: float) -> None:
    mixture = {"nature": 1 - share, "faces": share}
    order = SampleOrder(4, 48, groups={"nature": NATURE, "faces": FACES}, mixture=mixture)
    is_face = np.array([order.index(n) >= 41 for n in range(3000)])
    taken = np.concatenate([[0], np.cumsum(is_face)])
    for length in (1, 8, 37, 400):
        counts = taken[length:] - taken[:-length]
        assert np.abs(counts - share * length).max() < 1


def test_three_groups_keep_their_shares_in_every_stretch() -> None:
    mixture = {"nature": 0.7, "faces": 0.25, "text": 0.05}
    order = SampleOrder(1, 50, groups=GROUPS, mixture=mixture)
    drawn = np.array([order.index(n) for n in range(4000)])
    for name, members in GROUPS.items():
        taken = np.concatenate([[0], np.cumsum(np.isin(drawn, members))])
        assert np.abs(taken[100:] - taken[:-100] - 100 * mixture[name]).max() <= 2


def test_every_sample_of_a_group_comes_once_before_any_comes_again() -> None:
    order = SampleOrder(2, 50, groups=GROUPS, mixture={"nature": 0.2, "faces": 0.4, "text": 0.4})
    drawn = np.array([order.index(n) for n in range(2000)])
    for members in GROUPS.values():
        stream = drawn[np.isin(drawn, members)]
        passes = stream[: len(stream) // len(members) * len(members)].reshape(-1, len(members))
        assert (np.sort(passes) == members).all()
        assert len({tuple(p) for p in passes.tolist()}) > 1


def test_draws_late_in_a_long_run_are_still_exact() -> None:
    order = SampleOrder(2, 48, groups={"nature": NATURE, "faces": FACES}, mixture={"nature": 0.9, "faces": 0.1})
    first = 10**15
    assert sum(order.index(n) >= 41 for n in range(first, first + 1000)) == 100


@pytest.mark.parametrize(
    "mixture",
    [
        {"nature": 0.5, "cats": 0.5},
        {"nature": 1.0},
        {"nature": 0.5, "faces": 0.5, "text": 0.5},
        {"nature": 1.0, "faces": 0.0, "text": 0.0},
    ],
)
def test_shares_that_do_not_fit_the_groups_are_refused(mixture: dict[str, float]) -> None:
    with pytest.raises(
        InputDataError, match=r"mixture: shares are given for 'cats'|mixture: .*'faces', 'nature', 'text'"
    ):
        SampleOrder(0, 50, groups=GROUPS, mixture=mixture)

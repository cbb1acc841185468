"""Pairs depend on (seed, key) alone: not on batching, order or neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from faithdiff.degradation import PASD, degrade
from pipelines.stages.degrade import Degrade, DegradeConfig
from pipelines.stages.sample import read_table, to_table


def test_pairs_do_not_depend_on_batching_or_block_layout(make_crop: Callable[..., Any]) -> None:
    crops = [make_crop(f"k{index}") for index in range(6)]
    whole = read_table(Degrade(DegradeConfig(), seed=3)(to_table(crops)))
    parts = [read_table(Degrade(DegradeConfig(), seed=3)(to_table([crop])))[0] for crop in reversed(crops)]
    assert whole == parts[::-1]
    assert len({row.lq for row in whole}) == 6


def test_the_stage_gives_what_the_function_gives(make_crop: Callable[..., Any]) -> None:
    crop = make_crop("k")
    (row,) = read_table(Degrade(DegradeConfig(), seed=3)(to_table([crop])))
    np.testing.assert_array_equal(row.lq_pixels(), degrade(crop.hq_pixels(), PASD, key="k", seed=3))
    assert row.hq == crop.hq


def test_a_row_with_a_problem_passes_untouched(make_crop: Callable[..., Any]) -> None:
    crop = make_crop(problem="crop too flat: x", hq=b"")
    assert read_table(Degrade(DegradeConfig(), seed=0)(to_table([crop]))) == [crop]


def test_an_unknown_recipe_is_refused_with_what_was_meant() -> None:
    with pytest.raises(
        ValueError, match=r"no recipe 'level_IV'; there are pasd, level_I, level_II, level_III; did you mean"
    ):
        DegradeConfig(recipe="level_IV")

"""Pairs depend on (seed, key, variant) alone: not on batching, order, neighbours or the number of variants."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from faithdiff.degradation import PASD, apply_steps, degrade, load_steps
from pipelines.stages.degrade import Degrade, DegradeConfig
from pipelines.stages.sample import read_table, to_table


def run(crops: list[Any], *, seed: int = 3, **config: Any) -> list[Any]:
    return read_table(Degrade(DegradeConfig(**config), seed=seed)(to_table(crops)))


def test_pairs_do_not_depend_on_batching_or_block_layout(make_crop: Callable[..., Any]) -> None:
    crops = [make_crop(f"k{index}") for index in range(6)]
    whole = run(crops)
    assert whole == [run([crop])[0] for crop in reversed(crops)][::-1]
    assert len({row.lq for row in whole}) == 6


def test_every_variant_is_what_the_function_gives_for_its_number(make_crop: Callable[..., Any]) -> None:
    crop = make_crop("k")
    (row,) = run([crop], variants=3)
    assert row.lq_pixels().shape == (3, crop.height_px // 4, crop.width_px // 4, 3)
    for variant, lq in enumerate(row.lq_pixels()):
        np.testing.assert_array_equal(lq, degrade(crop.hq_pixels(), PASD, key="k", seed=3, variant=variant))
    assert len({lq.tobytes() for lq in row.lq_pixels()}) == 3
    assert run([crop], variants=1)[0].lq == row.lq_pixels()[0].tobytes()
    assert row.hq == crop.hq


def test_kept_parameters_replay_to_the_same_pictures(make_crop: Callable[..., Any]) -> None:
    crop = make_crop("k")
    (row,) = run([crop], variants=2, keep_parameters=True)
    variants = json.loads(row.trace)
    assert len(variants) == 2
    for records, lq in zip(variants, row.lq_pixels(), strict=True):
        np.testing.assert_array_equal(apply_steps(crop.hq_pixels(), load_steps(records)), lq)
    (without,) = run([crop], variants=2)
    assert (without.trace, without.lq) == ("", row.lq)


def test_a_row_with_a_problem_passes_untouched(make_crop: Callable[..., Any]) -> None:
    crop = make_crop(problem="crop too flat: x", hq=b"")
    assert run([crop], keep_parameters=True) == [crop]


def test_workers_need_not_see_a_recipe_file(make_crop: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**PASD.as_dict(), "name": "mine", "final_sinc_probability": 0.0}))
    stage = Degrade(DegradeConfig(recipe=str(path)), seed=3)
    path.unlink()
    sent = pickle.loads(pickle.dumps(stage.__call__))  # noqa: S301 - our own bytes
    crops = to_table([make_crop("k")])
    assert sent(crops).equals(stage(crops))
    assert stage.recipe.name == "mine"


def test_an_unknown_recipe_is_refused_with_what_was_meant() -> None:
    with pytest.raises(
        ValueError, match=r"no recipe 'level_IV'; there are pasd, .*level_III, or give .*; did you mean"
    ):
        DegradeConfig(recipe="level_IV")


def test_a_recipe_file_that_is_wrong_is_refused_with_the_field(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**PASD.as_dict(), "final_sinc_probability": 8}))
    with pytest.raises(ValueError, match=r"mine.yaml: final_sinc_probability is 8; it must be a number from 0 to 1"):
        DegradeConfig(recipe=str(path))

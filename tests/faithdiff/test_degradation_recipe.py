"""Recipes as data: what ships, what a user's file may say, and how a wrong one is refused."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from faithdiff.degradation import D_LEVELS, PASD, RECIPES, Recipe, draw_parameters, find_recipe
from faithdiff.degradation.recipe import recipe_from
from faithdiff.errors import InputError


def written(values: Any, path: Path) -> str:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def changed(place: str, value: Any) -> dict[str, Any]:
    """PASD's values with the one at `place` ("first.blur.sigma_px") replaced, or removed for `...`."""
    values = copy.deepcopy(PASD.as_dict())
    *parts, name = place.split(".")
    target = values
    for part in parts:
        target = target[part]
    if value is ...:
        del target[name]
    else:
        target[name] = value
    return values


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=str)
def test_a_recipe_survives_its_own_dump(recipe: Recipe, tmp_path: Path) -> None:
    dump = recipe.as_dict()
    assert recipe_from(json.loads(json.dumps(dump)), where="test") == recipe
    again = find_recipe(written(dump, tmp_path / "again.yaml"))
    assert again == pickle.loads(pickle.dumps(recipe))  # noqa: S301 - our own bytes
    assert draw_parameters(again, key="k", seed=0) == draw_parameters(recipe, key="k", seed=0)


def test_what_ships_is_found_by_name() -> None:
    assert list(RECIPES) == ["pasd", "level_I", "level_II", "level_III"]
    assert all(find_recipe(name) is recipe and recipe.name == name for name, recipe in RECIPES.items())
    assert [recipe.second is None for recipe in D_LEVELS.values()] == [True, True, False]


def test_the_same_content_is_dumped_alike_however_it_was_written() -> None:
    values = changed("first.noise.gaussian_sigma", [1.0, 15.0])
    values["first"]["blur"]["shapes"] = dict(reversed(values["first"]["blur"]["shapes"].items()))
    recipe = recipe_from(values, where="test")
    assert json.dumps(recipe.as_dict()) == json.dumps(PASD.as_dict())
    assert draw_parameters(recipe, key="k", seed=0) == draw_parameters(PASD, key="k", seed=0)


def test_every_value_of_a_recipe_is_in_its_dump() -> None:
    assert PASD.as_dict()["second"]["blur"] == {
        "probability": 0.5,
        "sizes_px": [7, 9, 11, 13, 15, 17, 19, 21],
        "sinc_probability": 0.1,
        "shapes": {
            "iso": 0.45,
            "aniso": 0.25,
            "generalized_iso": 0.12,
            "generalized_aniso": 0.03,
            "plateau_iso": 0.12,
            "plateau_aniso": 0.03,
        },
        "sigma_px": [0.2, 1.5],
        "rotation_rad": [-3.141592653589793, 3.141592653589793],
        "beta_generalized": [0.5, 4.0],
        "beta_plateau": [1.0, 2.0],
    }


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("first.blur.sigma_px", [3.0, 0.2], r"first: blur: sigma_px is .*; its low end is above its high end; swap"),
        ("first.blur.sigma_px", [0.0, 3.0], r"sigma_px is .*; it must lie within 0.05 to 100"),
        ("first.blur.sigma_px", 3.0, r"sigma_px is 3.0; it must be two numbers"),
        ("first.blur.sigma_px", [1, "2"], r"sigma_px is \[1, '2'\]; it must be two numbers"),
        ("first.blur.sigma_px", [1, float("nan")], r"sigma_px is .*; it must be two numbers"),
        ("first.blur.probability", 1.5, r"first: blur: probability is 1.5; it must be a number from 0 to 1"),
        ("first.blur.probability", True, r"probability is True; it must be a number"),
        ("second.blur.sizes_px", [7, 8], r"second: blur: sizes_px is \[7, 8\]; it must be a list of odd"),
        ("second.blur.sizes_px", [], r"sizes_px is \[\]"),
        ("second.blur.sizes_px", [65], r"odd whole numbers, 1 to 63"),
        ("first.blur.shapes", {"izo": 1.0}, r"no shape 'izo'; there are iso, .*; did you mean 'iso'"),
        ("first.blur.shapes", {"iso": -1.0}, r"weight of iso is -1.0"),
        ("first.blur.shapes", {"iso": 0}, r"every weight is 0"),
        ("first.blur.shapes", {}, r"shapes is \{\}; it must map"),
        ("first.blur.beta_plateau", [1.5, 2.0], r"beta_plateau is .*; it must hold 1"),
        ("first.resize.factor", [0.3, 0.9], r"first: resize: factor is .*; it must hold 1"),
        ("first.resize.up_probability", 0.4, r"up_probability 0.4 and down_probability 0.7 sum to more than 1"),
        ("second.noise.gray_probability", -0.1, r"gray_probability is -0.1"),
        ("second.noise.poisson_scale", [-1, 2], r"second: noise: poisson_scale is .*; it must lie within 0 to 100"),
        ("first.jpeg_quality", [0, 95], r"first: jpeg_quality is .*; it must lie within 1 to 100"),
        ("first.blur.sigma", [1, 2], r"first: blur: no field 'sigma'; there are .*; did you mean 'sigma_px'"),
        ("first.noise.gaussian_sigma", ..., r"first: noise: gaussian_sigma missing; add it"),
        ("first.noise", None, r"first: noise: got None; it must be a mapping of gaussian_sigma"),
        ("first", ..., r"test: first missing"),
        ("second", None, r"final_sinc_probability is above 0 without a second order"),
        ("name", "", r"name is ''; it must be printable text"),
        ("name", 3, r"name is 3; it must be printable text"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_with_its_place(place: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        recipe_from(changed(place, value), where="test")
    assert str(refused.value).startswith("test: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not YAML"), ("- 1", r"got \[1\]; it must be a mapping"), ("", "got None; it must be a mapping")],
)
def test_a_file_that_holds_no_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as refused:
        find_recipe(written(text, tmp_path / "mine.yaml"))
    assert "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.yaml: cannot be read: No such file"):
        find_recipe(str(tmp_path / "none.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(InputError, match=r"latin.yaml: is not YAML"):
        find_recipe(str(tmp_path / "latin.yaml"))


def test_an_unknown_name_is_refused_with_what_was_meant() -> None:
    with pytest.raises(
        InputError, match=r"no recipe 'level_2'; there are pasd, .*, or give a .yaml file; did you mean"
    ):
        find_recipe("level_2")

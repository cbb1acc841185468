"""A protocol's digest changes with all that changes a number, and with nothing else; what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.evaluation.protocol import EvaluateConfig, differences, protocol_digest, resolved_protocol
from sr_platform.config import RECIPES_PATH, load_config, read_recipe, validate
from sr_platform.errors import ConfigError

PROTOCOL: dict[str, Any] = {
    "name": "t",
    "dataset": "photographs",
    "data": "pictures",
    "degradation": "level_II",
    "metrics": [{"name": "psnr"}, {"name": "text_recall"}, {"name": "lpips"}],
}
SHIPPED = sorted(path.name for path in RECIPES_PATH.glob("protocol_*.yaml"))


def config(**changes: Any) -> EvaluateConfig:
    return validate(EvaluateConfig, {**PROTOCOL, **changes}, where="test")


def resolved(cfg: EvaluateConfig, **changes: Any) -> dict[str, Any]:
    about: dict[str, Any] = {
        "data_digest": "sha256:d",
        "num_pictures": 3,
        "versions": {"rapidocr": "3.1"},
        "weights": {},
    }
    return resolved_protocol(cfg, **{**about, **changes})


def digest(cfg: EvaluateConfig, **changes: Any) -> str:
    return protocol_digest(resolved(cfg, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"degradation": "level_III"},
        {"degradation_seed": 1},
        {"dataset": "other"},
        {"restoration": {"num_inference_steps": 10}},
        {"restoration": {"tile_stride_px": 512}},
        {"restoration": {"precision": "bf16"}},
        {"restoration": {"color_fix": "wavelet"}},
        {"pictures": {"crop_px": 128}},
        {"pictures": {"captions": "none"}},
        {"metrics": [{"name": "psnr", "channel": "y"}, {"name": "text_recall"}, {"name": "lpips"}]},
        {"metrics": [{"name": "psnr", "border_px": 4}, {"name": "text_recall"}, {"name": "lpips"}]},
        {"text": {"unit": "line"}},
        {"libraries": {"pyiqa": "0.1.13"}},
    ],
)
def test_whatever_changes_a_number_changes_the_digest_and_is_named(changes: dict[str, Any]) -> None:
    assert digest(config(**changes)) != digest(config())
    (name,) = changes
    assert any(text.startswith((name, "level", "degradation_recipe")) for text in found(config(**changes)))


def found(cfg: EvaluateConfig) -> list[str]:
    return differences(resolved(config()), resolved(cfg))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "nano"},
        {"report": "elsewhere", "cache": "there", "data": "moved"},
        {"method": ["SeeSR=outputs"], "workers": {"restorers": 4, "num_cpus": 0.5}},
        {"experiment": "another", "dry_run": True},
    ],
)
def test_where_and_by_whom_it_is_evaluated_does_not(changes: dict[str, Any]) -> None:
    assert digest(config(**changes)) == digest(config())
    assert found(config(**changes)) == []


def test_pictures_weights_and_versions_are_part_of_it() -> None:
    ours = digest(config())
    assert digest(config(), data_digest="sha256:e") != ours
    assert digest(config(), weights={"lpips": "abc"}) != ours
    assert digest(config(), versions={"rapidocr": "4.0"}) != ours
    pinned = config(libraries={"rapidocr": "3.1", "pyiqa": "0.1.16"})
    assert digest(pinned, versions={}) == digest(pinned, versions={"rapidocr": "4.0"}), "pinned, whatever is installed"


def test_the_header_says_what_the_recipe_leaves_open() -> None:
    protocol = resolved(config())
    assert protocol["level"] == "II"
    assert protocol["degradation_recipe"]["name"] == "level_II"
    assert protocol["metrics"]["psnr"] == {"version": 1, "channel": "rgb", "border_px": 0}
    assert protocol["libraries"] == {"pyiqa": "", "rapidocr": "3.1"}
    assert {"model", "data", "report"}.isdisjoint(protocol)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": [{"name": "pnsr"}]}, "no metric 'pnsr'; did you mean 'psnr'"),
        ({"metrics": [{"name": "zzzzzz"}]}, "no metric 'zzzzzz'; there are psnr"),
        ({"metrics": []}, "metrics: is empty"),
        ({"metrics": [{"name": "psnr"}, {"name": "psnr", "channel": "y"}]}, "psnr is there twice"),
        ({"metrics": [{"name": "psnr", "channel": "Y"}]}, "channel"),
        ({"degradation": "level_IV"}, "no recipe 'level_IV'"),
        ({"degradation": ""}, "hq pictures need one"),
        ({"pictures": {"kind": "lq"}}, "others must have none"),
        ({"pictures": {"kind": "lq"}, "degradation": ""}, "psnr needs hq pictures, and pictures.kind=lq has none"),
        ({"pictures": {"kind": "pairs"}, "degradation": "", "metrics": [{"name": "degrade_again_psnr"}]}, "is known"),
        ({"pictures": {"crop_px": 130}}, "crop_px=130: give a multiple of 4"),
        ({"restoration": {"scale": 2}}, "degraded pictures are 4 times smaller"),
        ({"restoration": {"tile_px": 100}}, "tile_px is 100; it must be a multiple of 8"),
        ({"method": ["SeeSR"]}, "write name=folder"),
        ({"method": ["../x=outputs"]}, "write name=folder"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        config(**changes)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": ["ours=x"]}, "ours is ours; give another name"),
        ({"method": ["a=x", "a=y"]}, "a is there twice"),
        ({"weights": ["musiq=x"]}, "musiq: weights can be given for lpips, detector, recogniser"),
    ],
)
def test_names_of_methods_and_weights_are_checked(given: dict[str, Any], message: str) -> None:
    cfg = config(**given)
    with pytest.raises(ConfigError, match=message):
        assert cfg.methods == cfg.weight_files


def test_flags_may_be_given_once_per_method() -> None:
    argv = ["protocol_table1_nano.yaml", "--data", "d", "--method", "a=x", "--method", "b=y", "--weights", "lpips=w"]
    cfg = load_config(EvaluateConfig, argv, job="evaluate")
    assert cfg.methods == {"a": "x", "b": "y"}
    assert cfg.weight_files == {"lpips": "w"}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_protocol_is_valid(name: str) -> None:
    cfg = validate(EvaluateConfig, {**read_recipe(name, job="test"), "data": "d"}, where=name)
    assert name == f"protocol_{cfg.name}.yaml"
    assert cfg.table in {"", *"123456"}


def test_every_table_of_the_paper_has_a_protocol() -> None:
    assert {f"protocol_table{number}.yaml" for number in range(1, 7)} <= set(SHIPPED)

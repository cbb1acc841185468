"""The sweep prints seams, work and seconds of every stride, and picks the largest that is good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from skimage import data

from pipelines.evaluation.stride_sweep import StrideResult, SweepConfig, largest_good, main, strides_of, sweep, table
from sr_platform.config import validate
from sr_platform.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    Image.fromarray(data.chelsea()[100:228, 100:260]).save(folder / "cat.png")
    return folder


def config(folder: Path, **changes: Any) -> SweepConfig:
    values: dict[str, Any] = {
        **{"name": "t", "dataset": "d", "data": str(folder), "degradation": "level_II", "model": "nano"},
        **{"metrics": [{"name": "seam"}], "restoration": {"num_inference_steps": 1, "tile_px": 96}},
    }
    return validate(SweepConfig, {**values, **changes}, where="test")


def test_smaller_strides_are_more_work_and_seams_are_measured_both_ways(folder: Path) -> None:
    results = sweep(config(folder, strides_px=[96, 48]))
    assert [r.stride_px for r in results] == [48, 96]
    assert [r.num_tiles for r in results] == [6, 4]
    assert results[0].work == pytest.approx(6 * 96 * 96 / (128 * 160))
    assert all(r.seam_levels is not None and r.whole_levels is not None and r.seconds > 0 for r in results)
    text = "\n".join(table(results))
    assert "against whole" in text
    assert " 48 px" in text


def test_without_room_for_the_whole_the_picture_alone_is_judged(folder: Path) -> None:
    (result,) = sweep(config(folder, strides_px=[96], whole_up_to_px=64))
    assert result.whole_levels is None
    assert result.judged_levels == result.seam_levels


def result(stride_px: int, seam: float | None, whole: float | None) -> StrideResult:
    return StrideResult(stride_px, 4, 1.5, seam, whole, 2.0)


def test_the_largest_good_stride_is_picked_by_what_hides_nothing() -> None:
    results = [result(32, 0.1, 0.1), result(64, 0.2, 0.4), result(96, 0.1, 0.9), result(128, None, None)]
    assert largest_good(results, 0.5) == results[1]
    assert largest_good(results, 0.05) is None
    assert largest_good([result(96, 0.1, None)], 0.5) is not None


def test_default_strides_are_eighths_of_the_tile(folder: Path) -> None:
    assert strides_of(config(folder, restoration={"tile_px": 1024})) == [384, 512, 640, 768, 896, 1024]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides_px": [100]}, "strides_px: got 100; a stride is a multiple of 8 up to tile_px=96"),
        ({"strides_px": [104]}, "strides_px: got 104"),
        ({"model": ""}, "model: required, and missing"),
        ({"restoration": {"tile_px": 512}}, "all 1 pictures fit into one tile of 512 px"),
    ],
)
def test_what_cannot_be_swept_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(config(folder, **changes))


def test_the_command_prints_the_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["protocol_table1_nano.yaml", "--model", "nano", "--data", str(folder), "--strides-px", "64"]
    main([*argv, "--restoration.num-inference-steps", "1", "--max-seam-levels", "255", "--whole-up-to-px", "0"])
    assert "largest stride below 255 grey levels: 64 px" in capsys.readouterr().out

"""Smooth blends have no seam, a step of one grey level is one, and texture is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import data

from faithdiff.errors import InputError
from faithdiff.seams import Borders, seam_against_whole, seam_score, tile_borders
from faithdiff.tiling import plan_tiles

BORDERS = Borders(rows=(96, 192), columns=(128, 256))
HEIGHT_PX, WIDTH_PX = 288, 448


def picture(plane: np.ndarray) -> np.ndarray:
    return np.repeat(np.round(np.broadcast_to(plane, (HEIGHT_PX, WIDTH_PX)))[..., None], 3, axis=2).astype(np.uint8)


def with_seam(pixels: np.ndarray, levels: int = 1) -> np.ndarray:
    """Everything to the right of the first border is lighter."""
    lighter = pixels.astype(int)
    lighter[:, BORDERS.columns[0] :] += levels
    return np.clip(lighter, 0, 255).astype(np.uint8)


def waves() -> np.ndarray:
    y, x = np.mgrid[:HEIGHT_PX, :WIDTH_PX]
    return picture(128 + 60 * np.sin(x / 70) * np.cos(y / 50))


@pytest.mark.parametrize("slope", [0.0, 0.02, 0.1, 0.25, 0.37, 0.5])
def test_a_ramp_has_no_seam_and_a_step_of_one_grey_level_is_one(slope: float) -> None:
    rows, columns = np.arange(HEIGHT_PX)[:, None], np.arange(WIDTH_PX)
    ramp = picture(20 + columns * slope + rows * 0.13)
    assert seam_score(ramp, BORDERS).worst_levels < 0.35
    assert seam_score(with_seam(ramp), BORDERS).worst_levels == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("slope", [0.02, 0.1, 0.25, 0.37, 0.5])
def test_a_ramp_whose_rounding_makes_steps_of_its_own_has_no_seam_either(slope: float) -> None:
    ramp = picture(20 + np.arange(WIDTH_PX) * slope)
    assert seam_score(ramp, BORDERS).worst_levels < 0.35
    assert seam_score(with_seam(ramp, 2), BORDERS).worst_levels > 1


def test_smooth_waves_have_no_seam_and_one_grey_level_is_measured_as_such() -> None:
    assert seam_score(waves(), BORDERS).worst_levels < 0.1
    assert seam_score(waves(), BORDERS).ratio < 2
    for levels in (1, 2, 5):
        assert seam_score(with_seam(waves(), levels), BORDERS).worst_levels == pytest.approx(levels, abs=0.15)
    assert seam_score(with_seam(waves()), BORDERS).ratio > 20


def test_rows_count_as_columns_do() -> None:
    turned = Borders(rows=BORDERS.columns, columns=BORDERS.rows)
    spoilt = with_seam(waves())
    flipped = seam_score(spoilt.transpose(1, 0, 2), turned)
    assert flipped.levels == pytest.approx(seam_score(spoilt, BORDERS).levels)


def test_texture_is_no_seam_and_hides_a_faint_one_but_not_from_the_whole_picture() -> None:
    cat = data.chelsea()[:HEIGHT_PX, :WIDTH_PX]
    assert seam_score(cat, BORDERS).worst_levels < 1
    assert seam_score(with_seam(cat, 24), BORDERS).worst_levels > 10
    assert seam_against_whole(cat, cat, BORDERS).worst_levels == 0
    assert seam_against_whole(with_seam(cat), cat, BORDERS).worst_levels == pytest.approx(1, abs=0.05)


def test_a_blend_of_two_tiles_is_smooth_where_weights_fall_and_a_seam_where_they_are_cut() -> None:
    plan = plan_tiles((36, 56), (36, 32), (36, 24))
    light = torch.tensor([100.0, 106.0]).view(2, 1, 1, 1).expand(2, 1, 36, 32)
    blended = plan.blend(light)[0, 0].numpy().repeat(8, axis=0).repeat(8, axis=1)
    smooth = np.asarray(torch.nn.functional.avg_pool2d(torch.tensor(blended)[None, None], 17, 1, 8)[0, 0])
    cut = np.where(np.arange(WIDTH_PX) < 24 * 8, 100.0, 106.0)
    borders = tile_borders(plan)
    assert borders == Borders(rows=(), columns=(192, 256))
    assert seam_score(picture(smooth), borders).worst_levels < 0.6
    assert seam_score(picture(cut), borders).worst_levels > 5


def test_borders_are_where_tiles_begin_or_end_inside_the_canvas() -> None:
    assert tile_borders(plan_tiles((16, 16), (16, 16), (8, 8))) == Borders((), ())
    assert tile_borders(plan_tiles((16, 24), (16, 16), (8, 8))) == Borders((), (64, 128))


def test_without_borders_or_without_elsewhere_there_is_no_score() -> None:
    with pytest.raises(InputError, match="no tile border in 448x288 px"):
        seam_score(waves(), Borders((), ()))
    with pytest.raises(InputError, match="nothing farther than 8 px"):
        seam_score(waves()[:64, :64], Borders(tuple(range(8, 64, 8)), tuple(range(8, 64, 8))))
    with pytest.raises(InputError, match="the tiled picture is"):
        seam_against_whole(waves(), waves()[:64], BORDERS)

"""Colours are those of photographs: mostly muted, lightness varies most, and their names are what one sees."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.synthetic.colours import colour_names, contrast, draw_palette, ramp, to_lab


def test_lightness_varies_more_than_chroma_and_vivid_colours_are_rare() -> None:
    lab = np.concatenate([to_lab(draw_palette(np.random.default_rng(seed), 9)) for seed in range(300)])
    lightness, green_red, blue_yellow = lab.std(axis=0)
    assert 15 < lightness < 30
    assert green_red < blue_yellow < lightness
    assert np.mean(np.hypot(lab[:, 1], lab[:, 2]) > 60) < 0.05
    assert np.corrcoef(lab[:, 1], lab[:, 2])[0, 1] > 0.2


def test_a_ramp_goes_from_dark_to_light() -> None:
    for seed in range(20):
        steps = to_lab(ramp(np.random.default_rng(seed)))[:, 0]
        assert steps[-1] - steps[0] > 25
        assert np.mean(np.diff(steps) >= -0.5) > 0.9


def test_colours_are_named_as_one_sees_them() -> None:
    assert colour_names(np.array([[0.9, 0.1, 0.1], [0.9, 0.1, 0.1], [1.0, 1.0, 1.0]])) == "red and white"
    assert colour_names(np.array([[0.1, 0.1, 0.4]]), 1) == "dark blue"


def test_contrast_is_that_of_wcag() -> None:
    black, white = np.zeros(3), np.ones(3)
    assert contrast(black, white) == pytest.approx(21)
    assert contrast(white, black) == pytest.approx(21)
    assert contrast(np.full(3, 0x77 / 255), white) == pytest.approx(4.48, abs=0.01)

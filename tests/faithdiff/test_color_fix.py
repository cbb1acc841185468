"""Colour transfer against the released code's tensors, and what a user expects of it."""

from __future__ import annotations

import numpy as np
import pytest

from faithdiff.color_fix import adain, color_fix, wavelet
from faithdiff.errors import InputError


@pytest.fixture(scope="module")
def case(golden):
    return golden("case05_color_fix")


def planes(picture):
    return picture.permute(2, 0, 1).float() / 255


@pytest.mark.parametrize(("method", "function"), [("adain", adain), ("wavelet", wavelet)])
def test_floats_equal_the_released_ones(case, method, function):
    actual = function(planes(case["a_content_u8"]), planes(case["a_style_u8"]))
    assert case.max_error(f"a_{method}_float", actual) <= 1e-6


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_truncated_bytes_are_the_released_ones(case, method):
    fixed = color_fix(case["a_content_u8"].numpy(), case["a_style_u8"].numpy(), method=method, rounding="truncate")
    assert np.array_equal(fixed, case[f"a_{method}_u8"].numpy())


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_rounded_bytes_are_the_released_ones_or_one_above(case, method):
    fixed = color_fix(case["a_content_u8"].numpy(), case["a_style_u8"].numpy(), method=method)
    difference = fixed.astype(int) - case[f"a_{method}_u8"].numpy()
    assert set(np.unique(difference)) == {0, 1}


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


@pytest.mark.parametrize("method", ["adain", "wavelet", "none"])
def test_a_picture_with_its_own_colours_stays_as_it_is(noise, method):
    assert np.array_equal(color_fix(noise, noise, method=method), noise)


def test_adain_gives_the_mean_and_spread_of_the_reference():
    generator = np.random.default_rng(1)
    restored = generator.uniform(80, 120, (64, 64, 3)).astype(np.uint8)
    reference = generator.uniform(60, 180, (64, 64, 3)).astype(np.uint8)
    fixed = color_fix(restored, reference, method="adain").astype(float)
    np.testing.assert_allclose(fixed.mean((0, 1)), reference.mean((0, 1)), atol=0.5)
    np.testing.assert_allclose(fixed.std((0, 1)), reference.std((0, 1)), atol=0.5)


def test_wavelet_takes_a_colour_cast_off_and_keeps_the_detail(noise):
    restored = noise // 2 + 60
    cast = restored + np.array([20, 0, 10], dtype=np.uint8)
    assert np.abs(color_fix(cast, restored, method="wavelet").astype(int) - restored).max() <= 1


@pytest.mark.parametrize("method", ["adain", "wavelet"])
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 9, 3), (70, 3, 3)])
@pytest.mark.parametrize("rounding", ["round", "truncate"])
def test_tiny_pictures_work(method, shape, rounding):
    restored, reference = np.full(shape, 100, np.uint8), np.full(shape, 150, np.uint8)
    fixed = color_fix(restored, reference, method=method, rounding=rounding)
    assert fixed.shape == shape
    assert np.abs(fixed.astype(int) - 150).max() <= 1


def test_the_given_pictures_are_not_changed(noise):
    reference = 255 - noise
    before = noise.copy(), reference.copy()
    color_fix(noise, reference, method="wavelet")
    color_fix(noise, reference, method="adain")
    assert np.array_equal(noise, before[0])
    assert np.array_equal(reference, before[1])


def test_pictures_of_different_sizes_are_refused_with_both_sizes(noise):
    with pytest.raises(InputError, match=r"\(40, 56, 3\).*\(40, 55, 3\).*resize"):
        color_fix(noise, noise[:, 1:])


def test_unknown_settings_are_refused_with_what_is_allowed(noise):
    with pytest.raises(InputError, match=r"'hsv'.*\"adain\", \"wavelet\" or \"none\""):
        color_fix(noise, noise, method="hsv")
    with pytest.raises(InputError, match="'floor'"):
        color_fix(noise, noise, rounding="floor")

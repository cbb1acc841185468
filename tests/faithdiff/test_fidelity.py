"""PSNR and SSIM equal scikit-image's in every channel and border; hand-made pictures have the values one works out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image
from skimage import color, data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from faithdiff.degradation import degrade
from faithdiff.errors import InputError
from faithdiff.fidelity import HIGHEST_DB, Channel, color_drift, degrade_again_db, planes, psnr_db, ssim


def flat(level: int, height_px: int = 24, width_px: int = 32) -> np.ndarray:
    return np.full((height_px, width_px, 3), level, np.uint8)


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """A photograph and a noisy, darker one."""
    hq = data.chelsea()[:160, :224]
    noise = np.random.default_rng(0).normal(-3, 9, hq.shape)
    return np.clip(hq + noise, 0, 255).astype(np.uint8), hq


def plane_of_scikit_image(picture: np.ndarray, channel: Channel) -> np.ndarray:
    if channel == "rgb":
        return picture.astype(np.float64)
    if channel == "y":
        return color.rgb2ycbcr(picture)[..., :1]
    return np.round(color.rgb2yiq(picture)[..., :1] * 255)


@pytest.mark.parametrize("border_px", [0, 4])
@pytest.mark.parametrize("channel", ["rgb", "y", "luma"])
def test_psnr_and_ssim_equal_those_of_scikit_image(pair, channel: Channel, border_px: int) -> None:
    restored, hq = pair
    inside = slice(border_px, -border_px or None)
    a, b = (plane_of_scikit_image(picture[inside, inside], channel) for picture in pair)
    assert psnr_db(restored, hq, channel=channel, border_px=border_px) == pytest.approx(
        peak_signal_noise_ratio(b, a, data_range=255), abs=1e-4
    )
    expected = structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2, data_range=255
    )
    assert ssim(restored, hq, channel=channel, border_px=border_px) == pytest.approx(expected, abs=1e-5)


def test_one_grey_level_everywhere_is_48_db() -> None:
    assert psnr_db(flat(100), flat(101)) == pytest.approx(20 * math.log10(255))
    assert psnr_db(flat(100), flat(101), channel="luma") == pytest.approx(20 * math.log10(255))
    # Y runs from 16 to 235: a grey level is 219/255 of one.
    assert psnr_db(flat(100), flat(101), channel="y") == pytest.approx(20 * math.log10(255 * 255 / 219))
    assert psnr_db(flat(7), flat(7)) == HIGHEST_DB
    assert psnr_db(flat(0), flat(255)) == pytest.approx(0, abs=1e-9)


def test_a_border_hides_what_lies_in_it() -> None:
    spoilt = flat(100)
    spoilt[:4] = spoilt[-4:] = 0
    assert psnr_db(spoilt, flat(100)) < 15
    assert psnr_db(spoilt, flat(100), border_px=4) == HIGHEST_DB
    assert psnr_db(spoilt, flat(100), border_px=3) < 20
    assert ssim(spoilt, flat(100), border_px=4) == pytest.approx(1)


def test_ssim_of_flat_pictures_is_its_luminance_term() -> None:
    a, b, c1 = 100.0, 120.0, (0.01 * 255) ** 2
    assert ssim(flat(100), flat(120)) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))


def test_only_clipping_hides_a_negative() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    assert ssim(picture, 255 - picture) < -0.5
    assert ssim(picture, 255 - picture, clip_contrast=True) == pytest.approx(0, abs=1e-3)


def test_white_and_black_have_the_levels_of_their_standards() -> None:
    black_and_white = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    assert planes(black_and_white, "y").ravel().tolist() == pytest.approx([16, 235])
    assert planes(black_and_white, "luma").ravel().tolist() == [0, 255]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"border_px": 12}, "a border of 12 px leaves nothing of 32x24 px"),
        ({"border_px": 8}, "ssim of 16x8 px inside a border of 8 px; it needs 11 px"),
        ({"channel": "Y"}, "got the channel 'Y'; there are rgb, y, luma"),
    ],
)
def test_what_cannot_be_computed_is_refused(arguments, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ssim(flat(1), flat(2), **arguments)


def test_two_sizes_are_refused_by_both_names() -> None:
    with pytest.raises(InputError, match="a picture of 32x24 px and a reference of 24x32 px"):
        psnr_db(flat(1), flat(1, 32, 24))


def test_the_hq_picture_is_consistent_with_its_own_degradation_and_another_is_not() -> None:
    hq = data.chelsea()[:96, :96]
    lq = degrade(hq, "level_III", key="chelsea", seed=3)
    assert degrade_again_db(hq, lq, "level_III", key="chelsea", seed=3) == HIGHEST_DB
    softer = np.asarray(Image.fromarray(hq).reduce(8).resize((96, 96)))
    other = np.rot90(hq).copy()
    scores = [degrade_again_db(p, lq, "level_III", key="chelsea", seed=3) for p in (softer, other)]
    assert HIGHEST_DB > scores[0] > scores[1]


def test_color_drift_is_of_colours_not_of_detail() -> None:
    hq = data.chelsea()[:96, :96]
    lq = np.asarray(Image.fromarray(hq).resize((24, 24), Image.Resampling.BOX))
    assert color_drift(hq, lq) == 0
    noisy = np.clip(hq + np.random.default_rng(0).normal(0, 20, hq.shape), 0, 255).astype(np.uint8)
    red = np.clip(hq.astype(int) + np.array([20, 0, 0]), 0, 255).astype(np.uint8)
    assert color_drift(noisy, lq) < 2
    assert color_drift(red, lq) > 5
    white, grey = np.full((8, 8, 3), 255, np.uint8), np.full((8, 8, 3), 119, np.uint8)
    assert color_drift(white, grey) == pytest.approx(50, abs=0.1), "119 of sRGB has the lightness 50"

"""How close a picture is to its reference and to its input, computed here and without weights.

    psnr_db(restored, hq, channel="y", border_px=4)     -> 27.4
    ssim(restored, hq, channel="luma")                  -> 0.81
    degrade_again_db(restored, lq, "level_II", key="0801", seed=0)
    color_drift(restored, lq)                           -> 1.2, CIE 1976 colour difference

Pictures are uint8 RGB [H, W, 3]. Published tables differ by decibels in what they call PSNR; here it is said:

    rgb     all three channels
    y       Y of BT.601 for 16..235, not rounded: what Matlab and the super-resolution literature call the Y channel
    luma    Y of YIQ, 0..255, rounded: what pyiqa computes SSIM on
"""

from __future__ import annotations

from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import correlate1d

from faithdiff.degradation import degrade
from faithdiff.degradation.recipe import Recipe
from faithdiff.errors import InputError

Channel = Literal["rgb", "y", "luma"]
Picture = NDArray[np.uint8]
Planes = NDArray[np.float64]

HIGHEST_DB = 100.0
"""PSNR of equal pictures, where the formula has no value; about what one grey level in 150 pixels gives."""
_PEAK = 255.0
_WINDOW_PX, _WINDOW_SIGMA_PX = 11, 1.5
_C1, _C2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
_DRIFT_SIGMA_PX = 4.0
_RGB_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])


def planes(picture: Picture, channel: Channel) -> Planes:
    """float64 [H, W, 3] for rgb, [H, W, 1] for y and luma, in grey levels. Raises InputError for another channel."""
    rgb = picture.astype(np.float64)
    if channel == "rgb":
        return rgb
    if channel == "y":
        return np.asarray(rgb @ np.array([[65.481], [128.553], [24.966]]) / _PEAK + 16.0)
    if channel == "luma":
        return np.round(rgb @ np.array([[0.299], [0.587], [0.114]]))
    raise InputError(f"metric: got the channel {channel!r}; there are {', '.join(get_args(Channel))}")


def psnr_db(picture: Picture, reference: Picture, *, channel: Channel = "rgb", border_px: int = 0) -> float:
    """Peak signal-to-noise ratio over 255, of all values outside the border; at most HIGHEST_DB.

    Raises:
        InputError: the pictures differ in size, or nothing is left inside the border.
    """
    a, b = _compared(picture, reference, channel, border_px)
    mse = float(np.mean((a - b) ** 2))
    return HIGHEST_DB if mse == 0 else min(HIGHEST_DB, 10 * float(np.log10(_PEAK**2 / mse)))


def ssim(
    picture: Picture,
    reference: Picture,
    *,
    channel: Channel = "rgb",
    border_px: int = 0,
    clip_contrast: bool = False,
) -> float:
    """Mean structural similarity: Gaussian window of 11 px and sigma 1.5, whole windows only, mean over channels.

    `clip_contrast` counts a negative product of contrast and structure as 0, as pyiqa does.

    Source: Wang, Bovik, Sheikh, Simoncelli 2004, equation 13.

    Raises:
        InputError: the pictures differ in size, or are smaller than the window inside the border.
    """
    a, b = _compared(picture, reference, channel, border_px)
    if min(a.shape[:2]) < _WINDOW_PX:
        raise InputError(
            f"metric: ssim of {a.shape[1]}x{a.shape[0]} px inside a border of {border_px} px; it needs {_WINDOW_PX} px"
        )
    mean_a, mean_b = _windowed(a), _windowed(b)
    var_a, var_b = _windowed(a * a) - mean_a**2, _windowed(b * b) - mean_b**2
    covariance = _windowed(a * b) - mean_a * mean_b
    contrast = (2 * covariance + _C2) / (var_a + var_b + _C2)
    if clip_contrast:
        contrast = np.maximum(contrast, 0.0)
    return float(np.mean((2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1) * contrast))


def degrade_again_db(restored: Picture, lq: Picture, recipe: Recipe | str, *, key: str, seed: int) -> float:
    """PSNR of the input and the restored picture after the very degradation that made the input: kernels, noise, JPEG.

    The hq picture itself has HIGHEST_DB. Raises as `faithdiff.degradation.degrade` does.
    """
    return psnr_db(degrade(restored, recipe, key=key, seed=seed), lq)


def color_drift(restored: Picture, lq: Picture) -> float:
    """Mean CIE 1976 difference of the colours of both pictures at the input's size, blurred by 4 px: detail is none.

    0 is equal; about 2.3 is just noticeable.
    """
    height, width = lq.shape[:2]
    reduced = np.asarray(Image.fromarray(restored).resize((width, height), Image.Resampling.BOX))
    return float(np.mean(np.linalg.norm(_lab_of_colours(reduced) - _lab_of_colours(lq), axis=-1)))


def _lab_of_colours(picture: Picture) -> Planes:
    """CIE L*a*b* (D65) [H, W, 3] of the blurred sRGB picture. OpenCV's own conversion is off by a tenth."""
    srgb = cv2.GaussianBlur(picture.astype(np.float64) / 255, (0, 0), _DRIFT_SIGMA_PX)
    linear = np.where(srgb > 0.04045, ((srgb + 0.055) / 1.055) ** 2.4, srgb / 12.92)
    relative = linear @ _RGB_TO_XYZ.T / _RGB_TO_XYZ.sum(axis=1)
    x, y, z = np.moveaxis(np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _compared(picture: Picture, reference: Picture, channel: Channel, border_px: int) -> tuple[Planes, Planes]:
    if picture.shape != reference.shape:
        raise InputError(
            f"metric: a picture of {picture.shape[1]}x{picture.shape[0]} px and a reference of "
            f"{reference.shape[1]}x{reference.shape[0]} px; both must have one size"
        )
    height, width = picture.shape[:2]
    if border_px < 0 or min(height, width) <= 2 * border_px:
        raise InputError(
            f"metric: a border of {border_px} px leaves nothing of {width}x{height} px; give a smaller one"
        )
    inside = (slice(border_px, height - border_px), slice(border_px, width - border_px))
    return planes(picture[inside], channel), planes(reference[inside], channel)


def _windowed(values: Planes) -> Planes:
    offsets = np.arange(_WINDOW_PX) - _WINDOW_PX // 2
    window = np.exp(-(offsets**2) / (2 * _WINDOW_SIGMA_PX**2))
    window /= window.sum()
    reach = _WINDOW_PX // 2
    blurred = correlate1d(correlate1d(values, window, axis=0), window, axis=1)
    return np.asarray(blurred[reach:-reach, reach:-reach])

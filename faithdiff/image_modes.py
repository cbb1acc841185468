"""Pictures of any mode as uint8 RGB, alike for training data, uploads and the pipeline. Imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from faithdiff.errors import InputError


def to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 RGB [H, W, 3]: 16 bits are rounded to 8, transparent pixels lie on white, CMYK and palettes are converted.

    Raises:
        InputError: the pixels are floating-point numbers, which have no defined white.
    """
    if image.mode == "F":
        raise InputError("picture: it holds floating-point numbers; give 8 or 16 bits per channel")
    if image.mode.startswith("I"):  # "I" and the kinds of "I;16"
        levels = np.clip(np.asarray(image, dtype=np.int64), 0, 65_535)
        return np.repeat(to_eight_bits(levels.astype(np.uint16))[..., None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


def to_eight_bits(levels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """uint8 of uint16 levels, rounded to the nearest; uint8 as it is."""
    if levels.dtype == np.uint8:
        return levels
    # As many rows at a time as keep the wider numbers small.
    result = np.empty(levels.shape, np.uint8)
    for top in range(0, len(levels), 256):
        result[top : top + 256] = (levels[top : top + 256].astype(np.uint32) + 128) // 257
    return result

"""Pictures of any mode as uint8 RGB, alike for training data, uploads and the pipeline. Imports no torch."""

from __future__ import annotations

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
        return np.repeat(((levels + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))

"""A picture between the steps, float32 RGB [H, W, 3] nominally in 0..1, and its 256 levels."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]

_UNIT = np.arange(256, dtype=np.float32) / np.float32(255.0)


def to_uint8(image: NDArray[np.floating]) -> NDArray[np.uint8]:
    """0..1 to 0..255, rounded half to even and clipped."""
    levels = cv2.addWeighted(image, 255.0, image, 0.0, 0.0, dtype=cv2.CV_8U)
    return np.asarray(levels, np.uint8).reshape(image.shape)


def to_unit(levels: NDArray[np.uint8]) -> Picture:
    """0..255 to 0..1."""
    return np.asarray(cv2.LUT(levels, _UNIT), np.float32).reshape(levels.shape)

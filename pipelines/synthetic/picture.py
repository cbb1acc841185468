"""A drawn picture, and what is known about it because it was drawn."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

SUPERSAMPLING = 2
"""Shapes are drawn this much larger and then reduced, so that their edges are smooth."""


@dataclass(frozen=True)
class TextLine:
    """One line of text in a picture."""

    string: str
    box: tuple[tuple[float, float], ...]
    """Corners (x, y) of its ink in px: top left, top right, bottom right, bottom left, as one reads it."""


@dataclass(frozen=True)
class Picture:
    """One finished picture."""

    pixels: NDArray[np.uint8]
    """RGB [height_px, width_px, 3]."""
    caption: str
    lines: tuple[TextLine, ...] = ()


def reduced(planes: NDArray[np.float32], scale: int = SUPERSAMPLING) -> NDArray[np.float32]:
    """Planes [n, height, width] as [height / scale, width / scale, n]; each pixel the mean of those it replaces."""
    height, width = planes.shape[1] // scale, planes.shape[2] // scale
    small = [cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA) for plane in planes]
    return np.stack(small, axis=-1)


def quantized(rgb: NDArray[np.float32]) -> NDArray[np.uint8]:
    """0..1 as 0..255, clipped."""
    return np.asarray(np.clip(rgb * 255 + 0.5, 0, 255), np.uint8)

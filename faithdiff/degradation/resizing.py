"""Resizing without antialiasing: the numbers of torch's F.interpolate, as products with sparse matrices."""

from __future__ import annotations

from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from faithdiff.degradation.levels import Picture

ResizeMode = Literal["area", "bilinear", "bicubic"]
Taps = tuple[NDArray[np.integer], NDArray[np.floating]]
"""For every row of the result, the rows of the source that it mixes and their weights: [rows, taps] each."""

_CUBIC = np.float32(-0.75)


def resize(
    image: Picture, mode: ResizeMode, *, factor: float | None = None, size_px: tuple[int, int] | None = None
) -> Picture:
    """Resized by a factor (rounded down) or to (height, width); "area" averages cells.

    With a factor, bilinear and bicubic sample at multiples of exactly 1/factor, as torch does.
    """
    assert (factor is None) != (size_px is None), "a factor or a size"
    height, width = size_px or (int(image.shape[0] * (factor or 1)), int(image.shape[1] * (factor or 1)))
    rows = _mixing_matrix(mode, image.shape[0], height, factor)
    columns = _mixing_matrix(mode, image.shape[1], width, factor)
    return _mixed_rows(columns, _mixed_rows(rows, image))


def _mixed_rows(matrix: Any, image: Picture) -> Picture:
    """The product with the rows of the picture, transposed: [H, W, 3] -> [W, rows of the matrix, 3]."""
    height, width, channels = image.shape
    mixed = matrix @ image.reshape(height, width * channels)
    return np.asarray(cv2.transpose(mixed.reshape(-1, width, channels))).reshape(width, -1, channels)


def _mixing_matrix(mode: ResizeMode, source: int, target: int, factor: float | None) -> Any:
    """[target, source], float32, sparse."""
    if mode == "area":
        return _cells(source, target)
    taps = _bilinear if mode == "bilinear" else _bicubic
    # Rounded to float32 where torch rounds: the rounding of a coordinate shows in the picture.
    step = np.float32(1.0 / factor if factor is not None else source / target)
    position = (np.float64(step) * (np.arange(target) + 0.5) - 0.5).astype(np.float32)
    rows, weights = taps(position, source)
    return _sparse(np.clip(rows, 0, source - 1), weights, source)


def _bilinear(position: NDArray[np.float32], source: int) -> Taps:
    position = np.clip(position, 0, source - 1)
    left = position.astype(np.int32)
    t = position - left
    return np.stack([left, left + 1], axis=1), np.stack([1 - t, t], axis=1)


def _bicubic(position: NDArray[np.float32], source: int) -> Taps:
    left = np.floor(position).astype(np.int32)
    t = position - left
    offset = np.arange(-1, 3, dtype=np.int32)
    x = np.abs(t[:, None] - offset)
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    far = ((_CUBIC * x - 5 * _CUBIC) * x + 8 * _CUBIC) * x - 4 * _CUBIC
    return left[:, None] + offset, np.where(np.abs(offset - 0.5) < 1, near, far)


def _cells(source: int, target: int) -> Any:
    """The cells of adaptive average pooling: whole rows, and neighbours may share one."""
    cell = np.arange(target)
    start, end = cell * source // target, -(-(cell + 1) * source // target)
    length = end - start
    offset = np.concatenate(([0], length.cumsum()))
    rows = np.arange(offset[-1]) - np.repeat(offset[:-1] - start, length)
    weights = np.repeat(np.float32(1.0) / length.astype(np.float32), length)
    return sparse.csr_array((weights, rows, offset), shape=(target, source))


def _sparse(rows: NDArray[np.integer], weights: NDArray[np.floating], source: int) -> Any:
    target, taps = rows.shape
    offset = np.arange(target + 1) * taps
    return sparse.csr_array((weights.astype(np.float32).ravel(), rows.ravel(), offset), shape=(target, source))

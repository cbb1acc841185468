"""Blurring a picture with one kernel: float32 [H, W, C], borders mirrored without repeating the edge pixel.

The same numbers as BasicSR @ 8d56e3a basicsr/utils/img_process_util.py:7-31, to within _TOLERANCE, from fewer
multiplications: a kernel without its empty rim, as a short sum of separable kernels where it is one.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from faithdiff.degradation.levels import Picture

_TOLERANCE = 2e-7
"""Largest change of a picture in 0..1 by what is left out of a kernel: about one rounding of float32."""
_MAX_DIRECT_TAPS = 129
"""From 130 taps OpenCV goes through the Fourier transform, which is slower up to _MAX_STRIPS_PX."""
_MAX_STRIPS_PX = 21


def filter2d(image: Picture, kernel: NDArray[np.floating]) -> Picture:
    """Cross-correlation of every channel with `kernel`, [size, size] with an odd size."""
    kernel = _trimmed(np.asarray(kernel, np.float64))
    size_px = len(kernel)
    columns, rows = _separable_terms(kernel)
    # Measured: one separable term costs as much as about three rows of the whole kernel.
    if 3 * len(rows) < size_px:
        terms = [
            cv2.sepFilter2D(image, -1, row, column, borderType=cv2.BORDER_REFLECT_101)
            for column, row in zip(columns, rows, strict=True)
        ]
        return _summed(terms, image.shape)
    if kernel.size > _MAX_DIRECT_TAPS and size_px <= _MAX_STRIPS_PX:
        return _filtered_in_strips(image, kernel.astype(np.float32))
    filtered = cv2.filter2D(image, -1, kernel.astype(np.float32), borderType=cv2.BORDER_REFLECT_101)
    return np.asarray(filtered).reshape(image.shape)


def _trimmed(kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """The kernel without the outermost rings that hold nothing."""
    radius = len(kernel) // 2
    offset = np.abs(np.arange(-radius, radius + 1))
    rings = np.bincount(np.maximum(offset[:, None], offset[None, :]).ravel(), np.abs(kernel).ravel())
    outside = rings[::-1].cumsum()[::-1]
    kept = int(np.count_nonzero(outside > _TOLERANCE / 2)) - 1
    return kernel[radius - kept : radius + kept + 1, radius - kept : radius + kept + 1]


def _separable_terms(kernel: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Columns and rows, [terms, size] each, whose products add up to the kernel."""
    left, strengths, right = np.linalg.svd(kernel)
    mass = strengths * np.abs(left).sum(axis=0) * np.abs(right).sum(axis=1)
    left_out = mass[::-1].cumsum()[::-1]
    terms = max(1, int(np.count_nonzero(left_out > _TOLERANCE / 2)))
    return (left * strengths).T[:terms].astype(np.float32), right[:terms].astype(np.float32)


def _filtered_in_strips(image: Picture, kernel: NDArray[np.float32]) -> Picture:
    """The sum over strips of the kernel, each small enough to be applied directly."""
    height, size_px, radius = len(image), len(kernel), len(kernel) // 2
    padded = cv2.copyMakeBorder(image, radius, radius, 0, 0, cv2.BORDER_REFLECT_101)
    num_rows = _MAX_DIRECT_TAPS // size_px
    terms = []
    for top in range(0, size_px, num_rows):
        strip = kernel[top : top + num_rows]
        window = padded[top : top + height + len(strip) - 1]
        terms.append(cv2.filter2D(window, -1, strip, anchor=(radius, 0), borderType=cv2.BORDER_REFLECT_101)[:height])
    return _summed(terms, image.shape)


def _summed(terms: list[Picture], shape: tuple[int, ...]) -> Picture:
    total = terms[0]
    for term in terms[1:]:
        total += term
    return np.asarray(total).reshape(shape)

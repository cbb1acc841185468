"""Blurring a picture with one kernel: float32 [H, W, C], borders mirrored without repeating the edge pixel.

The same numbers as BasicSR @ 8d56e3a basicsr/utils/img_process_util.py:7-31, to within _TOLERANCE, from fewer
multiplications: taps that weigh nothing are dropped, and a kernel that is a short sum of separable ones is applied so.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from faithdiff.degradation.levels import Picture

_TOLERANCE = 2e-7
"""Largest change of a picture in 0..1 by what is left out of a kernel: about one rounding of float32."""
_MAX_DIRECT_AREA = 129
"""From 130 taps, zeros included, OpenCV goes through the Fourier transform ..."""
_MAX_DIRECT_TAPS = 320
"""... which pays only from about so many taps that are not 0."""


def filter2d(image: Picture, kernel: NDArray[np.floating]) -> Picture:
    """Cross-correlation of every channel with `kernel`, [size, size] with an odd size."""
    kernel = _trimmed(np.asarray(kernel, np.float64))
    columns, rows = _separable_terms(kernel)
    kernel = _thinned(kernel)
    num_taps = int(np.count_nonzero(kernel))
    # Measured: a separable term costs as much as about four taps for each of its pixels.
    if 4 * rows.size < min(num_taps, _MAX_DIRECT_TAPS):
        terms = [
            cv2.sepFilter2D(image, -1, row, column, borderType=cv2.BORDER_REFLECT_101)
            for column, row in zip(columns, rows, strict=True)
        ]
        return _summed(terms, image.shape)
    if kernel.size > _MAX_DIRECT_AREA and num_taps <= _MAX_DIRECT_TAPS:
        return _filtered_in_strips(image, kernel.astype(np.float32))
    filtered = cv2.filter2D(image, -1, kernel.astype(np.float32), borderType=cv2.BORDER_REFLECT_101)
    return np.asarray(filtered).reshape(image.shape)


def _trimmed(kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """The kernel without the outermost rings that weigh nothing."""
    radius = len(kernel) // 2
    offset = np.abs(np.arange(-radius, radius + 1))
    rings = np.bincount(np.maximum(offset[:, None], offset[None, :]).ravel(), np.abs(kernel).ravel())
    outside = rings[::-1].cumsum()[::-1]
    kept = max(0, int(np.count_nonzero(outside > _TOLERANCE / 2)) - 1)
    return kernel[radius - kept : radius + kept + 1, radius - kept : radius + kept + 1]


def _thinned(kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """The kernel with its smallest taps set to 0.

    OpenCV skips a tap of 0; one of 1e-40 makes every product a denormal number, ten times as slow as any other.
    """
    weights = np.abs(kernel)
    order = np.argsort(weights, axis=None)
    num_dropped = int(np.searchsorted(weights.ravel()[order].cumsum(), _TOLERANCE / 2))
    thinned = kernel.copy()
    thinned.ravel()[order[:num_dropped]] = 0.0
    return thinned


def _separable_terms(kernel: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Columns and rows, [terms, size] each, whose products add up to the kernel."""
    left, strengths, right = np.linalg.svd(kernel)
    mass = strengths * np.abs(left).sum(axis=0) * np.abs(right).sum(axis=1)
    left_out = mass[::-1].cumsum()[::-1]
    terms = max(1, int(np.count_nonzero(left_out > _TOLERANCE / 2)))
    columns, rows = _mirrored(left.T[:terms]) * strengths[:terms, None], _mirrored(right[:terms])
    return _without_denormals(columns), _without_denormals(rows)


def _mirrored(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """The vectors, exactly even or odd where they are so but for rounding: OpenCV then halves the multiplications."""
    even, odd = (vectors + vectors[:, ::-1]) / 2, (vectors - vectors[:, ::-1]) / 2
    is_even, is_odd = (np.abs(part).max(axis=1, keepdims=True) < 1e-9 for part in (odd, even))
    return np.where(is_even, even, np.where(is_odd, odd, vectors))


def _without_denormals(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.where(np.abs(vectors) < 1e-12, 0.0, vectors).astype(np.float32)


def _filtered_in_strips(image: Picture, kernel: NDArray[np.float32]) -> Picture:
    """The sum over strips of the kernel, each small enough to be applied directly."""
    height, size_px, radius = len(image), len(kernel), len(kernel) // 2
    padded = cv2.copyMakeBorder(image, radius, radius, 0, 0, cv2.BORDER_REFLECT_101)
    num_rows = _MAX_DIRECT_AREA // size_px
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

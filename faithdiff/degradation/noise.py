"""Noise fields for a picture: float32 [H, W, 3], or [H, W, 1] where the three colours share one ("gray").

Distributed as BasicSR @ 8d56e3a basicsr/data/degradations.py:440-654 draws them, from tables instead of value by value.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, ndtri, xlogy

from faithdiff.degradation.levels import Picture, to_uint8

_LUMA = np.array([[0.2989, 0.587, 0.114]], np.float32)
_COUNTS = 512
"""Photon counts in the tables: none above, as a pixel's mean is 256 at most and 512 is 16 deviations away."""

_COUNT_BITS = np.uint32(_COUNTS - 1)
_CHUNK = 2**14
"""Values at a time: what is made of them on the way stays in the cache."""


def gaussian_noise(
    shape: tuple[int, ...], sigma: float, *, gray: bool, rng: np.random.Generator
) -> NDArray[np.float32]:
    """A field for a picture of `shape` [H, W, 3]; sigma in levels of 0..255.

    Values are the 65,536 quantiles of the normal distribution, all equally likely; the outermost lie at 4.3 sigma.
    """
    height, width, channels = shape
    draws = _random_words(rng, (height, width, 1 if gray else channels), np.uint16)
    return np.take(_normal_quantiles() * np.float32(sigma / 255.0), draws)


def poisson_noise(image: Picture, scale: float, *, gray: bool, rng: np.random.Generator) -> NDArray[np.float32]:
    """Shot noise of the picture rounded to 8 bit; as many photons per full level as it has distinct levels."""
    levels = to_uint8(cv2.transform(image, _LUMA)[..., None] if gray else image)
    num_values = np.count_nonzero(cv2.calcHist([levels.reshape(-1, 1)], [0], None, [256], [0, 256]))
    photons = 2 ** int(np.ceil(np.log2(num_values)))
    noise = _photon_counts(levels, photons, rng) * np.float32(scale / photons)
    noise -= cv2.LUT(levels, np.arange(256, dtype=np.float32) * np.float32(scale / 255.0)).reshape(levels.shape)
    return noise


def _photon_counts(levels: NDArray[np.uint8], photons: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Poisson counts of mean levels / 255 * photons, one random word each (Walker's alias method)."""
    table, flat = _alias_table(photons), levels.ravel()
    draws = _random_words(rng, flat.shape, np.uint32)
    counts = np.empty(flat.shape, np.float32)
    for start in range(0, len(flat), _CHUNK):
        part = slice(start, start + _CHUNK)
        cell = flat[part].astype(np.intp)
        cell *= _COUNTS
        cell += draws[part] & _COUNT_BITS
        entries = table.take(cell)
        # The upper 23 bits decide between the drawn count and the other one that shares its cell.
        counts[part] = np.where(draws[part] < entries, draws[part], entries) & _COUNT_BITS
    return counts.reshape(levels.shape)


def add_noise(image: Picture, noise: NDArray[np.float32]) -> Picture:
    """The noisy picture, clipped to 0..1 and not rounded."""
    noisy = image + noise
    return np.clip(noisy, 0.0, 1.0, out=noisy)


@functools.cache
def _normal_quantiles() -> NDArray[np.float32]:
    quantiles = ndtri((np.arange(2**16) + 0.5) / 2**16)
    return np.asarray(quantiles / quantiles.std(), np.float32)


@functools.cache
def _alias_table(photons: int) -> NDArray[np.uint32]:
    """[256 * 512]: for each level and count, a 23-bit threshold and below it, in 9 bits, the cell's other count."""
    mean = np.arange(256)[:, None] / 255.0 * photons
    count = np.arange(_COUNTS)[None, :]
    weight = np.exp(xlogy(count, mean) - mean - gammaln(count + 1))
    share = weight / weight.sum(axis=1, keepdims=True) * _COUNTS
    other = np.broadcast_to(count, share.shape).copy()
    threshold = np.ones_like(share)
    _pair_cells(share, other, threshold)
    bits = np.minimum(np.rint(threshold * 2**23), 2**23 - 1).astype(np.uint32)
    return (bits * np.uint32(_COUNTS) + other.astype(np.uint32)).ravel()


def _pair_cells(share: NDArray[np.float64], other: NDArray[np.int64], threshold: NDArray[np.float64]) -> None:
    """Fills every cell of every row to 1: the emptiest takes what it lacks from the fullest, again and again."""
    every_row = np.arange(len(share))
    for _ in range(share.shape[1] - 1):
        emptiest, fullest = share.argmin(axis=1), share.argmax(axis=1)
        lack = 1.0 - share[every_row, emptiest]
        row = every_row[lack > 1e-12]
        emptiest, fullest, lack = emptiest[row], fullest[row], lack[row]
        threshold[row, emptiest] = share[row, emptiest]
        other[row, emptiest] = fullest
        share[row, fullest] -= lack
        share[row, emptiest] = 1.0


def _random_words(rng: np.random.Generator, shape: tuple[int, ...], dtype: type[np.unsignedinteger]) -> NDArray:
    """Uniform unsigned integers, cut from 64-bit ones."""
    num_values = int(np.prod(shape))
    per_word = 8 // np.dtype(dtype).itemsize
    words = rng.integers(0, 2**64, -(-num_values // per_word), dtype=np.uint64)
    return words.view(dtype)[:num_values].reshape(shape)

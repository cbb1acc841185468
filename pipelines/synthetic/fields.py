"""Fields over the plane that pictures are made of: noise with a given spectrum, light, and how they are sampled.

`noise` makes a square tile that repeats without a seam; `sample` reads it anywhere.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import scipy.fft
from numpy.typing import NDArray

Field = NDArray[np.float32]
"""[height, width]."""

TILE_PX = 512


def noise(
    rng: np.random.Generator,
    exponent: float,
    *,
    angle: float = 0.0,
    stretch: float = 1.0,
    ring: tuple[float, float] | None = None,
    size_px: int = TILE_PX,
) -> Field:
    """Periodic noise [size_px, size_px] of mean 0 and deviation 1, whose amplitude falls as 1 / f^exponent.

    `stretch` above 1 makes structures that much longer along `angle` (radians). `ring` (frequency, width), in cycles
    per tile, keeps one band of frequencies only, as a Gabor filter does.
    """
    fx = scipy.fft.rfftfreq(size_px, 1 / size_px).astype(np.float32)[None, :]
    fy = scipy.fft.fftfreq(size_px, 1 / size_px).astype(np.float32)[:, None]
    cos, sin = math.cos(angle), math.sin(angle)
    squared = (stretch * (fx * cos + fy * sin)) ** 2 + (fy * cos - fx * sin) ** 2
    amplitude = np.maximum(squared, 1) ** (-exponent / 2)
    if ring:
        amplitude *= np.exp(-(((np.sqrt(squared) - ring[0]) / ring[1]) ** 2) / 2)
    amplitude[0, 0] = 0
    waves = rng.standard_normal((size_px, size_px // 2 + 1, 2), dtype=np.float32).view(np.complex64)[..., 0]
    field = scipy.fft.irfft2(waves * amplitude, s=(size_px, size_px))
    return np.asarray(field / field.std(), np.float32)


def sample(tile: Field, u: Field, v: Field, flags: int = cv2.INTER_LINEAR) -> Field:
    """The repeated tile at column u and row v; same shape as u."""
    height, width = tile.shape
    return np.asarray(cv2.remap(tile, wrapped(u, width), wrapped(v, height), flags, borderMode=cv2.BORDER_WRAP))


def wrapped(values: Field, period: float) -> Field:
    """`values` modulo `period`; many times faster than np.mod."""
    return np.asarray(values - np.floor(values * np.float32(1 / period)) * np.float32(period), np.float32)


def grid(height: int, width: int) -> tuple[Field, Field]:
    """Columns and rows of every pixel."""
    u, v = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    return np.tile(u, (height, 1)), np.repeat(v[:, None], width, axis=1)


def step(edge: float, values: Field, softness: float) -> Field:
    """0 below `edge`, 1 above it, and a smooth passage `softness` wide."""
    t = np.clip((values - edge) / softness + np.float32(0.5), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def light(rng: np.random.Generator, height: int, width: int) -> Field:
    """A factor about 1 per pixel: brighter on one side, a little darker in the corners."""
    u, v = (np.linspace(-1, 1, n, dtype=np.float32) for n in (width, height))
    angle, slope, vignette = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.16), rng.uniform(0, 0.14)
    x, y = u[None, :], v[:, None]
    factor = 1 + slope * (math.cos(angle) * x + math.sin(angle) * y) - vignette * (x * x + y * y) / 2
    return np.asarray(factor, np.float32)


def relief(height: Field, angle: float, depth: float) -> Field:
    """How much lighter (above 1) or darker the slopes of a height field look under light from `angle`."""
    across = cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
    down = cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8)
    slope = depth * math.cos(angle) * across + depth * math.sin(angle) * down
    return np.asarray(1 + np.clip(slope, -0.45, 0.45), np.float32)

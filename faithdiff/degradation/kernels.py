"""Blur kernels: float64 [size, size], summing to 1, centred on the middle pixel.

Source: BasicSR @ 8d56e3a basicsr/data/degradations.py:17-173 and 389-409.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import j1

Kernel = NDArray[np.float64]


def gaussian_kernel(size_px: int, sigma_x_px: float, sigma_y_px: float, theta_rad: float = 0.0) -> Kernel:
    """Bivariate Gaussian exp(-d/2), d = x^T S^-1 x."""
    return _normalised(np.exp(-0.5 * _distance(size_px, sigma_x_px, sigma_y_px, theta_rad)))


def generalized_kernel(
    size_px: int, sigma_x_px: float, sigma_y_px: float, theta_rad: float = 0.0, *, beta: float
) -> Kernel:
    """Generalised Gaussian exp(-d^beta / 2): below 1 a sharp peak with long tails, above 1 a flat top."""
    return _normalised(np.exp(-0.5 * _distance(size_px, sigma_x_px, sigma_y_px, theta_rad) ** beta))


def plateau_kernel(
    size_px: int, sigma_x_px: float, sigma_y_px: float, theta_rad: float = 0.0, *, beta: float
) -> Kernel:
    """Plateau-shaped 1 / (1 + d^beta)."""
    return _normalised(1.0 / (1.0 + _distance(size_px, sigma_x_px, sigma_y_px, theta_rad) ** beta))


def sinc_kernel(size_px: int, cutoff_rad: float) -> Kernel:
    """Circular low-pass with its cut-off in radians per pixel (pi keeps nearly everything); rings at edges."""
    offset = np.arange(size_px, dtype=np.float64) - (size_px - 1) / 2
    radius = np.hypot(offset[:, None], offset[None, :])
    centre = (size_px - 1) // 2
    radius[centre, centre] = 1.0
    kernel = cutoff_rad * j1(cutoff_rad * radius) / (2 * np.pi * radius)
    kernel[centre, centre] = cutoff_rad**2 / (4 * np.pi)
    return _normalised(kernel)


def _distance(size_px: int, sigma_x_px: float, sigma_y_px: float, theta_rad: float) -> Kernel:
    """d = x^T S^-1 x on the pixel mesh, with S = R diag(sx^2, sy^2) R^T."""
    offset = np.arange(size_px, dtype=np.float64) - size_px // 2
    x, y = np.meshgrid(offset, offset)
    cos, sin = np.cos(theta_rad), np.sin(theta_rad)
    rotation = np.array([[cos, -sin], [sin, cos]])
    covariance = rotation @ np.diag([sigma_x_px**2, sigma_y_px**2]) @ rotation.T
    inverse = np.linalg.inv(covariance)
    return np.asarray(inverse[0, 0] * x * x + 2 * inverse[0, 1] * x * y + inverse[1, 1] * y * y)


def _normalised(kernel: Kernel) -> Kernel:
    return np.asarray(kernel / kernel.sum())

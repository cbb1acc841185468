"""JPEG as differentiable training code simulates it: the reference of golden tensors and traces.

Source: BasicSR @ 8d56e3a basicsr/utils/diffjpeg.py. The engine writes real JPEG instead (`jpeg`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from faithdiff.degradation.levels import Picture

_TO_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_TO_RGB = np.array([[1.0, 0.0, 1.402], [1.0, -0.344136, -0.714136], [1.0, 1.772, 0.0]])
_LUMA_TABLE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
).T
_CHROMA_TABLE = np.full((8, 8), 99)
_CHROMA_TABLE[:4, :4] = np.array([[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]).T


def simulated_jpeg(image: Picture, quality: float) -> Picture:
    """Clipped, 4:2:0, no entropy coding, tables neither rounded nor limited, chroma averaged and repeated."""
    height, width, _ = image.shape
    padded = np.pad(np.clip(image, 0.0, 1.0), ((0, -height % 16), (0, -width % 16), (0, 0)))
    ycbcr = (padded.astype(np.float64) * 255.0) @ _TO_YCBCR.T
    ycbcr[..., 1:] += 128.0
    factor = (5000.0 / quality if quality < 50 else 200.0 - quality * 2) / 100.0
    luma = _quantised(ycbcr[..., 0], _LUMA_TABLE * factor)
    chroma = [_quantised(_halved(ycbcr[..., c]), _CHROMA_TABLE * factor).repeat(2, 0).repeat(2, 1) for c in (1, 2)]
    rgb = np.stack([luma, chroma[0] - 128.0, chroma[1] - 128.0], axis=-1) @ _TO_RGB.T
    return np.asarray((np.clip(rgb, 0.0, 255.0) / 255.0)[:height, :width], np.float32)


def _halved(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    height, width = plane.shape
    return np.asarray(plane.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3)))


def _quantised(plane: NDArray[np.float64], table: NDArray[np.floating]) -> NDArray[np.float64]:
    """The plane after its 8x8 cosine transform was divided by `table`, rounded and undone."""
    height, width = plane.shape
    blocks = plane.reshape(height // 8, 8, width // 8, 8).transpose(0, 2, 1, 3) - 128.0
    basis = _cosine_basis()
    coefficients = basis @ blocks @ basis.T
    restored = basis.T @ (np.rint(coefficients / table) * table) @ basis
    return np.asarray(restored.transpose(0, 2, 1, 3).reshape(height, width) + 128.0)


def _cosine_basis() -> NDArray[np.float64]:
    """The orthonormal 8-point DCT-II: rows are frequencies."""
    frequency, position = np.mgrid[0:8, 0:8]
    basis = np.cos((2 * position + 1) * frequency * np.pi / 16) / 2
    basis[0] /= np.sqrt(2)
    return np.asarray(basis)

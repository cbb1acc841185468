"""The arithmetic of a degradation on one picture: float32 RGB [H, W, 3], nominally 0..1.

Sources: BasicSR @ 8d56e3a basicsr/utils/img_process_util.py:7-31 (filter), basicsr/data/degradations.py:440-654
(noise), basicsr/utils/diffjpeg.py (simulated JPEG); torch's F.interpolate (resize). Where a native routine computes the
same numbers it is used; `real_jpeg` replaces the simulated one in the engine.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Picture = NDArray[np.float32]
ResizeMode = Literal["area", "bilinear", "bicubic"]

_LUMA = np.array([0.2989, 0.587, 0.114], np.float32)
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


def filter2d(image: Picture, kernel: NDArray[np.floating]) -> Picture:
    """Cross-correlation with `kernel`, borders mirrored without repeating the edge pixel."""
    return np.asarray(cv2.filter2D(image, -1, kernel.astype(np.float32), borderType=cv2.BORDER_REFLECT_101))


def resize(
    image: Picture, mode: ResizeMode, *, factor: float | None = None, size_px: tuple[int, int] | None = None
) -> Picture:
    """Resized without antialiasing, by a factor (rounded down) or to (height, width); "area" averages cells.

    With a factor, bilinear and bicubic sample at multiples of exactly 1/factor, as torch does.
    """
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    aligned = None if mode == "area" else False
    out = F.interpolate(tensor, size=size_px, scale_factor=factor, mode=mode, align_corners=aligned)
    return np.ascontiguousarray(out[0].permute(1, 2, 0).numpy())


def gaussian_noise(
    shape: tuple[int, ...], sigma: float, *, gray: bool, rng: np.random.Generator
) -> NDArray[np.float32]:
    """A noise field for a picture of `shape` [H, W, 3]; sigma in levels of 0..255; gray: one field [H, W, 1]."""
    height, width, channels = shape
    field = rng.standard_normal((height, width, 1 if gray else channels), dtype=np.float32)
    return np.asarray(field * np.float32(sigma / 255.0))


def poisson_noise(image: Picture, scale: float, *, gray: bool, rng: np.random.Generator) -> NDArray[np.float32]:
    """Shot noise of the picture rounded to 8 bit; as many photons per full level as it has distinct levels."""
    base = (image @ _LUMA)[..., None] if gray else image
    levels = to_uint8(base)
    rounded = levels.astype(np.float32) / np.float32(255.0)
    num_values = np.count_nonzero(np.bincount(levels.ravel(), minlength=256))
    photons = 2.0 ** np.ceil(np.log2(num_values))
    noise = rng.poisson(rounded * photons).astype(np.float32) / np.float32(photons) - rounded
    return np.asarray(noise * np.float32(scale))


def add_noise(image: Picture, noise: NDArray[np.float32]) -> Picture:
    """The noisy picture, clipped to 0..1 and not rounded."""
    return np.clip(image + noise, 0.0, 1.0)


def real_jpeg(image: Picture, quality: float) -> Picture:
    """Clipped, rounded to 8 bit, written as JPEG (4:2:0) by libjpeg and read back; quality rounded to an integer."""
    bgr = cv2.cvtColor(to_uint8(image), cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, round(quality)])
    assert done, "libjpeg refused an 8-bit RGB picture"
    decoded = cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return np.asarray(decoded.astype(np.float32) / np.float32(255.0))


def simulated_jpeg(image: Picture, quality: float) -> Picture:
    """What DiffJPEG computes: no entropy coding, tables not rounded, chroma averaged and repeated, clipped first.

    The reference for golden tensors and traces; the engine uses `real_jpeg`.
    """
    height, width, _ = image.shape
    padded = np.pad(np.clip(image, 0.0, 1.0), ((0, -height % 16), (0, -width % 16), (0, 0)))
    ycbcr = (padded.astype(np.float64) * 255.0) @ _TO_YCBCR.T
    ycbcr[..., 1:] += 128.0
    factor = (5000.0 / quality if quality < 50 else 200.0 - quality * 2) / 100.0
    luma = _quantised(ycbcr[..., 0], _LUMA_TABLE * factor)
    chroma = [_quantised(_halved(ycbcr[..., c]), _CHROMA_TABLE * factor).repeat(2, 0).repeat(2, 1) for c in (1, 2)]
    rgb = np.stack([luma, chroma[0] - 128.0, chroma[1] - 128.0], axis=-1) @ _TO_RGB.T
    return np.asarray((np.clip(rgb, 0.0, 255.0) / 255.0)[:height, :width], np.float32)


def to_uint8(image: NDArray[np.floating]) -> NDArray[np.uint8]:
    """0..1 to 0..255, rounded half to even and clipped."""
    return np.clip(np.rint(image * np.float32(255.0)), 0, 255).astype(np.uint8)


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

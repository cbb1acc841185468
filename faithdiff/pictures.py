"""Pictures around the network: arrays in and out, the up-scaled reference, padding, likeness to the input."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from faithdiff.errors import InputError
from faithdiff.image_modes import to_rgb
from faithdiff.tiling import CELL_PX


def to_rgb_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 RGB [H, W, 3] of a PIL image or of such an array."""
    if isinstance(image, Image.Image):
        image = to_rgb(image)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(f"picture: got {got}; it must be a PIL image or a uint8 RGB array [H, W, 3]")
    if min(image.shape[:2]) == 0:
        raise InputError(f"picture: got an empty picture of {image.shape[1]}x{image.shape[0]} px")
    return image


def upscale_lq(lq_rgb: np.ndarray, scale: int) -> np.ndarray:
    """The input at `scale` x its size (Lanczos): what the network restores, and the reference of the colour fix."""
    if scale == 1:
        return lq_rgb
    height, width = lq_rgb.shape[:2]
    return np.asarray(Image.fromarray(lq_rgb).resize((width * scale, height * scale), Image.Resampling.LANCZOS))


def to_network_input(rgb: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """[1, 3, H, W] fp32 in [-1, 1], its right and bottom edges repeated to multiples of 8 px."""
    height, width = rgb.shape[:2]
    picture = torch.from_numpy(np.array(rgb)).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1
    return F.pad(picture, (0, -width % CELL_PX, 0, -height % CELL_PX), mode="replicate")


def to_rgb_uint8(picture: Tensor) -> np.ndarray:
    """uint8 RGB [H, W, 3] of a picture [1, 3, H, W] in about [-1, 1]."""
    levels = (picture[0].float() / 2 + 0.5).clamp(0, 1) * 255
    array: np.ndarray = levels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return array


def input_consistency_db(restored_rgb: np.ndarray, lq_rgb: np.ndarray) -> float:
    """PSNR in dB between the input and the restored picture reduced (box filter) to the input's size."""
    height, width = lq_rgb.shape[:2]
    reduced = np.asarray(Image.fromarray(restored_rgb).resize((width, height), Image.Resampling.BOX))
    mse = float(np.mean((reduced.astype(np.float32) - lq_rgb.astype(np.float32)) ** 2))
    return round(float(10 * np.log10(255**2 / max(mse, 1e-8))), 3)

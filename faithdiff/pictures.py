"""Pictures around the network: arrays in and out, the up-scaled reference, padding, likeness to the input."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from faithdiff.errors import InputError
from faithdiff.image_modes import to_eight_bits, to_rgb
from faithdiff.tiling import CELL_PX

Levels = npt.NDArray[Any]
"""uint8 or uint16."""


def to_rgb_array(image: Image.Image | Levels) -> Levels:
    """RGB [H, W, 3]: uint8 of a PIL image, an array of uint8 or uint16 levels as it is."""
    if isinstance(image, Image.Image):
        image = to_rgb(image)
    is_array = isinstance(image, np.ndarray)
    if not is_array or image.dtype not in (np.uint8, np.uint16) or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {list(image.shape)}" if is_array else type(image).__name__
        raise InputError(f"picture: got {got}; it must be a PIL image or a uint8 or uint16 RGB array [H, W, 3]")
    if min(image.shape[:2]) == 0:
        raise InputError(f"picture: got an empty picture of {image.shape[1]}x{image.shape[0]} px")
    return image


def max_level(levels: Levels) -> int:
    """255 or 65535: what white is."""
    return int(np.iinfo(levels.dtype).max)


def upscale_lq(lq_rgb: Levels, scale: int) -> Levels:
    """The input at `scale` x its size (Lanczos): what the network restores, and the reference of the colour fix."""
    if scale == 1:
        return lq_rgb
    height, width = lq_rgb.shape[:2]
    size, lanczos = (width * scale, height * scale), Image.Resampling.LANCZOS
    if lq_rgb.dtype == np.uint8:
        return np.asarray(Image.fromarray(lq_rgb).resize(size, lanczos))
    # Pillow has no mode of three 16-bit channels.
    planes = [np.asarray(Image.fromarray(lq_rgb[..., i].astype(np.float32)).resize(size, lanczos)) for i in range(3)]
    return np.stack(planes, axis=-1).round().clip(0, max_level(lq_rgb)).astype(lq_rgb.dtype)


def to_network_input(rgb: Levels, device: torch.device | str = "cpu") -> Tensor:
    """[1, 3, H, W] fp32 in [-1, 1], its right and bottom edges repeated to multiples of 8 px."""
    height, width = rgb.shape[:2]
    picture = torch.from_numpy(np.array(rgb)).to(device).permute(2, 0, 1)[None].float() / (max_level(rgb) / 2) - 1
    return F.pad(picture, (0, -width % CELL_PX, 0, -height % CELL_PX), mode="replicate")


def to_rgb_levels(picture: Tensor, dtype: npt.DTypeLike = np.uint8) -> Levels:
    """RGB [H, W, 3] of `dtype`, uint8 or uint16, of a picture [1, 3, H, W] in about [-1, 1]."""
    levels = (picture[0].float() / 2 + 0.5).clamp(0, 1) * int(np.iinfo(dtype).max)
    depth = torch.uint8 if dtype == np.uint8 else torch.int32
    return levels.round().to(depth).permute(1, 2, 0).cpu().numpy().astype(dtype, copy=False)


def input_consistency_db(restored_rgb: Levels, lq_rgb: Levels) -> float:
    """PSNR in dB between the input and the restored picture reduced (box filter) to the input's size, at 8 bits."""
    height, width = lq_rgb.shape[:2]
    reduced = np.asarray(Image.fromarray(to_eight_bits(restored_rgb)).resize((width, height), Image.Resampling.BOX))
    mse = float(np.mean((reduced.astype(np.float32) - to_eight_bits(lq_rgb).astype(np.float32)) ** 2))
    return round(float(10 * np.log10(255**2 / max(mse, 1e-8))), 3)

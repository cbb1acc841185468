"""Gives a restored picture the colours of the picture it was restored from (specification 2.7).

Diffusion drifts in colour. "adain" matches the mean and spread of each channel; "wavelet" takes what is coarser than
about 32 pixels from the reference and keeps what is finer.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from faithdiff.errors import InputError

Method = Literal["adain", "wavelet", "none"]
Rounding = Literal["round", "truncate"]

_LEVELS = 5
_EPS = 1e-5


def adain(content: Tensor, style: Tensor) -> Tensor:
    """content [3, H, W] with the per-channel mean and standard deviation of `style`; both in [0, 1], not clamped."""
    content_mean, content_std = _mean_std(content)
    style_mean, style_std = _mean_std(style)
    return (content - content_mean) / content_std * style_std + style_mean


def wavelet(content: Tensor, style: Tensor) -> Tensor:
    """Fine detail of content [3, H, W] over the coarse colours of `style`; both in [0, 1], not clamped.

    The bands that the released code takes off level by level add up to `content - coarse(content)`, and blurring is
    linear, so one chain of blurs over the difference gives the same picture.
    """
    coarse = style - content
    for level in range(_LEVELS):
        coarse = _blur(coarse, 2**level)
    return content + coarse


def color_fix(
    restored: npt.NDArray[Any],
    reference: npt.NDArray[Any],
    *,
    method: Method = "adain",
    rounding: Rounding = "round",
) -> npt.NDArray[Any]:
    """restored RGB [H, W, 3] with the colours of `reference` (the enlarged LQ picture, same shape and depth).

    Levels are uint8 or uint16.

    "truncate" gives the released code's bytes, half a level darker on average than "round".

    Raises:
        InputError: the shapes differ, or the method or rounding is unknown.
    """
    if method not in ("adain", "wavelet", "none") or rounding not in ("round", "truncate"):
        raise InputError(
            f"color_fix: method={method!r}, rounding={rounding!r}; "
            'method must be "adain", "wavelet" or "none", rounding "round" or "truncate"'
        )
    if restored.shape != reference.shape or restored.dtype != reference.dtype or restored.ndim != 3:
        raise InputError(
            f"color_fix: the restored picture is {restored.dtype} {restored.shape}, the reference {reference.dtype} "
            f"{reference.shape}; both must be alike [H, W, 3]: resize the reference to the restored picture"
        )
    if method == "none":
        return restored
    transfer = adain if method == "adain" else wavelet if rounding == "round" else _wavelet_by_levels
    levels = transfer(_planes(restored), _planes(reference)).clamp_(0, 1).mul_(int(np.iinfo(restored.dtype).max))
    if rounding == "round":
        levels.round_()
    depth = torch.uint8 if restored.dtype == np.uint8 else torch.int32
    return np.ascontiguousarray(levels.to(depth).permute(1, 2, 0).numpy().astype(restored.dtype, copy=False))


def _planes(picture: npt.NDArray[Any]) -> Tensor:
    planes = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
    return planes.float().div_(int(np.iinfo(picture.dtype).max))


def _mean_std(x: Tensor) -> tuple[Tensor, Tensor]:
    correction = min(1, x[0].numel() - 1)
    variance, mean = torch.var_mean(x, dim=(1, 2), correction=correction, keepdim=True)
    return mean, (variance + _EPS).sqrt()


def _blur(x: Tensor, radius: int) -> Tensor:
    """[1 2 1] / 4 with taps `radius` apart along both axes, edges replicated; x [3, H, W]."""
    for padding in ((0, 0, radius, radius), (radius, radius, 0, 0)):
        padded = F.pad(x[None], padding, mode="replicate")[0]
        dim = 1 if padding[0] == 0 else 2
        size = x.shape[dim]
        outer = padded.narrow(dim, 0, size) + padded.narrow(dim, 2 * radius, size)
        x = outer.mul_(0.25).add_(x, alpha=0.5)
    return x


def _wavelet_by_levels(content: Tensor, style: Tensor) -> Tensor:
    """`wavelet` in the released order of operations: bit-equal to it, so that truncating gives its bytes; slower."""
    taps = torch.tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(taps, taps).expand(3, 1, 3, 3)
    detail = torch.zeros_like(content)
    for radius in (2**level for level in range(_LEVELS)):
        padding = (radius,) * 4
        coarse, style = (
            F.conv2d(F.pad(x[None], padding, mode="replicate"), kernel, groups=3, dilation=radius)[0]
            for x in (content, style)
        )
        detail += content - coarse
        content = coarse
    return detail + style

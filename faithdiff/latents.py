"""Between pictures and latents: the VAE's posterior, the start latents of a restoration, decoding and previews."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from faithdiff.bands import decode_banded, encode_moments_banded
from faithdiff.errors import InputError
from faithdiff.pictures import Levels, to_rgb_levels
from faithdiff.precision import finite_or_float32
from faithdiff.request import RestorationRequest
from faithdiff.schedule import EulerSchedule
from faithdiff.tiling import CELL_PX

_PREVIEW_CELLS = 32


def unit_noise(shape: tuple[int, ...], request: RestorationRequest) -> Tensor:
    """Standard normal noise [1, 4, H, W] fp32 of the request's seed, drawn on the CPU: the same on every device."""
    if request.noise is not None:
        return _given("noise", request.noise, shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))


def encode_latents(vae: Any, picture: Tensor, request: RestorationRequest) -> Tensor:
    """Scaled latents x_0 [1, 4, H, W] fp32 of a picture [1, 3, 8 H, 8 W] in [-1, 1].

    The posterior's mode, or under `compat="released"` a sample drawn from the request's seed; the released code
    draws it from the global generator.
    """
    if request.lq_latents is not None:
        cells = (1, vae.config.latent_channels, picture.shape[2] // CELL_PX, picture.shape[3] // CELL_PX)
        return _given("lq_latents", request.lq_latents, cells).to(picture.device)
    tile_px = request.vae_tile_px
    fits = max(picture.shape[2:]) <= tile_px

    def moments(dtype: torch.dtype) -> Tensor:
        if fits:
            return vae.encode(picture.to(dtype)).latent_dist.parameters.float()
        return encode_moments_banded(vae, picture.to(dtype), band_px=_band_px(picture.shape[3], tile_px)).float()

    posterior = DiagonalGaussianDistribution(finite_or_float32(vae, moments, what="vae encoder").to(picture.device))
    if request.switches.lq_latents == "mode":
        latents = posterior.mode()
    else:
        generator = torch.Generator().manual_seed(request.seed)
        shape = tuple(posterior.mean.shape)
        latents = posterior.mean + posterior.std * torch.randn(shape, generator=generator).to(picture.device)
    scaled: Tensor = latents * vae.config.scaling_factor
    return scaled


def start_latents(
    noise: Tensor, x0: Tensor | None, schedule: EulerSchedule, request: RestorationRequest, final_abar: float
) -> Tensor:
    """Latents before the first step: noise alone, or the input's latents x_0 under the first step's noise.

    In Euler's coordinates x_0 has weight one, so we start from x_0 + sigma_0 eps. The released code mixes by DDPM's
    last timestep, which keeps sqrt(abar_999) = 6.8 % of x_0 (specification 2.4).
    """
    if x0 is None:
        return noise * schedule.init_noise_sigma
    if request.switches.lq_start == "released":
        return final_abar**0.5 * x0 + (1 - final_abar) ** 0.5 * schedule.init_noise_sigma * noise
    return x0 + schedule.sigmas[0] * noise


def decode_latents(vae: Any, latents: Tensor, request: RestorationRequest, dtype: npt.DTypeLike = np.uint8) -> Levels:
    """RGB [8 H, 8 W, 3] of `dtype`, uint8 or uint16, of scaled latents [1, 4, H, W]; large pictures in parts."""
    unscaled = latents / vae.config.scaling_factor
    tile_px = request.vae_tile_px
    fits = max(latents.shape[2:]) * CELL_PX <= tile_px

    def decode(precision: torch.dtype) -> Tensor:
        if fits:
            return vae.decode(unscaled.to(precision)).sample
        if request.switches.vae_tiling == "released":
            return _decode_overlapping(vae, unscaled.to(precision))
        return decode_banded(vae, unscaled.to(precision), band_px=_band_px(unscaled.shape[3] * CELL_PX, tile_px))

    return to_rgb_levels(finite_or_float32(vae, decode, what="vae decoder"), dtype)


@torch.inference_mode()
def preview_image(vae: Any, latents: Tensor) -> Image.Image:
    """At most 256 px of the picture in scaled latents [1, 4, H, W]: decoded from averaged latents, hence cheap."""
    longest = max(latents.shape[2:])
    if longest > _PREVIEW_CELLS:
        size = [max(1, round(side * _PREVIEW_CELLS / longest)) for side in latents.shape[2:]]
        latents = F.interpolate(latents, size=size, mode="area")
    dtype = next(vae.parameters()).dtype
    return Image.fromarray(to_rgb_levels(vae.decode((latents / vae.config.scaling_factor).to(dtype)).sample))


def _decode_overlapping(vae: Any, latents: Tensor) -> Tensor:
    """diffusers' own tiled decoding, as the released code's `--use_tile_vae`."""
    vae.enable_tiling()
    try:
        picture: Tensor = vae.decode(latents).sample
        return picture
    finally:
        vae.disable_tiling()


def _band_px(width_px: int, tile_px: int) -> int:
    """Rows of a band whose area is that of a tile."""
    return max(CELL_PX, tile_px * tile_px // width_px // CELL_PX * CELL_PX)


def _given(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != tuple(shape):
        raise InputError(f"request: {name} has shape {list(tensor.shape)}; this picture needs {list(shape)}")
    return tensor.float()

"""LQ encoder: a low-quality picture -> features of the penultimate VAE-encoder layer (FaithDiff, section 3.1).

It is the encoder of SDXL's `AutoencoderKL` cut after its middle block: no final norm, no moments, no sampling, no
scaling. Parameters keep the names they have inside the VAE's encoder, so a checkpoint needs only a prefix.

`features="last"` is an ablation of the paper: the encoder goes on to its last layer and gives what the diffusion model
itself is trained on, latents: the mean of the VAE's posterior times its scaling factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from faithdiff.bands import encode_banded
from faithdiff.errors import InputError

Features = Literal["penultimate", "last"]

_EPS = 1e-6
_SHARED_CONFIG = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "act_fn",
    "mid_block_add_attention",
    "latent_channels",
    "scaling_factor",
)


class LQEncoder(ModelMixin, ConfigMixin):
    """Deterministic features of a picture at 1/8 of its size (at 2 ** (blocks - 1) in general).

    34,125,696 parameters in 102 tensors at SDXL's size. `from_vae` starts it from a VAE's weights. `latent_channels`
    and `scaling_factor` are those of the VAE, and matter with `features="last"` alone.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        mid_block_add_attention: bool = True,
        features: Features = "penultimate",
        latent_channels: int = 4,
        scaling_factor: float = 0.13025,
    ) -> None:
        super().__init__()
        widths = list(block_out_channels)
        if not widths or any(width % norm_num_groups for width in widths):
            raise InputError(
                f"LQEncoder: block_out_channels={widths} with norm_num_groups={norm_num_groups}; "
                "every block needs a number of channels that the groups divide"
            )
        if features not in get_args(Features):
            raise InputError(f"LQEncoder: features is {features!r}; it must be one of {', '.join(get_args(Features))}")
        self.conv_in = nn.Conv2d(in_channels, widths[0], kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownEncoderBlock2D(
                in_channels=before,
                out_channels=width,
                num_layers=layers_per_block,
                resnet_eps=_EPS,
                resnet_act_fn=act_fn,
                resnet_groups=norm_num_groups,
                add_downsample=i < len(widths) - 1,
                downsample_padding=0,
            )
            for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.mid_block = UNetMidBlock2D(
            in_channels=widths[-1],
            temb_channels=None,
            resnet_eps=_EPS,
            resnet_act_fn=act_fn,
            resnet_groups=norm_num_groups,
            attention_head_dim=widths[-1],
            add_attention=mid_block_add_attention,
        )
        self.quant_conv: nn.Conv2d | None = None
        if features == "last":
            self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[-1], eps=_EPS)
            self.conv_act = nn.SiLU()
            self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, kernel_size=3, padding=1)
            # The VAE's own gives the posterior's variance too, in as many channels again: weights without a gradient.
            self.quant_conv = nn.Conv2d(2 * latent_channels, latent_channels, kernel_size=1)
        self.gradient_checkpointing = False

    @classmethod
    def from_vae(cls, vae: AutoencoderKL, features: Features = "penultimate") -> LQEncoder:
        """An encoder with a copy of the VAE encoder's weights, in its dtype and on its device.

        Raises:
            InputError: the VAE's encoder is not made of plain `DownEncoderBlock2D`; for its last features, it has no
                `quant_conv`.
        """
        config = vae.config
        if set(config.down_block_types) != {"DownEncoderBlock2D"}:
            raise InputError(
                f"LQEncoder.from_vae: the VAE has down_block_types={list(config.down_block_types)}; "
                "only DownEncoderBlock2D is allowed: give a VAE of SDXL's kind"
            )
        if features == "last" and vae.quant_conv is None:
            raise InputError(
                "LQEncoder.from_vae: features='last' and a VAE without quant_conv; give one of SDXL's kind"
            )
        encoder = cls(**{name: config[name] for name in _SHARED_CONFIG}, features=features)
        theirs = vae.encoder.state_dict()
        if features == "last":
            quant_conv = vae.quant_conv.state_dict().items()
            theirs |= {f"quant_conv.{key}": value[: config.latent_channels] for key, value in quant_conv}
        ours = encoder.state_dict().keys()
        weights = {key: value for key, value in theirs.items() if key in ours}
        encoder.load_state_dict(weights, strict=True)
        # torch's own `to`: that of diffusers 0.42 warns of float32 layers at every cast, though there are none.
        return nn.Module.to(encoder, device=vae.device, dtype=vae.dtype)

    @property
    def downscale(self) -> int:
        """Picture pixels per feature, along each side."""
        return 2 ** (len(self.down_blocks) - 1)

    @property
    def out_channels(self) -> int:
        """Channels of the features."""
        if self.quant_conv is not None:
            return self.quant_conv.out_channels
        return int(self.config.block_out_channels[-1])

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Any = None) -> None:
        """Recomputes each down block and the middle block in the backward pass, in train mode only."""
        # diffusers' own method would also set the flag of the middle block, which would checkpoint twice.
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    def forward(self, lq: Tensor) -> Tensor:
        """lq RGB [B, 3, H, W] in [-1, 1] -> features [B, C, H / 8, W / 8], raw (no norm, no scaling) or last.

        Raises:
            InputError: the shape is not [B, 3, H, W] with H and W multiples of `downscale`.
        """
        self.check_shape(lq)
        features: Tensor = self.conv_in(lq)
        for block in [*self.down_blocks, self.mid_block]:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                features = checkpoint(block, features, use_reentrant=False)
            else:
                features = block(features)
        if self.quant_conv is None:
            return features
        moments = self.conv_out(self.conv_act(self.conv_norm_out(features)))
        mean: Tensor = self.quant_conv(moments)
        return mean * self.config.scaling_factor

    def check_shape(self, lq: Tensor) -> None:
        """Raises InputError unless `lq` is [B, in_channels, H, W] with H and W multiples of `downscale`."""
        channels, step = self.config.in_channels, self.downscale
        shape = tuple(lq.shape)
        if len(shape) != 4 or shape[1] != channels:
            raise InputError(f"LQEncoder: got a tensor of shape {shape}; it must be [B, {channels}, H, W] in [-1, 1]")
        if shape[2] % step or shape[3] % step or not (shape[2] and shape[3]):
            raise InputError(
                f"LQEncoder: the picture is {shape[3]}x{shape[2]} px (width x height); "
                f"both must be positive multiples of {step}: pad right and bottom by replicating the edge"
            )

    @torch.no_grad()
    def encode(
        self,
        lq: Tensor,
        *,
        tile_px: int = 1024,
        tiling: Literal["exact", "released"] = "exact",
        store_device: torch.device | str | None = None,
    ) -> Tensor:
        """`forward` without gradients, for pictures of any size: what does not fit `tile_px` is taken in parts.

        "exact" walks the layers in bands of about tile_px x tile_px pixels and equals `forward` up to float rounding;
        the feature maps lie on `store_device` meanwhile (default: where `lq` is), the result too. "released" encodes
        overlapping tiles on their own and blends them as the released code does, seams included; like it, it tiles
        what is larger than tile_px / 8 (specification 2.6 and 2.10, 6).

        Raises:
            InputError: the shape is wrong (see `forward`), or the tiling is unknown or has a size it cannot use.
        """
        self.check_shape(lq)
        longest = max(lq.shape[2:])
        if tiling == "released":
            return self._encode_tiles(lq, tile_px) if longest > tile_px // self.downscale else self(lq)
        if tiling != "exact" or tile_px < 1:
            raise InputError(
                f"LQEncoder.encode: tiling={tiling!r}, tile_px={tile_px}; "
                'tiling must be "exact" or "released", and tile_px positive'
            )
        if longest <= tile_px:
            return self(lq)
        band_px = max(self.downscale, tile_px**2 // lq.shape[3])
        features = encode_banded(self, lq, band_px=band_px, store_device=store_device, quant_conv=self.quant_conv)
        return features if self.quant_conv is None else features * self.config.scaling_factor

    def _encode_tiles(self, lq: Tensor, tile_px: int) -> Tensor:
        """Tiles of tile_px at 3/4 of their size apart; the first quarter of each is blended with the one before."""
        if tile_px < 1 or tile_px % (4 * self.downscale):
            raise InputError(
                f"LQEncoder.encode: tile_px={tile_px} with tiling='released'; "
                f"it must be a positive multiple of {4 * self.downscale}, so that tiles lie on the feature grid"
            )
        stride_px, blend = tile_px * 3 // 4, tile_px // self.downscale // 4
        done: list[list[Tensor]] = []
        for y in range(0, lq.shape[2], stride_px):
            row: list[Tensor] = []
            for x in range(0, lq.shape[3], stride_px):
                tile = self(lq[:, :, y : y + tile_px, x : x + tile_px])
                if y:
                    tile = _ramp(done[-1][len(row)], tile, blend, dim=2)
                if x:
                    tile = _ramp(row[-1], tile, blend, dim=3)
                row.append(tile)
            done.append(row)
        return torch.cat([torch.cat([t[:, :, : 3 * blend, : 3 * blend] for t in row], dim=3) for row in done], dim=2)


def _ramp(before: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    """`tile` whose first `extent` cells along `dim` fade in over the last ones of `before`."""
    extent = min(extent, before.shape[dim], tile.shape[dim])
    weight = torch.arange(extent, device=tile.device, dtype=tile.dtype) / extent
    weight = weight.view(-1, 1) if dim == 2 else weight
    tail = before.narrow(dim, before.shape[dim] - extent, extent)
    head, rest = tile.split([extent, tile.shape[dim] - extent], dim=dim)
    return torch.cat([tail * (1 - weight) + head * weight, rest], dim=dim)

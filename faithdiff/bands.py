"""Runs a VAE's encoder or decoder over a large picture in horizontal bands, with the whole picture's result.

Overlapping tiles give every tile its own GroupNorm statistics and its own attention, hence seams. Here each layer
walks the whole feature map, band by band, instead: a 3x3 convolution takes one row of halo from the map itself,
GroupNorm first gathers the statistics of the whole map, attention lets the queries of a band see the keys of the whole
map. Only a band is on the accelerator at a time; the maps lie on `store_device`, which may be the CPU. Between bands
others may have the accelerator (`breaks`). The result equals that of the whole picture up to float rounding (4e-6 of
the largest value in float32).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from faithdiff.breaks import take_break

Rows = Callable[[int, int], Tensor]
"""`rows(top, bottom)`: rows top to bottom - 1 of a map [B, C, H, W], on the computing device."""


@torch.no_grad()
def encode_banded(
    encoder: nn.Module,
    picture: Tensor,
    *,
    band_px: int = 256,
    store_device: torch.device | str | None = None,
    quant_conv: nn.Conv2d | None = None,
) -> Tensor:
    """The features after the middle block of `encoder` (an `LQEncoder`, or a VAE's `.encoder`).

    With `quant_conv`, instead its output for those of the encoder's final norm, activation and convolution.

    picture [B, 3, H, W] in [-1, 1], H and W multiples of the downscale -> [B, C, H / 8, W / 8] on `store_device`.
    `band_px` is the height of a band, in rows of the map that is being walked: at every level a row is half as wide
    and at most twice as deep, so a band costs no more there. Full maps: two of [B, 128, H, W] at SDXL's size.
    """
    walk = _walk_for(encoder, picture, band_px, store_device)
    features = walk.encode(encoder, picture)
    return features if quant_conv is None else walk.pointwise(quant_conv, walk.head(encoder, features))


@torch.no_grad()
def encode_moments_banded(
    vae: AutoencoderKL, picture: Tensor, *, band_px: int = 256, store_device: torch.device | str | None = None
) -> Tensor:
    """What `vae.encode` makes its posterior of: mean and log-variance [B, 2 * latent channels, H / 8, W / 8].

    `DiagonalGaussianDistribution(moments).mode()` is the posterior mean. Arguments as in `encode_banded`.
    """
    walk = _walk_for(vae.encoder, picture, band_px, store_device)
    return walk.pointwise(vae.quant_conv, walk.head(vae.encoder, walk.encode(vae.encoder, picture)))


@torch.no_grad()
def decode_banded(
    vae: AutoencoderKL, latents: Tensor, *, band_px: int = 256, store_device: torch.device | str | None = None
) -> Tensor:
    """`vae.decode(latents).sample` in bands: latents [B, 4, h, w] (already divided by the VAE's scaling factor)
    -> picture [B, 3, 8 h, 8 w] about [-1, 1] on `store_device`. Arguments as in `encode_banded`.
    """
    walk = _walk_for(vae.decoder, latents, band_px, store_device)
    return walk.decode(vae.decoder, walk.pointwise(vae.post_quant_conv, latents))


def _walk_for(net: Any, x: Tensor, band_px: int, store_device: torch.device | str | None) -> _Walk:
    assert band_px >= 1
    weight = net.conv_in.weight
    return _Walk(band_px, weight.device, weight.dtype, torch.device(store_device or x.device))


@dataclass(frozen=True)
class _Walk:
    """How maps are walked. One method per kind of layer; each takes full maps and returns a full map."""

    band_px: int
    device: torch.device
    dtype: torch.dtype
    store_device: torch.device

    def encode(self, net: Any, picture: Tensor) -> Tensor:
        x = self.convolution(net.conv_in, picture)
        for block in net.down_blocks:
            for resnet in block.resnets:
                x = self.resnet(resnet, x)
            for downsampler in block.downsamplers or []:
                x = self.downsampler(downsampler.conv, x)
        return self.middle(net.mid_block, x)

    def decode(self, net: Any, latents: Tensor) -> Tensor:
        x = self.middle(net.mid_block, self.convolution(net.conv_in, latents))
        for block in net.up_blocks:
            for resnet in block.resnets:
                x = self.resnet(resnet, x)
            for upsampler in block.upsamplers or []:
                x = self.upsampler(upsampler.conv, x)
        return self.head(net, x)

    def middle(self, block: Any, x: Tensor) -> Tensor:
        x = self.resnet(block.resnets[0], x)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            if attention is not None:
                x = self.attention(attention, x)
            x = self.resnet(resnet, x)
        return x

    def head(self, net: Any, x: Tensor) -> Tensor:
        """The final norm, activation and convolution of an encoder or decoder."""
        normed = self.normed(net.conv_norm_out, x, net.conv_act)
        return self.fill(x.shape[2], lambda top, bottom: _conv3x3(net.conv_out, normed, x.shape[2], top, bottom))

    def convolution(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return self.fill(x.shape[2], lambda top, bottom: _conv3x3(conv, self.rows(x), x.shape[2], top, bottom))

    def pointwise(self, conv: nn.Conv2d | None, x: Tensor) -> Tensor:
        if conv is None:
            return x
        rows = self.rows(x)
        return self.fill(x.shape[2], lambda top, bottom: conv(rows(top, bottom)))

    def resnet(self, block: Any, x: Tensor) -> Tensor:
        height, skip = x.shape[2], self.rows(x)
        first = self.normed(block.norm1, x, block.nonlinearity)
        inner = self.fill(height, lambda top, bottom: _conv3x3(block.conv1, first, height, top, bottom))
        second = self.normed(block.norm2, inner, block.nonlinearity)

        def band(top: int, bottom: int) -> Tensor:
            identity = skip(top, bottom)
            if block.conv_shortcut is not None:
                identity = block.conv_shortcut(identity)
            return (identity + _conv3x3(block.conv2, second, height, top, bottom)) / block.output_scale_factor

        # A band reads no other row of x than those it replaces: no third map.
        return self.fill(height, band, out=x if block.conv_shortcut is None else None)

    def attention(self, block: Any, x: Tensor) -> Tensor:
        """Self-attention over the whole map: keys and values of all pixels, queries a band at a time."""
        height, width = x.shape[2:]
        normed, skip = self.normed(block.group_norm, x), self.rows(x)
        pairs = [(block.to_k(t), block.to_v(t)) for t in (_tokens(normed(*band)) for band in self.walk(height))]
        keys, values = (_heads(torch.cat(parts, dim=1), block.heads) for parts in zip(*pairs, strict=True))

        def band(top: int, bottom: int) -> Tensor:
            queries = _heads(block.to_q(_tokens(normed(top, bottom))), block.heads)
            seen = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
            change = block.to_out[0](seen).transpose(1, 2).unflatten(2, (bottom - top, width))
            return (change + skip(top, bottom)) / block.rescale_output_factor

        return self.fill(height, band, out=x)

    def downsampler(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Stride 2 with one column of zeros at the right and one row at the bottom."""
        height, rows = x.shape[2], self.rows(x)

        def band(top: int, bottom: int) -> Tensor:
            end = 2 * bottom + 1
            part = F.pad(rows(2 * top, min(end, height)), (0, 1, 0, max(end - height, 0)))
            return F.conv2d(part, conv.weight, conv.bias, stride=2)

        return self.fill(height // 2, band)

    def upsampler(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Nearest neighbour to twice the size, then a 3x3 convolution."""
        source = self.rows(x)

        def doubled(top: int, bottom: int) -> Tensor:
            first = top // 2
            part = source(first, -(-bottom // 2)).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            return part[:, :, top - 2 * first : bottom - 2 * first]

        height = 2 * x.shape[2]
        return self.fill(height, lambda top, bottom: _conv3x3(conv, doubled, height, top, bottom))

    def normed(self, norm: nn.GroupNorm, x: Tensor, activation: nn.Module | None = None) -> Rows:
        """Rows of `activation(norm(x))`, with the statistics of the whole map gathered in float32."""
        rows, (batch, channels, height, _) = self.rows(x), x.shape
        grouped = (rows(*band).float().unflatten(1, (norm.num_groups, -1)) for band in self.walk(height))
        parts = [torch.var_mean(band, dim=(2, 3, 4), correction=0) for band in grouped]
        variances, means = (torch.stack(part) for part in zip(*parts, strict=True))
        share = torch.tensor([bottom - top for top, bottom in self.bands(height)], device=self.device) / height
        share = share[:, None, None]
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        scale = (variance + norm.eps).rsqrt().repeat_interleave(channels // norm.num_groups, dim=1) * norm.weight
        shift = norm.bias - mean.repeat_interleave(channels // norm.num_groups, dim=1) * scale
        scale, shift = scale.view(batch, channels, 1, 1), shift.view(batch, channels, 1, 1)

        def normed_rows(top: int, bottom: int) -> Tensor:
            band = torch.addcmul(shift, rows(top, bottom).float(), scale).to(self.dtype)
            return band if activation is None else activation(band)

        return normed_rows

    def rows(self, x: Tensor) -> Rows:
        return lambda top, bottom: x[:, :, top:bottom].to(self.device, self.dtype)

    def bands(self, height: int) -> list[tuple[int, int]]:
        return [(top, min(top + self.band_px, height)) for top in range(0, height, self.band_px)]

    def walk(self, height: int) -> Iterator[tuple[int, int]]:
        """The bands, with a break after each."""
        for band in self.bands(height):
            yield band
            take_break()

    def fill(self, height: int, band: Rows, out: Tensor | None = None) -> Tensor:
        """A full map of `height` rows on the store device, computed by `band(top, bottom)`."""
        for top, bottom in self.walk(height):
            part = band(top, bottom)
            if out is None:
                shape = (*part.shape[:2], height, part.shape[3])
                out = torch.empty(shape, dtype=part.dtype, device=self.store_device)
            out[:, :, top:bottom] = part
        assert out is not None
        return out


def _conv3x3(conv: nn.Conv2d, rows: Rows, height: int, top: int, bottom: int) -> Tensor:
    """Rows top to bottom - 1 of a 3x3 convolution with padding 1 over a map of `height` rows."""
    part = rows(max(top - 1, 0), min(bottom + 1, height))
    part = F.pad(part, (0, 0, int(top == 0), int(bottom == height)))
    return F.conv2d(part, conv.weight, conv.bias, padding=(0, 1))


def _tokens(band: Tensor) -> Tensor:
    return band.flatten(2).transpose(1, 2)


def _heads(tokens: Tensor, heads: int) -> Tensor:
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)

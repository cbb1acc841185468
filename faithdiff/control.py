"""ControlNet-style conditioning of a fixed UNet: a trainable copy of its encoder modulates its skips (an ablation).

The copy takes the aligned features f_a where the UNet itself takes plain f_x; each of its feature maps c turns the
UNet's own map h of the same place into h + (h * scale(c) + shift(c)). Scale and shift are 1x1 convolutions that start
at zero, so that an untrained branch changes nothing.

Source: ControlNet (Zhang et al. 2023) for the copy, spatial feature transform (Wang et al. 2018) for the modulation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from faithdiff.prepared_text import PreparedText


class ControlBranch(nn.Module):
    """A copy of a UNet's down blocks and middle block, and what modulates the UNet by them.

    It shares the UNet's embedding of timestep, text and sizes.
    """

    def __init__(self, down_blocks: nn.ModuleList, mid_block: nn.Module, entrance_channels: int) -> None:
        super().__init__()
        self.down_blocks = copy.deepcopy(down_blocks).requires_grad_(True)
        self.mid_block = copy.deepcopy(mid_block).requires_grad_(True)
        channels = [entrance_channels, *_skip_channels(down_blocks)]
        self.skip_sft = nn.ModuleList(FeatureTransform(width) for width in channels)
        self.mid_sft = FeatureTransform(channels[-1])

    def forward(
        self,
        aligned: Tensor,
        emb: Tensor,
        encoder_hidden_states: Tensor | PreparedText,
        hidden: Tensor,
        skips: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The UNet's middle output and skips, modulated by what the branch makes of f_a [B, C, H, W]."""
        own_hidden, own_skips = run_encoder(self.down_blocks, self.mid_block, aligned, emb, encoder_hidden_states)
        modulated = (sft(h, c) for sft, h, c in zip(self.skip_sft, skips, own_skips, strict=True))
        return self.mid_sft(hidden, own_hidden), tuple(modulated)


class FeatureTransform(nn.Module):
    """h + (h * scale(c) + shift(c)) for maps of one shape; the identity until trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Conv2d(channels, channels, 1)
        self.shift = nn.Conv2d(channels, channels, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        modulated: Tensor = hidden + (hidden * self.scale(condition) + self.shift(condition))
        return modulated


def run_encoder(
    down_blocks: Iterable[nn.Module],
    mid_block: nn.Module,
    features: Tensor,
    emb: Tensor,
    encoder_hidden_states: Tensor | PreparedText,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The middle block's output and all skips, of `features` [B, C, H, W], which are the first skip."""
    skips: tuple[Tensor, ...] = (features,)
    hidden = features
    for block in down_blocks:
        hidden, block_skips = block(hidden_states=hidden, temb=emb, **text_of(block, encoder_hidden_states))
        skips += block_skips
    return mid_block(hidden, emb, **text_of(mid_block, encoder_hidden_states)), skips


def text_of(block: nn.Module, encoder_hidden_states: Tensor | PreparedText) -> dict[str, Any]:
    """The text as a block takes it: not at all where it has no cross-attention."""
    has_text = getattr(block, "has_cross_attention", False)
    return {"encoder_hidden_states": encoder_hidden_states} if has_text else {}


def _skip_channels(down_blocks: Iterable[Any]) -> list[int]:
    """Channels of the skips that the blocks add: one per residual block and one per down-sampler."""
    channels: list[int] = []
    for block in down_blocks:
        channels += [resnet.out_channels for resnet in block.resnets]
        channels += [block.resnets[-1].out_channels for _ in block.downsamplers or ()]
    return channels

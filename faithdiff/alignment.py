"""The alignment module: features of the low-quality picture meet the noisy latents (paper Sec. 3.2, Eq. 1).

Shapes: B pictures, C latent channels of the UNet's first convolution (320 in SDXL), L channels of the LQ features
(512), H x W latent cells, N = H * W tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faithdiff.errors import InputError

AlignmentAttention = Literal["value", "tokens"]
ATTENTION_MODES: tuple[AlignmentAttention, ...] = ("value", "tokens")

NUM_BLOCKS = 2
NUM_HEADS = 8
MLP_RATIO = 2


class AlignmentModule(nn.Module):
    """f_a = f_x + Linear(blocks([f_x; f_m])), where f_m embeds the LQ features.

    Eq. 1 of the paper has f_x inside the Linear, which the channel counts forbid; this is the released order. Both
    the last convolution of the embedding and the Linear start at zero, so an untrained module passes f_x through.

    `attention` says what attends to what:

    - "value": nothing does. The released blocks run softmax over the batch axis; at inference that axis holds two
      equal rows and the result is exactly the value path of each pixel. What the released weights need.
    - "tokens": all tokens of one picture attend to each other, the paper's reading. Needs weights trained so.

    Either way a picture's result never depends on the other pictures in its batch.
    """

    def __init__(
        self, latent_channels: int = 320, lq_channels: int = 512, attention: AlignmentAttention = "value"
    ) -> None:
        super().__init__()
        if attention not in ATTENTION_MODES:
            raise InputError(f"alignment: attention is {attention!r}; it must be one of {', '.join(ATTENTION_MODES)}")
        self.condition = LQConditionEmbedding(lq_channels, latent_channels)
        width = 2 * latent_channels
        self.blocks = nn.ModuleList(AlignmentBlock(width, attention) for _ in range(NUM_BLOCKS))
        self.proj = nn.Linear(width, latent_channels)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    @property
    def attention(self) -> AlignmentAttention:
        """The mode that all blocks run in."""
        block = self.blocks[0]
        assert isinstance(block, AlignmentBlock)
        return block.attn.mode

    @attention.setter
    def attention(self, mode: AlignmentAttention) -> None:
        for block in self.blocks:
            assert isinstance(block, AlignmentBlock)
            block.attn.mode = mode

    def forward(self, latent_features: Tensor, lq_features: Tensor) -> Tensor:
        """Aligned features f_a [B, C, H, W] of latent features f_x [B, C, H, W] and LQ features [B, L, H, W]."""
        return self.align(latent_features, self.embed(lq_features))

    def embed(self, lq_features: Tensor) -> Tensor:
        """f_m [B, C, H, W]: the same at every timestep, so a picture's is computed once."""
        embedded: Tensor = self.condition(lq_features)
        return embedded

    def align(self, latent_features: Tensor, lq_embedding: Tensor) -> Tensor:
        """f_a [B, C, H, W] of f_x and f_m, both [B, C, H, W]."""
        height, width = latent_features.shape[-2:]
        tokens_BNC = torch.cat([latent_features, lq_embedding], dim=1).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens_BNC = block(tokens_BNC)
        residual = self.proj(tokens_BNC).transpose(1, 2).unflatten(2, (height, width))
        return latent_features + residual


class LQConditionEmbedding(nn.Module):
    """f_m: GroupNorm -> 3x3 convolution -> SiLU -> 3x3 convolution that starts at zero (the paper draws one conv)."""

    def __init__(self, lq_channels: int, latent_channels: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(32, lq_channels, eps=1e-6)
        self.conv_in = nn.Conv2d(lq_channels, lq_channels, 3, padding=1)
        self.conv_out = nn.Conv2d(lq_channels, latent_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        if self.conv_out.bias is not None:
            nn.init.zeros_(self.conv_out.bias)

    def forward(self, lq_features: Tensor) -> Tensor:
        hidden: Tensor = self.conv_in(self.norm_in(lq_features))
        embedded: Tensor = self.conv_out(F.silu(hidden))
        return embedded


class AlignmentBlock(nn.Module):
    """Pre-LN residual block: attention, then an MLP of ratio 2 with QuickGELU."""

    def __init__(self, width: int, attention: AlignmentAttention) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = AlignmentSelfAttention(width, attention)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = QuickGELUMLP(width)

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        tokens_BNC = tokens_BNC + self.attn(self.ln_1(tokens_BNC))
        result: Tensor = tokens_BNC + self.mlp(self.ln_2(tokens_BNC))
        return result


class AlignmentSelfAttention(nn.Module):
    """Eight-head attention over the tokens of one picture, or its value path alone; parameters are the same."""

    def __init__(self, width: int, mode: AlignmentAttention) -> None:
        super().__init__()
        self.mode = mode
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        mixed = self._value_path(tokens_BNC) if self.mode == "value" else self._attend(tokens_BNC)
        result: Tensor = self.out_proj(mixed)
        return result

    def _value_path(self, tokens_BNC: Tensor) -> Tensor:
        width = tokens_BNC.shape[-1]
        return F.linear(tokens_BNC, self.in_proj_weight[2 * width :], self.in_proj_bias[2 * width :])

    def _attend(self, tokens_BNC: Tensor) -> Tensor:
        packed = F.linear(tokens_BNC, self.in_proj_weight, self.in_proj_bias)
        query, key, value = (
            part.unflatten(2, (NUM_HEADS, -1)).transpose(1, 2) for part in packed.chunk(3, dim=-1)
        )  # each [B, heads, N, C / heads]
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class QuickGELUMLP(nn.Module):
    """Linear -> x * sigmoid(1.702 x) -> Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, MLP_RATIO * width)
        self.c_proj = nn.Linear(MLP_RATIO * width, width)

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        hidden = self.c_fc(tokens_BNC)
        result: Tensor = self.c_proj(hidden * torch.sigmoid(1.702 * hidden))
        return result

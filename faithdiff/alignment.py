"""The alignment module: features of the low-quality picture meet the noisy latents (paper Sec. 3.2, Eq. 1).

Shapes: B pictures, C latent channels of the UNet's first convolution (320 in SDXL), L channels of the LQ features
(512), H x W latent cells, N = H * W tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faithdiff.errors import InputError

AlignmentAttention = Literal["value", "tokens"]
ATTENTION_MODES: tuple[AlignmentAttention, ...] = ("value", "tokens")
AlignmentKind = Literal["transformer", "sum"]
ALIGNMENT_KINDS: tuple[AlignmentKind, ...] = ("transformer", "sum")
RELEASED_BATCH_GROUP = 16

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

    Either way a picture's result never depends on the other pictures in its batch. `set_batch_attention` adds a third
    mode, for training alone. With `kind="sum"` there is no transformer at all, f_a = f_x + f_m (an ablation), and
    `attention` means nothing.
    """

    def __init__(
        self,
        latent_channels: int = 320,
        lq_channels: int = 512,
        attention: AlignmentAttention = "value",
        kind: AlignmentKind = "transformer",
    ) -> None:
        super().__init__()
        _check_attention(attention)
        if kind not in ALIGNMENT_KINDS:
            raise InputError(f"alignment: kind is {kind!r}; it must be one of {', '.join(ALIGNMENT_KINDS)}")
        self.condition = LQConditionEmbedding(lq_channels, latent_channels)
        width = 2 * latent_channels
        num_blocks = NUM_BLOCKS if kind == "transformer" else 0
        self.blocks = nn.ModuleList(AlignmentBlock(width, attention) for _ in range(num_blocks))
        self.proj = nn.Linear(width, latent_channels) if kind == "transformer" else None
        if self.proj is not None:
            nn.init.zeros_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)

    @property
    def attention(self) -> AlignmentAttention:
        """The mode in which the module restores."""
        attentions = self._attentions()
        mode = attentions[0].mode if attentions else "value"
        return "value" if mode == "batch" else mode

    @attention.setter
    def attention(self, mode: AlignmentAttention) -> None:
        _check_attention(mode)
        for attn in self._attentions():
            attn.mode = mode

    def set_batch_attention(self, group: int = RELEASED_BATCH_GROUP) -> None:
        """At every pixel, `group` consecutive rows of a training batch attend to each other, as in released training.

        The released blocks mix the batch of one GPU (16 pictures). Groups of a fixed size make the result independent
        of the number of workers and of how many groups a micro-batch holds. In eval mode it is "value", to which the
        released network comes down at inference: its batch is then one row, twice. Weights trained so restore with
        "value", the only mode of the two that a config can name.

        Raises:
            InputError: the group is not positive, or this module has no transformer.
        """
        if group < 1:
            raise InputError(f"alignment: a group of {group} rows cannot attend to each other; give 1 or more")
        if not self.blocks:
            raise InputError("alignment: kind 'sum' has no attention to set; use kind 'transformer'")
        for attn in self._attentions():
            attn.mode, attn.batch_group = "batch", group

    def _attentions(self) -> list[AlignmentSelfAttention]:
        return [module for module in self.modules() if isinstance(module, AlignmentSelfAttention)]

    def forward(self, latent_features: Tensor, lq_features: Tensor) -> Tensor:
        """Aligned features f_a [B, C, H, W] of latent features f_x [B, C, H, W] and LQ features [B, L, H, W]."""
        return self.align(latent_features, self.embed(lq_features))

    def embed(self, lq_features: Tensor) -> Tensor:
        """f_m [B, C, H, W]: the same at every timestep, so a picture's is computed once."""
        embedded: Tensor = self.condition(lq_features)
        return embedded

    def align(self, latent_features: Tensor, lq_embedding: Tensor) -> Tensor:
        """f_a [B, C, H, W] of f_x and f_m, both [B, C, H, W]."""
        if self.proj is None:
            return latent_features + lq_embedding
        height, width = latent_features.shape[-2:]
        tokens_BNC = torch.cat([latent_features, lq_embedding], dim=1).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens_BNC = block(tokens_BNC)
        residual: Tensor = self.proj(tokens_BNC).transpose(1, 2).unflatten(2, (height, width))
        return latent_features + residual


class LQConditionEmbedding(nn.Module):
    """f_m: GroupNorm -> 3x3 convolution -> SiLU -> 3x3 convolution that starts at zero (the paper draws one conv).

    32 groups, as released; where the LQ features have fewer channels, the most of 32 that divide them.
    """

    def __init__(self, lq_channels: int, latent_channels: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(math.gcd(32, lq_channels), lq_channels, eps=1e-6)
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
    """Eight-head attention in one of the modes of `AlignmentModule`; parameters are the same."""

    def __init__(self, width: int, mode: AlignmentAttention) -> None:
        super().__init__()
        self.mode: Literal["value", "tokens", "batch"] = mode
        self.batch_group = RELEASED_BATCH_GROUP
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        if self.mode == "tokens":
            mixed = self._attend(tokens_BNC)
        elif self.mode == "batch" and self.training:
            mixed = self._attend_across_rows(tokens_BNC)
        else:
            mixed = self._value_path(tokens_BNC)
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

    def _attend_across_rows(self, tokens_BNC: Tensor) -> Tensor:
        """Pixels take the place of the batch, rows that of tokens: [groups * N, group, C] goes through `_attend`."""
        rows, num_tokens, _ = tokens_BNC.shape
        if rows % self.batch_group:
            raise InputError(
                f"alignment: {rows} rows are no whole number of groups of {self.batch_group} that see each other; "
                f"give a multiple of {self.batch_group} rows or set another group"
            )
        by_pixel = tokens_BNC.unflatten(0, (-1, self.batch_group)).transpose(1, 2)
        mixed = self._attend(by_pixel.flatten(0, 1))
        return mixed.unflatten(0, (-1, num_tokens)).transpose(1, 2).flatten(0, 1)


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


def _check_attention(mode: str) -> None:
    if mode not in ATTENTION_MODES:
        raise InputError(f"alignment: attention is {mode!r}; it must be one of {', '.join(ATTENTION_MODES)}")

"""Text keys and values, projected once per picture: what every cross-attention would recompute at every step.

A `PreparedText` travels through diffusers' blocks in the place of `encoder_hidden_states`; the processors installed
here unwrap it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn


@dataclass(frozen=True)
class PreparedText:
    """Per cross-attention layer the keys and values [P, heads, 77, D / heads] of P prompts, and each row's prompt.

    `rows` [B] int64 names the prompt of every row of the batch; None means that row i has prompt i.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    rows: Tensor | None = None

    def of_layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, 77, D / heads] of one layer."""
        key, value = self.layers[index]
        return (key, value) if self.rows is None else (key[self.rows], value[self.rows])

    @staticmethod
    def batch(texts: Sequence[PreparedText], rows: Sequence[tuple[int, int]]) -> PreparedText:
        """One text for a batch whose rows take prompt `p` of `texts[i]`, given as pairs (i, p)."""
        firsts = [0]
        for text in texts:
            firsts.append(firsts[-1] + len(text.layers[0][0]))
        device = texts[0].layers[0][0].device
        index = torch.tensor([firsts[i] + p for i, p in rows]).to(device, non_blocking=True)
        if len(texts) == 1:
            return PreparedText(texts[0].layers, index)
        keys_and_values = zip(*(text.layers for text in texts), strict=True)
        layers = tuple((torch.cat([k for k, _ in kv]), torch.cat([v for _, v in kv])) for kv in keys_and_values)
        return PreparedText(layers, index)


class PreparedTextAttnProcessor(AttnProcessor2_0):
    """Cross-attention that takes its keys and values from a `PreparedText`; plain tensors go diffusers' own way."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | PreparedText | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not isinstance(encoder_hidden_states, PreparedText):
            plain: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
            return plain
        key, value = encoder_hidden_states.of_layer(self.layer)
        query = _split_heads(attn.to_q(hidden_states), attn.heads)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        result: Tensor = attn.to_out[1](attn.to_out[0](mixed))
        return result / attn.rescale_output_factor


def install_text_layers(unet: nn.Module) -> None:
    """Numbers the cross-attentions of a UNet and gives each the processor that understands `PreparedText`."""
    for layer, attn in enumerate(_cross_attentions(unet)):
        attn.set_processor(PreparedTextAttnProcessor(layer))


def prepare_text(unet: nn.Module, encoder_hidden_states: Tensor) -> PreparedText:
    """Keys and values of [P, 77, D] text for every cross-attention of `unet`."""
    return PreparedText(
        tuple(
            (
                _split_heads(attn.to_k(encoder_hidden_states), attn.heads),
                _split_heads(attn.to_v(encoder_hidden_states), attn.heads),
            )
            for attn in _cross_attentions(unet)
        )
    )


def _cross_attentions(unet: nn.Module) -> list[Attention]:
    return [module for name, module in unet.named_modules() if name.endswith(".attn2")]


def _split_heads(projected: Tensor, heads: int) -> Tensor:
    return projected.unflatten(2, (heads, -1)).transpose(1, 2)

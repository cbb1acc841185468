"""Prompt -> SDXL text conditioning with both text encoders (specification 2.3).

In : prompts (captions), the two CLIP tokenizers and text encoders of an SDXL bundle.
Out: `prompt_embeds` float [B, 77, D1 + D2], `pooled_prompt_embeds` float [B, P], in the encoders' dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from faithdiff.errors import InputError

NUM_TOKENS = 77


@dataclass(frozen=True)
class TokenIds:
    """The prompts as both tokenizers see them: int64 [B, 77] each. Small enough to cache with a dataset."""

    ids: Tensor
    ids_2: Tensor


@dataclass(frozen=True)
class PromptEmbeds:
    """Text conditioning of B prompts: tokens for cross-attention, pooled state for the added embedding."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor


def encode_prompts(
    prompts: str | Sequence[str], tokenizer: Any, tokenizer_2: Any, text_encoder: Any, text_encoder_2: Any
) -> PromptEmbeds:
    """Conditioning of each prompt; `""` is encoded like any other text, as in training, and is never zeros.

    Prompts are cut at 77 tokens. No gradients are recorded.

    Raises:
        InputError: no prompt at all, or something that is not text.
    """
    return encode_ids(tokenize(prompts, tokenizer, tokenizer_2), text_encoder, text_encoder_2)


def tokenize(prompts: str | Sequence[str], tokenizer: Any, tokenizer_2: Any) -> TokenIds:
    """Both tokenizers' ids, padded as each of them pads (SDXL: the first with EOS, the second with id 0)."""
    texts = _checked(prompts)
    return TokenIds(_token_ids(texts, tokenizer), _token_ids(texts, tokenizer_2))


@torch.no_grad()
def encode_ids(token_ids: TokenIds, text_encoder: Any, text_encoder_2: Any) -> PromptEmbeds:
    """Conditioning from ids. The ids are moved to the device of each encoder; nothing waits for the device.

    Source: pipeline_FaithDiff_tlc.py:485-717 @ f11af6c, which like SDXL takes the last but one hidden state.
    """
    first = text_encoder(token_ids.ids.to(text_encoder.device), output_hidden_states=True)
    second = text_encoder_2(token_ids.ids_2.to(text_encoder_2.device), output_hidden_states=True)
    hidden, hidden_2 = first.hidden_states[-2], second.hidden_states[-2]
    return PromptEmbeds(torch.cat([hidden, hidden_2.to(hidden)], dim=-1), second.text_embeds)


def _token_ids(texts: list[str], tokenizer: Any) -> Tensor:
    # Captions of two long sentences are cut here on purpose, as the encoders have no more positions.
    encoded = tokenizer(texts, padding="max_length", max_length=NUM_TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


def _checked(prompts: str | Sequence[str]) -> list[str]:
    texts = list(prompts) if isinstance(prompts, Iterable) and not isinstance(prompts, str) else [prompts]
    wrong = [text for text in texts if not isinstance(text, str) or not _is_unicode(text)]
    if wrong or not texts:
        came = f"{wrong[0]!r}" if wrong else "none"
        raise InputError(f'text: got {came} as a prompt; give a text for each picture, "" for no text')
    return texts


def _is_unicode(text: str) -> bool:
    """False for half a surrogate pair, on which the tokenizers raise TypeError."""
    return not any("\ud800" <= character <= "\udfff" for character in text)

"""Where the words of a prompt act: DAAM for FaithDiff's UNet (Tang et al. 2022, arXiv 2210.04885).

    restored, maps = record_attention(pipeline, picture, RestorationRequest(prompt="a cat on a wall"))
    maps.of_word("cat")                       # [H, W]: the share of attention that the word has in each latent cell

Every cross-attention spreads each place's attention over the 77 tokens. These shares are averaged over heads, layers
and steps, enlarged to latent cells, and the tiles are blended as their latents are. In every cell the shares of all
tokens add up to one. DAAM gives a word of several tokens their mean and lets cubic enlargement fall below zero; here
a word has the sum of its tokens and enlargement is linear, which keeps them shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from PIL import Image
from torch import Tensor, nn

from faithdiff.denoiser import Canvas, TileJob, step_tiles
from faithdiff.errors import InputError
from faithdiff.pipeline import FaithDiffPipeline, RestorationResult, timed
from faithdiff.prepared_text import PreparedText, PreparedTextAttnProcessor
from faithdiff.request import RestorationRequest
from faithdiff.text import NUM_TOKENS

_FINEST_HALVINGS = 6
_WORD_END = "</w>"
# From dark blue over red to yellow: brighter is always more, also without colours.
_COLOURS = ((13, 8, 135), (156, 23, 158), (237, 121, 83), (240, 249, 33))
_MOST_COVERED = 0.75


@dataclass(frozen=True)
class AttentionMaps:
    """`token_shares` [77, H, W] fp32: each token's share of the attention of each latent cell; `prompt` it is about."""

    token_shares: Tensor
    prompt: str
    tokenizer: Any

    def of_word(self, word: str) -> Tensor:
        """[H, W] fp32 in [0, 1]: the share of all tokens of a word or phrase, wherever the prompt has it.

        Raises:
            InputError: the prompt does not have it, or was cut before it.
        """
        return self.token_shares[word_positions(self.prompt, word, self.tokenizer)].sum(dim=0)


class AttentionRecorder:
    """Sums the cross-attention of one canvas, tile by tile; `tokens` are their averages over layers and steps."""

    def __init__(self, canvas: Canvas) -> None:
        self.plan, self.num_prompts = canvas.plan, canvas.condition.num_prompts
        self._sums = torch.zeros(self.plan.num_tiles, NUM_TOKENS, *self.plan.tile)
        self._pass: dict[int, Tensor] = {}

    def record(self, attn: Attention, layer: int, hidden_states: Tensor, text: PreparedText) -> None:
        """Takes the attention of one layer, of the prompt alone: the negative prompt's rows come before its row.

        A tile that is computed again in fp32 passes every layer again, and replaces what it left here.
        """
        row = len(hidden_states) // self.num_prompts * (self.num_prompts - 1)
        shares_ST = attention_shares(attn, layer, hidden_states[row : row + 1], text, row)
        self._pass[layer] = on_grid(shares_ST, self.plan.tile)

    def finish_tile(self, tile: int) -> None:
        """Adds what the pass over a tile left, averaged over its layers."""
        assert self._pass, "no cross-attention was seen: was the UNet called with prepared text?"
        self._sums[tile] += torch.stack(list(self._pass.values())).mean(dim=0).cpu()
        self._pass.clear()

    def tokens(self, num_steps: int) -> Tensor:
        """[77, H, W] fp32 of the whole canvas after `num_steps` steps."""
        return self.plan.blend(self._sums / num_steps)[0]


@torch.inference_mode()
def record_attention(
    pipeline: FaithDiffPipeline,
    image: Image.Image | np.ndarray,
    request: RestorationRequest,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[RestorationResult, AttentionMaps]:
    """Restores a picture as `pipeline` would, bit by bit, and keeps where its prompt's tokens acted.

    Costs one more product of queries and keys per cross-attention, and steps one tile at a time.
    `on_step(step, num_steps)` follows every step.

    Raises:
        InputError: a setting is out of range, or the prompt came as embeddings, in which words cannot be found.
        FloatingPointError: the weights give no finite result even in fp32.
    """
    if request.prompt_embeds is not None:
        raise InputError("attention maps: the prompt came as embeddings; give it as text, whose words can be found")
    restoration = pipeline.prepare(image, request)
    canvas = restoration.canvas
    recorder = AttentionRecorder(canvas)
    with timed(restoration.seconds, "denoise"), recording(pipeline.unet, recorder):
        while not canvas.is_done:
            for tile in canvas.pending_tiles():
                step_tiles(pipeline.unet, [TileJob(canvas, tile)], tiles_per_batch=pipeline.tiles_per_batch)
                recorder.finish_tile(tile)
            canvas.finish_step()
            if on_step is not None:
                on_step(canvas.step, canvas.schedule.num_steps)
    maps = AttentionMaps(recorder.tokens(canvas.step), request.prompt, pipeline.tokenizer)
    return pipeline.finish(restoration), maps


@contextmanager
def recording(unet: nn.Module, recorder: AttentionRecorder) -> Iterator[None]:
    """Every cross-attention of `unet` also tells the recorder; afterwards each has its own processor again."""
    layers = [
        module
        for module in unet.modules()
        if isinstance(module, Attention) and isinstance(module.processor, PreparedTextAttnProcessor)
    ]
    own = [attn.processor for attn in layers]
    try:
        for attn, processor in zip(layers, own, strict=True):
            attn.set_processor(_Telling(processor, recorder))
        yield
    finally:
        for attn, processor in zip(layers, own, strict=True):
            attn.set_processor(processor)


class _Telling:
    """A processor that computes what the one in it computes, and shows the recorder what came in."""

    def __init__(self, processor: PreparedTextAttnProcessor, recorder: AttentionRecorder) -> None:
        self.processor, self.recorder = processor, recorder

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | PreparedText | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        assert isinstance(encoder_hidden_states, PreparedText), "the pipeline's UNet takes prepared text"
        self.recorder.record(attn, self.processor.layer, hidden_states, encoder_hidden_states)
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)


def attention_shares(attn: Attention, layer: int, hidden_states: Tensor, text: PreparedText, row: int) -> Tensor:
    """[S, 77] fp32: how the S places of one row [1, S, C] spread their attention over its tokens, mean of the heads."""
    key_HTD = text.of_layer(layer)[0][row].float()
    query_HSD = attn.to_q(hidden_states)[0].unflatten(1, (attn.heads, -1)).transpose(0, 1).float()
    scores = query_HSD @ key_HTD.transpose(1, 2) / query_HSD.shape[-1] ** 0.5
    return scores.softmax(dim=-1).mean(dim=0)


def on_grid(shares_ST: Tensor, tile: tuple[int, int]) -> Tensor:
    """Shares [S, T] of a layer's places as maps [T, h, w] in the cells of a tile, which the layer sees halved often."""
    for halvings in range(_FINEST_HALVINGS):
        height, width = (math.ceil(side / 2**halvings) for side in tile)
        if height * width == len(shares_ST):
            maps = shares_ST.T.unflatten(1, (height, width))
            return F.interpolate(maps[None], size=tile, mode="bilinear", align_corners=False)[0]
    raise AssertionError(f"{len(shares_ST)} places are no halving of a tile of {tile[0]} x {tile[1]} cells")


def word_positions(prompt: str, word: str, tokenizer: Any) -> list[int]:
    """Positions among the 77 tokens of a word or phrase of the prompt, every time that it occurs.

    Raises:
        InputError: the prompt does not have it, or it lies beyond the 77 tokens that the encoders read.
    """
    wanted = tokenizer(word, add_special_tokens=False).input_ids
    tokens = tokenizer(prompt, add_special_tokens=False).input_ids
    ends_word = [str(token).endswith(_WORD_END) for token in tokenizer.convert_ids_to_tokens(tokens)]
    starts = [
        start
        for start in range(len(tokens) - len(wanted) + 1)
        if wanted and tokens[start : start + len(wanted)] == wanted and (start == 0 or ends_word[start - 1])
    ]
    # One position is the start token's and one the end token's.
    read = [start for start in starts if start + len(wanted) <= NUM_TOKENS - 2]
    if not starts:
        raise InputError(f"attention maps: {word!r} is not a word of the prompt {prompt!r}; give one that is")
    if not read:
        raise InputError(
            f"attention maps: {word!r} comes after the {NUM_TOKENS} tokens that are read of a prompt; shorten it"
        )
    return [1 + start + offset for start in read for offset in range(len(wanted))]


def overlay(image: Image.Image, share_HW: Tensor) -> Image.Image:
    """The picture with a map over it: from nothing, where the share is least, to yellow, where it is greatest."""
    low, high = float(share_HW.min()), float(share_HW.max())
    level = (share_HW - low) / (high - low) if high > low else torch.zeros_like(share_HW)
    enlarged = F.interpolate(level[None, None], size=(image.height, image.width), mode="bicubic", align_corners=False)
    level_HW1 = enlarged[0, 0].clamp(0, 1).numpy()[..., None]
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    stops = np.array(_COLOURS, dtype=np.float32)
    colours = np.concatenate(
        [np.interp(level_HW1, np.linspace(0, 1, len(stops)), stops[:, channel]) for channel in range(3)], axis=2
    )
    mixed = grey * (1 - _MOST_COVERED * level_HW1) + colours * _MOST_COVERED * level_HW1
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))

"""What steers the denoising of one picture: LQ features, text of both guidance halves, micro-conditioning per tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from faithdiff.denoiser import Condition
from faithdiff.encoder import LQEncoder
from faithdiff.precision import finite_or_float32
from faithdiff.request import RestorationRequest
from faithdiff.text import PromptEmbeds, encode_prompts
from faithdiff.tiling import CELL_PX, TilePlan


def build_condition(
    picture: Tensor, plan: TilePlan, request: RestorationRequest, *, lq_encoder: LQEncoder, text: PromptEmbeds
) -> Condition:
    """The condition of a picture [1, 3, 8 H, 8 W] in [-1, 1], with text rows as `text_rows` gives them."""
    device = picture.device
    return Condition(
        lq_features=encode_lq(lq_encoder, picture, request),
        prompt_embeds=text.prompt_embeds.to(device),
        pooled_prompt_embeds=text.pooled_prompt_embeds.to(device),
        time_ids=tile_time_ids(plan, request).to(device),
    )


def encode_lq(lq_encoder: LQEncoder, picture: Tensor, request: RestorationRequest) -> Tensor:
    """LQ features [1, L, H, W] of the whole picture, so that every tile's conditioning knows what lies beyond it."""

    def encode(dtype: torch.dtype) -> Tensor:
        return lq_encoder.encode(picture.to(dtype), tile_px=request.vae_tile_px, tiling=request.switches.vae_tiling)

    return finite_or_float32(lq_encoder, encode, what="lq encoder")


def text_rows(request: RestorationRequest, components: dict[str, Any]) -> PromptEmbeds:
    """Text of the rows the UNet will see: (negative, positive) under guidance, positive alone without."""
    prompts = [(request.prompt, request.prompt_embeds)]
    if request.has_guidance:
        prompts.insert(0, (request.negative_prompt, request.negative_prompt_embeds))
    names = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    rows = [
        given if given is not None else encode_prompts([prompt], *(components[name] for name in names))
        for prompt, given in prompts
    ]
    return PromptEmbeds(
        torch.cat([row.prompt_embeds for row in rows]), torch.cat([row.pooled_prompt_embeds for row in rows])
    )


def tile_time_ids(plan: TilePlan, request: RestorationRequest) -> Tensor:
    """SDXL's micro-conditioning [N, 6] fp32 of each tile: canvas height, width, tile top, left, tile height, width.

    All in pixels, as in training. The released code gives top and left in latent cells and rounds everything to
    fp16, which our switches reproduce (specification 2.5). The tile size is the requested one even where the canvas
    is smaller.
    """
    offset_unit = CELL_PX if request.switches.tile_offsets == "pixels" else 1
    canvas_px = [side * CELL_PX for side in plan.canvas]
    rows = [[*canvas_px, i * offset_unit, j * offset_unit, *request.tile_size_px] for i, j in plan.origins]
    time_ids = torch.tensor(rows, dtype=torch.float32)
    return time_ids.half().float() if request.switches.time_ids == "float16" else time_ids

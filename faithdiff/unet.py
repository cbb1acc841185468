"""SDXL's UNet with the alignment module at its entrance (paper Sec. 3.2): noisy latents + LQ features -> noise.

Shapes: B rows, C channels of the first block (320 in SDXL), L channels of the LQ features, H x W latent cells.
A row is one tile of one picture under one prompt; rows never influence each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from faithdiff.alignment import RELEASED_BATCH_GROUP, AlignmentAttention, AlignmentKind, AlignmentModule
from faithdiff.control import ControlBranch, run_encoder, text_of
from faithdiff.prepared_text import PreparedText, install_text_layers, prepare_text


def _with_unet_parameters(init: Callable[..., None]) -> Callable[..., None]:
    """Shows diffusers, which reads configs by signature, the parent's parameters in place of `**unet_config`."""
    own = [p for p in inspect.signature(init).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    names = {p.name for p in own}
    parents = inspect.signature(UNet2DConditionModel.__init__).parameters.values()
    merged = own + [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parents if p.name not in names]
    init.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
    return init


class FaithDiffUNet(UNet2DConditionModel):
    """`UNet2DConditionModel` of any SDXL-shaped config, plus `alignment` between `conv_in` and the first block.

    `from_config(unet_config, lq_channels=512, alignment_attention="value" | "tokens")` and `from_pretrained` work as
    in diffusers. `add_sample=False` drops the residual f_x (no released setting uses it).

    Ablations of the paper: `alignment_kind="sum"` has no alignment transformer (`AlignmentModule`); with
    `has_control=True` the aligned features go into a `ControlBranch` instead of the first block.
    """

    # What `compile_repeated_blocks` compiles: diffusers' own choice, and ours.
    _repeated_blocks = ("BasicTransformerBlock", "AlignmentBlock")

    @register_to_config
    @_with_unet_parameters
    def __init__(
        self,
        *,
        lq_channels: int = 512,
        alignment_attention: AlignmentAttention = "value",
        add_sample: bool = True,
        # Not `alignment` and `control`: diffusers' attribute look-up would find the config in the modules' place.
        alignment_kind: AlignmentKind = "transformer",
        has_control: bool = False,
        **unet_config: Any,
    ) -> None:
        super().__init__(**unet_config)
        channels = self.config.block_out_channels[0]
        self.alignment = AlignmentModule(channels, lq_channels, alignment_attention, alignment_kind)
        self.control = ControlBranch(self.down_blocks, self.mid_block, channels) if has_control else None
        install_text_layers(self)

    def set_alignment_attention(self, attention: AlignmentAttention) -> None:
        """Switches the alignment module's mode and records it in the config that `save_pretrained` writes."""
        self.alignment.attention = attention
        self.register_to_config(alignment_attention=attention)

    def set_batch_attention(self, group: int = RELEASED_BATCH_GROUP) -> None:
        """For training as released (`AlignmentModule.set_batch_attention`); the config says "value" from now on."""
        self.alignment.set_batch_attention(group)
        self.register_to_config(alignment_attention="value")

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | PreparedText,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        lq_features: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predicted noise [B, 4, H, W] of scaled latents [B, 4, H, W] at `timestep` (scalar or [B]).

        `encoder_hidden_states` [B, 77, D] or a `PreparedText`; `added_cond_kwargs` holds `text_embeds` [B, P] and
        `time_ids` [B, 6]; `lq_features` [B, L, H, W], without which this is the plain SDXL UNet.
        """
        lq_embedding = None if lq_features is None else self.alignment.embed(lq_features)
        features = self.entrance(sample, lq_embedding)
        noise_pred = self.trunk(features, timestep, encoder_hidden_states, added_cond_kwargs or {})
        return UNet2DConditionOutput(sample=noise_pred) if return_dict else (noise_pred,)

    def prepare_text(self, encoder_hidden_states: Tensor) -> PreparedText:
        """Keys and values of every cross-attention for [B, 77, D] text: once per picture instead of once per step."""
        return prepare_text(self, encoder_hidden_states)

    def entrance(self, sample: Tensor, lq_embedding: Tensor | None) -> Tensor:
        """Aligned features f_a [B, C, H, W]. They depend on neither text nor timestep: one row serves a guidance pair.

        With a control branch, plain and aligned features in one [B, 2 C, H, W]. Without `lq_embedding`, f_x alone.
        """
        features: Tensor = self.conv_in(sample)
        if lq_embedding is None:
            return features
        aligned = self.alignment.align(features, lq_embedding)
        aligned = aligned if self.config.add_sample else aligned - features
        return aligned if self.control is None else torch.cat([features, aligned], dim=1)

    def trunk(
        self,
        features: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | PreparedText,
        added_cond_kwargs: dict[str, Tensor],
    ) -> Tensor:
        """Predicted noise [B, 4, H, W] of what left the entrance: stock SDXL from here, but for a control branch."""
        features, aligned = self._split_entrance(features)
        emb = self._embed_conditions(features, timestep, encoder_hidden_states, added_cond_kwargs)
        hidden, skips = run_encoder(self.down_blocks, self.mid_block, features, emb, encoder_hidden_states)
        if aligned is not None:
            assert self.control is not None
            hidden, skips = self.control(aligned, emb, encoder_hidden_states, hidden, skips)
        for block in self.up_blocks:
            count = len(block.resnets)
            skips, block_skips = skips[:-count], skips[-count:]
            # Latents of odd size: the up-sampler must return to the size of the skip it meets next.
            upsample_size = skips[-1].shape[2:] if skips else None
            hidden = block(
                hidden_states=hidden,
                temb=emb,
                res_hidden_states_tuple=block_skips,
                upsample_size=upsample_size,
                **text_of(block, encoder_hidden_states),
            )
        noise_pred: Tensor = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return noise_pred

    def _split_entrance(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.control is None or features.shape[1] == self.conv_in.out_channels:
            return features, None
        plain, aligned = features.chunk(2, dim=1)
        return plain, aligned

    def _embed_conditions(
        self,
        features: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | PreparedText,
        added_cond_kwargs: dict[str, Tensor],
    ) -> Tensor:
        emb: Tensor = self.time_embedding(self.get_time_embed(sample=features, timestep=timestep))
        added = self.get_aug_embed(
            emb=emb, encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=added_cond_kwargs
        )
        return emb if added is None else emb + added

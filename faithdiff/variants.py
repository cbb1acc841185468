"""The architectures of the paper's ablations (Tables 5 and 6), as models for training to start from."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from faithdiff.alignment import AlignmentKind, AlignmentModule
from faithdiff.control import ControlBranch
from faithdiff.encoder import Features, LQEncoder
from faithdiff.pipeline import FaithDiffPipeline
from faithdiff.unet import FaithDiffUNet


def with_architecture(
    pipeline: FaithDiffPipeline,
    *,
    alignment: AlignmentKind = "transformer",
    features: Features = "penultimate",
    control: bool = False,
    seed: int = 0,
) -> FaithDiffPipeline:
    """`pipeline` in another architecture; what changes starts untrained, all else keeps, and shares, its weights.

    `alignment`: see `AlignmentModule`; `features`: see `LQEncoder`; `control`: with a `ControlBranch`. An alignment
    module of another kind or for other features is initialised from `seed` and passes f_x through; an LQ encoder for
    other features starts as the VAE's encoder; a new control branch starts as a copy of the UNet's blocks.

    Raises:
        InputError: an unknown kind of alignment or features, or a VAE that cannot give the features.
    """
    lq_encoder = pipeline.lq_encoder
    if features != lq_encoder.config.features:
        lq_encoder = LQEncoder.from_vae(pipeline.vae, features).eval()
    unet = _unet_with(pipeline.unet, lq_encoder.out_channels, alignment, control, seed)
    settings = {name: getattr(pipeline, name) for name in ("tile_stride_fraction", "model_version", "tiles_per_batch")}
    return FaithDiffPipeline(**{**pipeline.components, "lq_encoder": lq_encoder, "unet": unet}, **settings)


def _unet_with(
    unet: FaithDiffUNet, lq_channels: int, kind: AlignmentKind, has_control: bool, seed: int
) -> FaithDiffUNet:
    changes = {"lq_channels": lq_channels, "alignment_kind": kind, "has_control": has_control}
    if all(unet.config[name] == value for name, value in changes.items()):
        return unet
    # Built without memory: SDXL's weights are taken over, not copied.
    with torch.device("meta"):
        other = FaithDiffUNet.from_config(unet.config, **changes)
    weights = unet.state_dict()
    if (unet.config.lq_channels, unet.config.alignment_kind) != (lq_channels, kind):
        channels = unet.conv_in.out_channels
        alignment = _seeded(seed, lambda: AlignmentModule(channels, lq_channels, kind=kind))
        weights = _replaced(weights, "alignment.", alignment.to(unet.device, unet.dtype))
    if has_control != unet.config.has_control:
        weights = _replaced(weights, "control.", _untrained_control(unet) if has_control else None)
    other.load_state_dict(weights, assign=True)
    return other.eval()


def _untrained_control(unet: FaithDiffUNet) -> ControlBranch:
    return ControlBranch(unet.down_blocks, unet.mid_block, unet.conv_in.out_channels).to(unet.device, unet.dtype)


def _replaced(weights: dict[str, Tensor], prefix: str, module: nn.Module | None) -> dict[str, Tensor]:
    """`weights` with those under `prefix` replaced by the module's, or taken out."""
    others = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
    new: dict[str, Any] = module.state_dict() if module is not None else {}
    return others | {prefix + name: tensor for name, tensor in new.items()}


def _seeded(seed: int, make: Callable[[], AlignmentModule]) -> AlignmentModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed}/alignment".encode()))
        return make()

"""Released checkpoints (`FaithDiff.bin`) in and out: the only file that knows the released key names.

A released file is one flat mapping of SDXL UNet keys, the LQ encoder and the alignment module (1,814 tensors at SDXL
size). It holds tensors only and is read with `weights_only`.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from faithdiff.encoder import LQEncoder
from faithdiff.errors import InputError
from faithdiff.unet import FaithDiffUNet

_ENCODER_PREFIX = "denoise_encoder."
# Own name -> released name. "layes" is spelt so in every released file.
_ALIGNMENT_PREFIXES = {
    "alignment.condition.": "condition_embedding.",
    "alignment.blocks.": "information_transformer_layes.",
    "alignment.proj.": "spatial_ch_projs.",
}


def load_released(
    unet: FaithDiffUNet, lq_encoder: LQEncoder, source: str | os.PathLike[str] | Mapping[str, Tensor]
) -> list[str]:
    """Fills `unet` and `lq_encoder` from a released mapping or file (.bin, .pt, .safetensors); names what was filled.

    The base UNet, the LQ encoder and the three parts of the alignment module are each complete or absent: a stage-1
    file holds the alignment module alone, a full file overrides everything. The alignment attention becomes "value",
    which is what released weights were trained to need. Models on the meta device take the tensors as they are.

    Raises:
        InputError: missing, unexpected and misshapen tensors, all named at once; or models of another architecture than
            the released one. Nothing has been loaded then.
    """
    _check_architecture(unet, lq_encoder)
    where = "mapping" if isinstance(source, Mapping) else str(source)
    tensors = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    parts = _released_parameters(unet, lq_encoder)
    _check(where, tensors, parts)
    loaded = [name for name, expected in parts.items() if expected.keys() & tensors.keys()]
    _fill(unet, {own: tensors[released] for own, released in _unet_names(unet).items() if released in tensors})
    _fill(
        lq_encoder,
        {own: tensors[released] for own, released in _encoder_names(lq_encoder).items() if released in tensors},
    )
    unet.set_alignment_attention("value")
    return loaded


def save_released(
    unet: FaithDiffUNet, lq_encoder: LQEncoder, path: str | os.PathLike[str] | None = None
) -> dict[str, Tensor]:
    """The released mapping of both models, tensors bit-equal and unconverted; written to `path` when given.

    `.safetensors` writes safetensors; any other name writes the torch pickle of the released file. The file appears
    under its name only when complete.

    Raises:
        InputError: the models have another architecture than the released one.
    """
    _check_architecture(unet, lq_encoder)
    unet_state, encoder_state = unet.state_dict(), lq_encoder.state_dict()
    tensors = {released: unet_state[own] for own, released in _unet_names(unet).items()}
    tensors |= {released: encoder_state[own] for own, released in _encoder_names(lq_encoder).items()}
    if path is not None:
        _write(tensors, Path(path))
    return tensors


def _check_architecture(unet: FaithDiffUNet, lq_encoder: LQEncoder) -> None:
    settings = {
        "alignment_kind": (unet.config.alignment_kind, "transformer"),
        "has_control": (unet.config.has_control, False),
        "features": (lq_encoder.config.features, "penultimate"),
    }
    wrong = [f"{name}={ours!r} instead of {theirs!r}" for name, (ours, theirs) in settings.items() if ours != theirs]
    if wrong:
        raise InputError(
            f"checkpoint: the released layout cannot hold this model, it has {', '.join(wrong)}; "
            f"keep it as a folder with save_pretrained"
        )


def _unet_names(unet: FaithDiffUNet) -> dict[str, str]:
    return {own: _released_name(own) for own in unet.state_dict()}


def _encoder_names(lq_encoder: LQEncoder) -> dict[str, str]:
    return {own: _ENCODER_PREFIX + own for own in lq_encoder.state_dict()}


def _released_name(own: str) -> str:
    for prefix, released in _ALIGNMENT_PREFIXES.items():
        if own.startswith(prefix):
            return released + own.removeprefix(prefix)
    return own


def _released_parameters(unet: FaithDiffUNet, lq_encoder: LQEncoder) -> dict[str, dict[str, Tensor]]:
    """Expected tensors by released name, grouped into the parts that are each complete or absent."""
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "lq_encoder": {}}
    parts |= {released.rstrip("."): {} for released in _ALIGNMENT_PREFIXES.values()}
    for own, tensor in unet.state_dict().items():
        released = _released_name(own)
        part = released.split(".")[0]
        parts[part if own.startswith("alignment.") else "unet"][released] = tensor
    for own, tensor in lq_encoder.state_dict().items():
        parts["lq_encoder"][_ENCODER_PREFIX + own] = tensor
    return parts


def _check(where: str, tensors: Mapping[str, Tensor], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    expected = {name: tensor for part in parts.values() for name, tensor in part.items()}
    present = [part for part in parts.values() if part.keys() & tensors.keys()]
    if not present:
        raise InputError(f"checkpoint: {where} holds none of the {len(expected)} tensors of a FaithDiff checkpoint")
    missing = [name for part in present for name in part if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise InputError(
            f"checkpoint: {where} does not fit this model; {'; '.join(problems)}; "
            f"give a file made for this configuration"
        )


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    is_meta = any(p.is_meta for p in model.parameters())
    model.load_state_dict(dict(tensors), strict=False, assign=is_meta)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"checkpoint: {path} does not exist; give a FaithDiff.bin or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(
            f"checkpoint: {path} cannot be read as tensors ({type(error).__name__}); "
            f"it must be safetensors or a torch file that holds nothing but tensors"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"checkpoint: {path} is not one flat mapping of names to tensors")
    return tensors


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        if path.suffix == ".safetensors":
            save_file(contiguous, partial)
        else:
            torch.save(contiguous, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

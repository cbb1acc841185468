"""Checkpoints of training, models in folders and released files into one another: `train.py export`.

    checkpoint          <out>/checkpoints/unified, or .../update_00000100 of it; written by any number of workers
    folder              diffusers' layout: a folder, also in storage, a preset, models:/name@alias
    released layout     one file, FaithDiff.bin or .safetensors, with UNet, alignment module and LQ encoder

    python pipelines/train.py export --source out/train/checkpoints/unified --to out/model --weights averaged
    python pipelines/train.py export --source out/model --to FaithDiff.bin
    python pipelines/train.py export --source FaithDiff.bin --model nano --to out/model

In fp32, which is what training keeps, every road keeps every bit. A checkpoint holds what was trained; the rest comes
from the model that the training started from, which is recognised by its weights.
"""

from __future__ import annotations

import functools
import hashlib
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from faithdiff import bundle
from faithdiff.checkpoint import load_released, save_released
from faithdiff.pipeline import FaithDiffPipeline
from pipelines.training.recipe import ArchitectureConfig
from pipelines.training.start_model import DTYPES, load_model, local_model
from sr_platform.checkpoints import CheckpointReader, open_checkpoint, update_of
from sr_platform.config import StrictConfig, load_config
from sr_platform.errors import ConfigError, InputDataError
from sr_platform.folders import Listing, folder_exists, list_folder, publish_folder, read_listing
from sr_platform.storage import Storage, open_storage
from sr_platform.train_state import AVERAGE, WEIGHT

Weights = Literal["raw", "averaged"]

RELEASED_SUFFIXES = (".bin", ".pt", ".safetensors")
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_KINDS: dict[Weights, str] = {"raw": WEIGHT, "averaged": AVERAGE}


class ExportConfig(StrictConfig):
    """Makes a model of a training checkpoint, or turns a model into another form."""

    source: str
    """A checkpoint or the folder of a stage's checkpoints, a model (folder, preset, models:/name@alias), or a released
    file."""
    to: str
    """What is written, a path or s3:// URI: a released file where the name ends in .bin, .pt or .safetensors, else a
    folder."""
    weights: Weights = "raw"
    """Of a checkpoint: the weights themselves, or their moving average."""
    model: str | None = None
    """Gives what a checkpoint or a released file lacks; a checkpoint names its own, which may have moved."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision that is written; all but fp32 rounds."""


def main(argv: Sequence[str]) -> None:
    cfg = load_config(ExportConfig, argv, job="train export", description=__doc__ or "", recipe=False)
    print(export(cfg))


def export(cfg: ExportConfig) -> str:
    """Writes what `cfg` asks for; returns an account of it.

    Raises:
        RequestError, InputError: the request cannot be done as asked; nothing was written.
    """
    target = open_storage(cfg.to)
    if _is_taken(target):
        raise ConfigError(f"to: {cfg.to} exists; give another place")
    pipeline, origin = read_source(cfg)
    pipeline.to("cpu", DTYPES[cfg.dtype])
    is_file = cfg.to.endswith(RELEASED_SUFFIXES)
    digest, size_bytes = (_write_released if is_file else _write_folder)(pipeline, target.uri)
    parts = ("unet", "lq_encoder") if is_file else bundle.MODELS
    counts = {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in parts}
    lines = [f"export: {origin}, {cfg.dtype}"]
    lines += [f"  {part:<15}{count:>15,} parameters" for part, count in counts.items()]
    lines += [f"  {'written':<15}{target.uri}, {size_bytes / 1e6:,.1f} MB", f"  {'sha256':<15}{digest}"]
    if is_file and pipeline.unet.config.alignment_attention != "value":
        mode = pipeline.unet.config.alignment_attention
        lines += [
            f"  {'mind':<15}its alignment attends to {mode}, which a released file cannot say: set it when loading"
        ]
    return "\n".join(lines)


def read_source(cfg: ExportConfig) -> tuple[FaithDiffPipeline, str]:
    """The whole model of `cfg.source`, in fp32 on the CPU, and what it is in words."""
    is_released = cfg.source.endswith(RELEASED_SUFFIXES)
    reader = None if is_released or cfg.source.startswith("models:") else find_checkpoint(cfg.source)
    if reader is not None:
        reader.verify()
        pipeline = pipeline_of(reader, check_model(reader, cfg.model or reader.meta["model"]), cfg.weights)
        return pipeline, f"{reader.uri} of stage {reader.meta['stage']}, {cfg.weights} weights"
    if cfg.weights != "raw":
        raise ConfigError(f"weights: only a checkpoint has averaged weights, and {cfg.source} is none; leave it out")
    if not is_released:
        if cfg.model is not None:
            raise ConfigError(f"model: {cfg.source} is a whole model, or no checkpoint at all; leave --model out")
        return FaithDiffPipeline.from_pretrained(local_model(cfg.source)), cfg.source
    if cfg.model is None:
        raise ConfigError(f"model: {cfg.source} has no VAE and no text encoders; give a --model that has")
    pipeline = FaithDiffPipeline.from_pretrained(local_model(cfg.model))
    parts = load_released(pipeline.unet, pipeline.lq_encoder, bundle.find_file(cfg.source))
    return pipeline, f"{cfg.source} ({', '.join(parts)}) in {cfg.model}"


def find_checkpoint(source: str) -> CheckpointReader | None:
    """The checkpoint that `source` names, or the newest below it; None where there are none.

    Raises:
        InputDataError: the one that is named is not there or damaged.
    """
    folder, _, name = source.rstrip("/").rpartition("/")
    update = update_of(name) if name.startswith("update_") else None
    return open_checkpoint(source) if update is None else open_checkpoint(folder or ".", update)


def check_model(reader: CheckpointReader, model: str) -> str:
    """A local folder of `model`. Raises ConfigError where its weights are not those that the training started from."""
    path, expected = local_model(model), reader.meta["model_digest"]
    digest = weights_digest(bundle.find_folder(path))
    if digest != expected:
        raise ConfigError(
            f"model: {reader.uri} started from weights {expected[:12]} ({reader.meta['model']}) and {model} has "
            f"{digest[:12]}; give that model as --model"
        )
    return path


def pipeline_of(reader: CheckpointReader, model: str | Path, weights: Weights) -> FaithDiffPipeline:
    """The model of a checkpoint, in fp32 on the CPU: what was trained from there, everything else from `model`.

    `model` is what the training started from: a local folder or a preset. Its weights are not compared (`check_model`).
    Besides the model little more than the largest tensor is held.

    Raises:
        ConfigError: averaged weights of a checkpoint without.
        InputDataError: the checkpoint has other parameters than the model, or cannot be read.
    """
    kind = _KINDS[weights]
    if kind not in reader.kinds:
        raise ConfigError(f"weights: {reader.uri} has no averaged weights (average_decay was 0); give --weights raw")
    pipeline = load_model(str(model), ArchitectureConfig.model_validate(reader.meta["architecture"]))
    attention = reader.meta["recipe"]["alignment_attention"]
    if attention != "model":
        pipeline.unet.set_alignment_attention("value" if attention == "batch" else attention)
    _fill(pipeline, reader, kind)
    pipeline.model_version = reader.meta["model_version"]
    return pipeline


@torch.no_grad()
def _fill(pipeline: FaithDiffPipeline, reader: CheckpointReader, kind: str) -> None:
    modules = (("unet", pipeline.unet), ("lq_encoder", pipeline.lq_encoder))
    ours = {f"{part}.{name}": p for part, module in modules for name, p in module.named_parameters()}
    for name, shape in reader.shapes.items():
        if name not in ours or tuple(ours[name].shape) != tuple(shape):
            here = tuple(ours[name].shape) if name in ours else "nothing of that name"
            raise InputDataError(
                f"export: {reader.uri} has {name} of shape {tuple(shape)} and its model {here}; "
                "give the model that the training started from"
            )
    values = reader.read_many([(name, kind, 0, math.prod(shape)) for name, shape in reader.shapes.items()])
    for (name, shape), value in zip(reader.shapes.items(), values, strict=True):
        ours[name].copy_(value.reshape(shape))


def model_digest(uri: str) -> str:
    """`weights_digest` of a model wherever it lies; of one in storage without fetching it. Raises as that does."""
    if not uri.startswith("models:") and folder_exists(uri):
        return _weights_of(read_listing(uri), uri)
    return weights_digest(bundle.find_folder(local_model(uri)))


def weights_digest(folder: Path) -> str:
    """sha256 over the weight files of a local model folder, whatever else lies in it; remembered by this process.

    A preset that names its parts is as good as their weights.

    Raises:
        InputError, InputDataError: the folder is no model, or has no weights.
    """
    parts = bundle.read_index(folder).get("base")
    if parts is None:
        return _digest_of(folder, _states(folder))
    paths = [bundle.find_folder(parts[name]) for name in ("base", "vae") if parts.get(name)]
    paths += [bundle.find_file(parts["released"])] if parts.get("released") else []
    return hashlib.sha256(" ".join(_digest_of(path, _states(path)) for path in paths).encode()).hexdigest()


def _states(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of each weight file: what tells that a digest still holds."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in _WEIGHT_SUFFIXES)
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@functools.cache
def _digest_of(path: Path, states: tuple[tuple[str, int, int], ...]) -> str:
    return _file_digest(path) if path.is_file() else _weights_of(list_folder(path), str(path))


def _weights_of(listing: Listing, where: str) -> str:
    weights = listing.only(_WEIGHT_SUFFIXES)
    if not weights.files:
        raise InputDataError(f"model: {where} has no weights ({', '.join(_WEIGHT_SUFFIXES)}); give another folder")
    return weights.digest


def _write_folder(pipeline: FaithDiffPipeline, uri: str) -> tuple[str, int]:
    """Digest and bytes of the model's folder at `uri`."""
    with _staging(uri) as staging:
        folder = Path(staging) / "model"
        pipeline.save_pretrained(folder)
        digest = publish_folder(folder, uri, may_move=True)
    return digest, read_listing(uri).size_bytes


def _write_released(pipeline: FaithDiffPipeline, uri: str) -> tuple[str, int]:
    """Digest and bytes of the released file at `uri`."""
    folder, _, name = uri.rpartition("/")
    with _staging(uri) as staging:
        path = Path(staging) / name
        save_released(pipeline.unet, pipeline.lq_encoder, path)
        written = _file_digest(path), path.stat().st_size
        if open_storage(uri).is_local:
            path.replace(uri)
        else:
            open_storage(folder).write_chunks(name, open_storage(staging).read_chunks(name))
    return written


def _staging(uri: str) -> tempfile.TemporaryDirectory[str]:
    """A passing folder, on the disk where `uri` is to lie, if that is one."""
    beside = None if "://" in uri else Path(uri).parent
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=".export-", dir=beside)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_taken(target: Storage) -> bool:
    if target.is_local:
        return Path(target.uri).exists()
    folder, _, name = target.uri.rpartition("/")
    return bool(target.list()) or open_storage(folder).exists(name)

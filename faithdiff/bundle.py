"""A model as a folder in diffusers' layout: every component in a sub-folder, named by `model_index.json`.

Also builds a FaithDiff model from a plain SDXL folder (or hub id): the UNet gains the alignment module and the LQ
encoder starts as the VAE's encoder, as in the paper's training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from faithdiff.alignment import AlignmentAttention
from faithdiff.encoder import LQEncoder
from faithdiff.errors import InputError
from faithdiff.unet import FaithDiffUNet

PRESETS_PATH = Path(__file__).parent / "presets"
INDEX_NAME = "model_index.json"
PIPELINE_CLASS = "FaithDiffPipeline"

# A fixed table instead of the index's own module names: loading a folder never imports code that it names.
COMPONENTS: dict[str, tuple[str, type[Any]]] = {
    "vae": ("diffusers", AutoencoderKL),
    "lq_encoder": ("faithdiff.encoder", LQEncoder),
    "unet": ("faithdiff.unet", FaithDiffUNet),
    "text_encoder": ("transformers", CLIPTextModel),
    "text_encoder_2": ("transformers", CLIPTextModelWithProjection),
    "tokenizer": ("transformers", CLIPTokenizer),
    "tokenizer_2": ("transformers", CLIPTokenizer),
    "scheduler": ("diffusers", EulerDiscreteScheduler),
}
MODELS = ("vae", "lq_encoder", "unet", "text_encoder", "text_encoder_2")
ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_NEW_IN_FAITHDIFF = ("lq_encoder",)


def list_presets() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(path.name for path in PRESETS_PATH.iterdir() if path.is_dir() and not path.name.startswith("_"))


def find_folder(name_or_path: str | Path) -> Path:
    """The local folder of a preset name, a path or a hub id (downloaded, if there is a network).

    Raises:
        InputError: there is nothing under that name.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if str(name_or_path) in list_presets():
        return PRESETS_PATH / str(name_or_path)
    parts = str(name_or_path).split("/")
    if len(parts) == 2 and all(parts) and not str(name_or_path).startswith((".", "~")):
        return _download(str(name_or_path))
    raise InputError(
        f"model: {str(name_or_path)!r} is neither a folder nor a preset; presets are {', '.join(list_presets())}"
    )


def find_file(name_or_path: str | Path) -> Path:
    """The local file of a path, or of `owner/repository/file` on the hub (downloaded, if there is a network).

    A path that is neither comes back as it is, for its reader to refuse.

    Raises:
        InputError: the hub cannot give the file.
    """
    path = Path(name_or_path)
    parts = str(name_or_path).split("/")
    if path.is_file() or len(parts) != 3 or not all(parts):
        return path
    from huggingface_hub import hf_hub_download

    return Path(_from_hub(str(name_or_path), lambda: hf_hub_download("/".join(parts[:2]), parts[2])))


def load_components(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """All components of a folder written by `save_components`, models in eval mode. Works offline.

    Raises:
        InputError: the folder has no FaithDiff index, or a component is missing or does not fit its config.
    """
    _check_index(folder)
    with _quiet_loading():
        return {name: _load_component(folder, name, dtype) for name in COMPONENTS}


def load_encoders(name_or_path: str | Path) -> dict[str, Any]:
    """Only what is never trained, `ENCODERS`, in fp32, of all that `FaithDiffPipeline.from_pretrained` takes.

    Raises:
        InputError: as `find_folder` and `load_components`.
    """
    folder, dtype = find_folder(name_or_path), torch.float32
    with _quiet_loading():
        if "base" not in read_index(folder):
            _check_index(folder)
            return {name: _load_component(folder, name, dtype) for name in ENCODERS}
        parts = read_index(folder)["base"]
        base, variant = find_folder(parts["base"]), parts.get("variant")
        components = {name: _load_component(base, name, dtype, variant=variant) for name in ENCODERS[1:]}
        vae = find_folder(parts["vae"]) if parts.get("vae") else None
        return components | {"vae": _load_vae(base, vae, dtype, variant)}


def check_folder(folder: Path) -> None:
    """Everything `load_components` would refuse, found without reading the weights: for jobs that load them later.

    A preset that names its base is not looked into: its parts may not be here yet.

    Raises:
        InputError: as `load_components`.
    """
    if "base" in read_index(folder):
        return
    _check_index(folder)
    with _quiet_loading():
        for name in COMPONENTS:
            _load_component(folder, name, torch.float32, device_map="meta")


def load_base_components(
    base: Path, *, vae: Path | None, dtype: torch.dtype, attention: AlignmentAttention, variant: str | None
) -> dict[str, Any]:
    """Components of a FaithDiff model in its state before training, from a plain SDXL folder and optionally its VAE."""
    shared = [name for name in COMPONENTS if name not in (*_NEW_IN_FAITHDIFF, "unet", "vae")]
    components = {name: _load_component(base, name, dtype, variant=variant) for name in shared}
    components["vae"] = _load_vae(base, vae, dtype, variant)
    components["lq_encoder"] = LQEncoder.from_vae(components["vae"]).to(dtype)
    sdxl = _load_component(base, "unet", dtype, cls=UNet2DConditionModel, variant=variant)
    components["unet"] = extend_unet(sdxl, components["lq_encoder"].out_channels, attention)
    return components


def extend_unet(sdxl: UNet2DConditionModel, lq_channels: int, attention: AlignmentAttention) -> FaithDiffUNet:
    """A FaithDiffUNet with the weights of `sdxl` and an untrained alignment module, which at first changes nothing."""
    unet = FaithDiffUNet.from_config(sdxl.config, lq_channels=lq_channels, alignment_attention=attention)
    missing, unexpected = unet.load_state_dict(sdxl.state_dict(), strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith("alignment.") for name in missing), missing
    return unet.to(sdxl.dtype).eval()


def save_components(components: dict[str, Any], folder: Path, settings: dict[str, Any]) -> None:
    """Writes all components and the index; `folder` appears, or is replaced, only when everything is written."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in COMPONENTS:
        components[name].save_pretrained(partial / name)
    index: dict[str, Any] = {"_class_name": PIPELINE_CLASS, "_diffusers_version": diffusers.__version__}
    index |= {name: [module, cls.__name__] for name, (module, cls) in COMPONENTS.items()} | settings
    (partial / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def read_index(folder: Path) -> dict[str, Any]:
    """The content of a folder's `model_index.json`."""
    path = folder / INDEX_NAME
    if not path.is_file():
        raise InputError(f"model: {folder} has no {INDEX_NAME}; give a folder written by save_pretrained")
    try:
        index = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"model: {path} is not JSON: {error}") from error
    if not isinstance(index, dict):
        raise InputError(f"model: {path} is not a mapping")
    return index


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bar per text encoder, and no list of unfitting weights: ours comes in one line, as an error."""
    had_bar, was_verbose = transformers_logging.is_progress_bar_enabled(), diffusers_logging.get_verbosity()
    also_verbose = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(was_verbose)
        transformers_logging.set_verbosity(also_verbose)
        if had_bar:
            transformers_logging.enable_progress_bar()


def _check_index(folder: Path) -> None:
    index = read_index(folder)
    if index.get("_class_name") != PIPELINE_CLASS:
        raise InputError(
            f"model: {folder} holds a {index.get('_class_name')}, not a {PIPELINE_CLASS}; "
            f"make one with FaithDiffPipeline.from_base"
        )


def _load_component(
    folder: Path, name: str, dtype: torch.dtype, *, cls: type[Any] | None = None, **options: Any
) -> Any:
    cls = cls or COMPONENTS[name][1]
    if not (folder / name).is_dir():
        raise InputError(f"model: {folder} lacks the component {name}/; give a complete folder")
    try:
        if name not in MODELS:
            return cls.from_pretrained(folder / name)
        options = {option: value for option, value in options.items() if value is not None}
        options["dtype" if name.startswith("text_encoder") else "torch_dtype"] = dtype
        model, info = cls.from_pretrained(
            folder / name, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"model: {folder / name} cannot be loaded: {' '.join(str(error).split())}") from error
    _check_complete(folder / name, info)
    return model.eval()


def _load_vae(base: Path, vae: Path | None, dtype: torch.dtype, variant: str | None) -> Any:
    """The VAE of an SDXL folder, or the one in a folder of its own."""
    if vae is None:
        return _load_component(base, "vae", dtype, variant=variant)
    return _load_component(vae.parent, vae.name, dtype, cls=AutoencoderKL)


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    """Refuses what both libraries only warn of: they would fill the gaps with random weights."""
    # A buffer that older transformers saved and newer ones compute.
    unexpected = [key for key in info["unexpected_keys"] if not key.endswith("position_ids")]
    info = {**info, "unexpected_keys": unexpected}
    problems = [
        f"{len(info[kind])} {kind.removesuffix('_keys')}: {', '.join(_tensor_name(key) for key in info[kind])}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    ]
    if problems:
        raise InputError(f"model: the weights in {folder} do not fit its config; {'; '.join(problems)}")


def _tensor_name(key: Any) -> str:
    """Mismatches come as (name, shape in the file, shape of the model)."""
    return key if isinstance(key, str) else f"{key[0]} {tuple(key[1])} instead of {tuple(key[2])}"


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    # Not the single-file checkpoints beside the folders: they hold the same weights again.
    wanted = ["*.json", "*.txt", "*/*.safetensors", "diffusion_pytorch_model*.safetensors"]
    return Path(_from_hub(hub_id, lambda: snapshot_download(hub_id, allow_patterns=wanted)))


def _from_hub(name: str, fetch: Callable[[], str]) -> str:
    try:
        return fetch()
    except Exception as error:
        raise InputError(
            f"model: {name!r} is neither here nor a preset ({', '.join(list_presets())}), "
            f"and could not be had from the hub: {type(error).__name__}"
        ) from error

"""Figure 6 of the paper: where the words of a prompt act while a picture is restored, as overlay pictures.

    python pipelines/attention_maps.py --model nano --input photo.png --prompt "a cat on a wall" --words cat wall \
        --out out/attention

In : a low-quality picture, its prompt, and words of the prompt; a phrase of several words stands in quotes.
Out: `restored.png`; `<number>_<word>.png`, the overlays on it; `attention_maps.npz`, each word's share of the attention
     in each latent cell; `attention_maps.json`, settings and shares; `sheet.png`, all at a glance.

The restored picture is the one that the same settings give without maps, bit by bit. How a map is made is said in
`faithdiff/attention_maps.py`. Every overlay is stretched to its own range; the shares themselves are in the json.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from faithdiff.attention_maps import AttentionMaps, overlay, record_attention, word_positions
from faithdiff.errors import InputError
from faithdiff.pipeline import FaithDiffPipeline, RestorationResult
from faithdiff.request import RestorationRequest
from faithdiff.tiling import CELL_PX
from pipelines.synthetic.fonts import font
from pipelines.training.start_model import DTYPES, local_model
from sr_platform.config import StrictConfig, load_config, run_job
from sr_platform.storage import Storage, open_storage

SHEET_NAME = "sheet.png"
_CELL_PX, _GAP_PX, _LABEL_PX = 360, 16, 34
_PAPER, _INK = (250, 249, 246), (30, 30, 30)


class AttentionMapsConfig(StrictConfig):
    """One picture, one prompt, and the words to look at."""

    model: str
    """What restores: a preset such as nano, a folder, s3://, or models:/name@alias."""
    input: Path
    """The low-quality picture."""
    prompt: Annotated[str, pydantic.Field(min_length=1)]
    """What is in the picture."""
    words: Annotated[tuple[str, ...], pydantic.Field(min_length=1)]
    """Words or quoted phrases of the prompt; each gets a map."""
    out: str
    """Folder or s3:// URI of the pictures."""
    scale: pydantic.PositiveInt = 4
    """Output is so many times the size of the input."""
    num_inference_steps: pydantic.PositiveInt = 20
    """Steps, over which the attention is averaged."""
    guidance_scale: float = 5.0
    """How strongly the prompt steers."""
    seed: pydantic.NonNegativeInt = 0
    """Of the noise."""
    tile_px: pydantic.PositiveInt = 1024
    """Side of a tile."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the model's arithmetic."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""


def main(argv: Sequence[str]) -> None:
    cfg = load_config(AttentionMapsConfig, argv, job="attention_maps", description=__doc__ or "", recipe=False)
    request = RestorationRequest(
        scale=cfg.scale,
        prompt=cfg.prompt,
        num_inference_steps=cfg.num_inference_steps,
        guidance_scale=cfg.guidance_scale,
        seed=cfg.seed,
        tile_px=cfg.tile_px,
    )
    lq = read_picture(cfg.input)
    pipeline = FaithDiffPipeline.from_pretrained(
        local_model(cfg.model), dtype=DTYPES[cfg.precision], device=device_of(cfg.device)
    )
    for word in cfg.words:  # refused before anything is restored
        word_positions(cfg.prompt, word, pipeline.tokenizer)
    with tqdm(total=cfg.num_inference_steps, desc="restoring", unit="step") as bar:
        result, maps = record_attention(pipeline, lq, request, on_step=lambda _, __: bar.update())
    storage = open_storage(cfg.out)
    publish(storage, cfg, result, maps)
    print(f"attention_maps: {len(cfg.words)} maps; look at {storage.path(SHEET_NAME)}")


def read_picture(path: Path) -> Image.Image:
    """An RGB picture. Raises InputError where the file is none."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"attention_maps: input {path}: not a picture ({error}); give a PNG or JPEG file") from None


def device_of(wanted: str) -> str:
    """The device by its name. Raises InputError where it is not there."""
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise InputError("attention_maps: device is cuda, and this machine has no GPU that torch can use; give cpu")
    return ("cuda" if has_gpu else "cpu") if wanted == "auto" else wanted


def publish(storage: Storage, cfg: AttentionMapsConfig, result: RestorationResult, maps: AttentionMaps) -> None:
    """Writes everything; the sheet, which is looked at first, comes last."""
    shares = {word: maps.of_word(word) for word in cfg.words}
    overlays = {word: overlay(result.image, share) for word, share in shares.items()}
    storage.write_bytes_atomic("restored.png", png(result.image))
    for number, (word, image) in enumerate(overlays.items(), start=1):
        storage.write_bytes_atomic(f"{number}_{file_stem(word)}.png", png(image))
    arrays = io.BytesIO()
    words = np.array(list(shares))
    np.savez_compressed(arrays, words=words, shares=np.stack([s.numpy() for s in shares.values()]), cell_px=CELL_PX)
    storage.write_bytes_atomic("attention_maps.npz", arrays.getvalue())
    storage.write_bytes_atomic(
        "attention_maps.json", (json.dumps(about(cfg, result, shares), indent=1) + "\n").encode()
    )
    storage.write_bytes_atomic(SHEET_NAME, png(sheet({"restored": result.image, **overlays})))


def about(cfg: AttentionMapsConfig, result: RestorationResult, shares: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Settings, the model, and how much attention each word has: least, mean and greatest share."""
    measured = {
        word: {"least": float(share.min()), "mean": float(share.mean()), "greatest": float(share.max())}
        for word, share in shares.items()
    }
    settings = cfg.model_dump(mode="json", exclude={"out", "device"})
    return {"settings": settings, "model_version": result.report["model_version"], "shares": measured}


def sheet(pictures: Mapping[str, Image.Image]) -> Image.Image:
    """The pictures in a row, each below its name."""
    longest = max(max(image.size) for image in pictures.values())
    shrink = _CELL_PX / longest
    small = {
        name: image.resize((max(round(image.width * shrink), 1), max(round(image.height * shrink), 1)))
        for name, image in pictures.items()
    }
    width = sum(image.width + _GAP_PX for image in small.values()) + _GAP_PX
    height = max(image.height for image in small.values()) + _LABEL_PX + _GAP_PX
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    left = _GAP_PX
    for name, image in small.items():
        draw.text((left, 8), name, fill=_INK, font=font("DejaVuSans-Bold", 15))
        canvas.paste(image, (left, _LABEL_PX))
        left += image.width + _GAP_PX
    return canvas


def file_stem(word: str) -> str:
    """A name for files of any word."""
    return re.sub(r"[^\w-]+", "_", word)[:60]


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


if __name__ == "__main__":
    run_job(main, user_errors=(InputError,))

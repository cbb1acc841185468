"""Small models of the real classes, filled with golden weights or seeded noise; picture files, byte by byte."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from PIL import Image

from faithdiff.checkpoint import load_released, save_released
from faithdiff.encoder import LQEncoder
from faithdiff.pipeline import FaithDiffPipeline
from faithdiff.text import PromptEmbeds
from faithdiff.unet import FaithDiffUNet

SDXL_VAE_ENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@pytest.fixture(scope="session")
def golden_models(golden, golden_weight) -> tuple[FaithDiffUNet, LQEncoder]:
    """The small UNet of case02b and the full-size LQ encoder, filled through their released key names."""
    unet = FaithDiffUNet.from_config(golden("case02b_unet").about["unet_config"], lq_channels=512).eval()
    lq_encoder = LQEncoder.from_vae(AutoencoderKL(**SDXL_VAE_ENCODER)).eval()
    released = {name: golden_weight(name, tuple(t.shape)) for name, t in save_released(unet, lq_encoder).items()}
    load_released(unet, lq_encoder, released)
    return unet, lq_encoder


@pytest.fixture(scope="session")
def golden_pipeline(golden, golden_models, fill_recipe) -> FaithDiffPipeline:
    """The pipeline of case03 and case04; its text comes from stored embeddings, so it has no text encoders."""
    about = golden("case03_pipeline_single_tile").about
    unet, lq_encoder = golden_models
    text = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return FaithDiffPipeline(
        vae=fill_recipe(AutoencoderKL(**about["vae_config"]), "vae.").eval(),
        lq_encoder=lq_encoder,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**about["scheduler_config"]),
        **text,
    )


@pytest.fixture(scope="session")
def golden_text(golden) -> dict[str, PromptEmbeds]:
    """Arguments of the pipeline's call: the stored embeddings of 'a photo of a cat' and of ''."""
    stored = golden("case10_text_encode")
    return {
        "prompt_embeds": PromptEmbeds(stored["prompt_embeds"], stored["pooled"]),
        "negative_prompt_embeds": PromptEmbeds(stored["negative_prompt_embeds"], stored["negative_pooled"]),
    }


@pytest.fixture(scope="session")
def nano() -> FaithDiffPipeline:
    """The nano preset with an alignment module that does something: its zero-initialised layers are given weights."""
    pipe = FaithDiffPipeline.from_pretrained("nano")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*pipe.unet.alignment.proj.parameters(), *pipe.unet.alignment.condition.conv_out.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return pipe


@pytest.fixture(scope="session")
def photograph() -> Callable[[int, int], torch.Tensor]:
    """`photograph(height, width)`: a real photograph, uint8 RGB [H, W, 3] as numpy."""
    import numpy as np
    from PIL import Image
    from skimage import data

    source = Image.fromarray(data.astronaut())
    return lambda height, width: np.asarray(source.resize((width, height), Image.Resampling.LANCZOS))


@pytest.fixture(scope="session")
def to_file() -> Callable[..., bytes]:
    """`to_file(array_or_image, "PNG", **options)` -> the bytes of a picture file, written by Pillow."""

    def encode(picture: Any, file_format: str, **options: Any) -> bytes:
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        buffer = BytesIO()
        image.save(buffer, file_format, **options)
        return buffer.getvalue()

    return encode


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.fixture(scope="session")
def png_file() -> Callable[..., bytes]:
    """`png_file(levels, ...)` -> a PNG of uint8 or uint16 [H, W] or [H, W, C], of any depth and kind of colour.

    `before` and `after` are chunks around the pixels; `size` overrides what the header says.
    """

    def encode(
        levels: np.ndarray,
        before: Mapping[bytes, bytes] | None = None,
        after: Mapping[bytes, bytes] | None = None,
        depth: int | None = None,
        colour_type: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> bytes:
        depth = depth or 8 * levels.itemsize
        channels = 1 if levels.ndim == 2 else levels.shape[2]
        colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels] if colour_type is None else colour_type
        bits = levels.reshape(len(levels), -1)[..., None] >> np.arange(depth)[::-1] & 1
        rows = np.packbits(bits.reshape(len(levels), -1).astype(np.uint8), axis=1)
        header = struct.pack(">IIBBBBB", *(size or levels.shape[1::-1]), depth, colour_type, 0, 0, 0)
        pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
        chunks = [(b"IHDR", header), *(before or {}).items(), (b"IDAT", pixels), *(after or {}).items(), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)

    return encode


_TIFF_TYPES = {1: "B", 2: "c", 3: "H", 4: "I", 7: "B", 9: "i"}


@pytest.fixture(scope="session")
def tiff_file() -> Callable[..., bytes]:
    """`tiff_file(levels, photometric, ...)` -> an uncompressed TIFF of uint8 or uint16 [H, W] or [H, W, C].

    `order` is "<" or ">"; `tags` adds or replaces tags: {number: (type, values)}, of None removes them.
    """

    def encode(
        levels: np.ndarray,
        photometric: int = 1,
        order: str = "<",
        tags: Mapping[int, tuple[int, tuple[int, ...]] | None] | None = None,
    ) -> bytes:
        channels = 1 if levels.ndim == 2 else levels.shape[2]
        pixels = levels.astype(levels.dtype.newbyteorder(order)).tobytes()
        height, width = levels.shape[:2]
        entries: dict[int, tuple[int, tuple[int, ...]] | None] = {
            **{256: (4, (width,)), 257: (4, (height,)), 258: (3, (8 * levels.itemsize,) * channels), 259: (3, (1,))},
            **{262: (3, (photometric,)), 273: (4, (8,)), 277: (3, (channels,)), 278: (4, (height,))},
            **{279: (4, (len(pixels),)), **(tags or {})},
        }
        written = sorted((tag, entry) for tag, entry in entries.items() if entry is not None)
        return _tiff(order, pixels + b"\0" * (len(pixels) % 2), written)

    return encode


def _tiff(order: str, pixels: bytes, tags: list[tuple[int, tuple[int, tuple[int, ...]]]]) -> bytes:
    directory_at = 8 + len(pixels)
    rest_at = directory_at + 2 + 12 * len(tags) + 4
    directory, rest = struct.pack(f"{order}H", len(tags)), b""
    for tag, (kind, values) in tags:
        packed = struct.pack(f"{order}{len(values)}{_TIFF_TYPES[kind]}", *values)
        if len(packed) > 4:
            place = struct.pack(f"{order}I", rest_at + len(rest))
            rest += packed + b"\0" * (len(packed) % 2)
        else:
            place = packed.ljust(4, b"\0")
        directory += struct.pack(f"{order}HHI", tag, kind, len(values)) + place
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", directory_at)
    return head + pixels + directory + b"\0" * 4 + rest

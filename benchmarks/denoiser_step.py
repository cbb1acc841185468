"""Seconds per denoising step: ours (tiles in batches, conditioning once per picture) against the plain way.

The plain way is the released loop: one tile per UNet call, a guidance pair of two full rows, and the conditioning
convolution and the text keys and values computed again at every step. Both run in one process on the same canvas, in
turns, and must agree. Prints a table and writes JSON.

    python benchmarks/denoiser_step.py [--size-px 512] [--steps 6]
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL
from torch import Tensor

from faithdiff import FaithDiffPipeline
from faithdiff.denoiser import Canvas, advance
from faithdiff.encoder import LQEncoder
from faithdiff.request import RestorationRequest
from faithdiff.unet import FaithDiffUNet

# Two levels of SDXL's widths with its full-size LQ features: 109 M parameters, a step takes seconds on two cores.
SMALL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (5, 10),
    "cross_attention_dim": 96,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
}


def nano_pipeline() -> FaithDiffPipeline:
    pipe = FaithDiffPipeline.from_pretrained("nano")
    awaken(pipe.unet)
    return pipe


def awaken(unet: FaithDiffUNet) -> None:
    """Gives the alignment module's zero-initialised layers weights, or its work would change nothing."""
    torch.manual_seed(0)
    for layer in (unet.alignment.proj, unet.alignment.condition.conv_out):
        torch.nn.init.normal_(layer.weight, std=0.02)


def small_pipeline() -> FaithDiffPipeline:
    """Nano's text encoders and VAE around a UNet and an LQ encoder of SDXL's widths, with random weights."""
    torch.manual_seed(0)
    pipe = nano_pipeline()
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    pipe.lq_encoder = LQEncoder.from_vae(vae).eval()
    width = pipe.unet.config.projection_class_embeddings_input_dim
    pipe.unet = FaithDiffUNet.from_config(SMALL_UNET, projection_class_embeddings_input_dim=width).eval()
    awaken(pipe.unet)
    return pipe


@torch.inference_mode()
def plain_step(unet: FaithDiffUNet, canvas: Canvas) -> None:
    """One step as the released loop does it."""
    condition = canvas.condition
    for tile, origin_time_ids in enumerate(condition.time_ids):
        latents = canvas.schedule.scale_model_input(canvas.plan.cut(canvas.latents, tile), canvas.step)
        features = canvas.plan.cut(condition.lq_features, tile)
        noise_pred = unet(
            latents.repeat(2, 1, 1, 1),
            canvas.schedule.timesteps[canvas.step],
            condition.prompt_embeds,
            {"text_embeds": condition.pooled_prompt_embeds, "time_ids": origin_time_ids.repeat(2, 1)},
            features.repeat(2, 1, 1, 1),
        ).sample
        negative, positive = noise_pred.chunk(2)
        canvas.accept(tile, negative + canvas.guidance_scale * (positive - negative))
    canvas.finish_step()


def measure(pipe: FaithDiffPipeline, size_px: int, steps: int, tiles_per_batch: int) -> dict[str, float]:
    """Median seconds per step of both ways, taken in turns, and the largest difference of their latents."""
    rgb = np.random.default_rng(0).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)
    request = RestorationRequest(scale=1, num_inference_steps=steps + 1, tile_px=256, tile_stride_px=128)
    plain, ours = (pipe.prepare(rgb, request).canvas for _ in range(2))
    ways: dict[str, tuple[Canvas, Callable[[Canvas], None]]] = {
        "plain": (plain, lambda canvas: plain_step(pipe.unet, canvas)),
        "ours": (ours, lambda canvas: advance(pipe.unet, [canvas], tiles_per_batch=tiles_per_batch)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(steps + 1):
        for name, (canvas, advance_one) in ways.items():
            start = time.perf_counter()
            advance_one(canvas)
            if step > 0:  # the first step warms up both
                seconds[name].append(time.perf_counter() - start)
    result = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    difference: Tensor = (plain.latents - ours.latents).abs().max() / plain.latents.abs().max()
    return result | {"ratio": result["plain_s"] / result["ours_s"], "rel_difference": difference.item()}


def main(size_px: int = 512, steps: int = 6, tiles_per_batch: int = 4, out: Path = Path("out/benchmarks")) -> None:
    """Times one picture of size_px x size_px in tiles of 256 px at a stride of 128 px."""
    rows = {
        name: measure(build(), size_px, steps, tiles_per_batch)
        for name, build in (("nano", nano_pipeline), ("small", small_pipeline))
    }
    print(f"{'model':8}{'plain s/step':>14}{'ours s/step':>14}{'plain/ours':>12}{'rel. difference':>18}")
    for name, row in rows.items():
        print(f"{name:8}{row['plain_s']:14.3f}{row['ours_s']:14.3f}{row['ratio']:12.2f}{row['rel_difference']:18.1e}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()  # noqa: S607
    about = {"size_px": size_px, "steps": steps, "tiles_per_batch": tiles_per_batch, "commit": commit}
    about |= {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    out.mkdir(parents=True, exist_ok=True)
    (out / "denoiser_step.json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

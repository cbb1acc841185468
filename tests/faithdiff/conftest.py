"""Small models of the real classes, filled with golden weights or seeded noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler

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

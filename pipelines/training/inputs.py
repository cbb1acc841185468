"""Batch -> what the network sees: latents, noise, text embeddings, all from models that are never trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from faithdiff.loss import NoiseDraws, noise_for
from faithdiff.text import encode_prompts
from pipelines.training.batches import Batch


@dataclass(frozen=True)
class NetworkInputs:
    """The arguments of `FaithDiffForTraining`, on its device."""

    latents: Tensor
    draws: NoiseDraws
    conditions: dict[str, Tensor]


class FrozenModels:
    """The VAE and the text encoders, on `device`, without gradients.

    The VAE stays in fp32: its latents are what is learnt, and bf16 would round them to three digits.
    """

    def __init__(self, pipeline: Any, *, device: torch.device, dtype: torch.dtype, seed: int, noise_offset: float):
        self.vae = pipeline.vae.to(device, torch.float32).eval().requires_grad_(False)
        self.text_encoders = [
            encoder.to(device, dtype).eval().requires_grad_(False)
            for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
        ]
        self.tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
        self.num_train_timesteps: int = pipeline.scheduler.config.num_train_timesteps
        self.device, self.seed, self.noise_offset = device, seed, noise_offset

    @torch.no_grad()
    def encode(self, batch: Batch) -> NetworkInputs:
        """Latents are a sample of the VAE's posterior x its scaling factor, drawn as the noise is."""
        posterior = self.vae.encode(batch.hq.to(self.device, non_blocking=True)).latent_dist
        draws = noise_for(
            self.seed,
            batch.samples,
            tuple(posterior.mean.shape[1:]),
            noise_offset=self.noise_offset,
            num_train_timesteps=self.num_train_timesteps,
        ).to(self.device)
        text = encode_prompts(batch.captions, *self.tokenizers, *self.text_encoders)
        return NetworkInputs(
            latents=(posterior.mean + posterior.std * draws.posterior_noise) * self.vae.config.scaling_factor,
            draws=draws,
            conditions={
                "lq": batch.lq.to(self.device, non_blocking=True),
                "prompt_embeds": text.prompt_embeds,
                "pooled_prompt_embeds": text.pooled_prompt_embeds,
                "time_ids": batch.time_ids.to(self.device, non_blocking=True),
            },
        )

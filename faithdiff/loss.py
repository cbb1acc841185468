"""The objective of equation 3: mean |noise - noise_pred|, the noise including a small offset per channel.

In : `latents` [B, C, h, w] (VAE posterior sample x scaling factor), `lq` [B, 3, 8h, 8w] in [-1, 1], embeddings.
Out: a scalar loss in fp32.

Everything drawn for a sample comes from (seed, update, sample): the caller numbers the samples of the whole run, so
that one number stands for both (pipelines/training/batches.py), and the draws know nothing of ranks or batches.

B = samples, C = latent channels, h, w = latent rows and columns, T = tokens, D = width of the text embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from faithdiff.encoder import LQEncoder
from faithdiff.schedule import add_noise
from faithdiff.unet import FaithDiffUNet

_NOISE_STREAM = 1


@dataclass(frozen=True)
class NoiseDraws:
    """Everything random between a picture and its loss; fp32 on the CPU until moved."""

    timesteps: Tensor
    """int64 [B], uniform over 0..num_train_timesteps-1."""
    noise: Tensor
    """[B, C, h, w], offset included: what is added to the latents and what the network must predict."""
    posterior_noise: Tensor
    """[B, C, h, w], standard normal: picks the sample of the VAE's posterior."""

    def to(self, device: torch.device | str) -> NoiseDraws:
        return NoiseDraws(
            self.timesteps.to(device, non_blocking=True),
            self.noise.to(device, non_blocking=True),
            self.posterior_noise.to(device, non_blocking=True),
        )


def noise_for(
    seed: int,
    samples: Sequence[int],
    shape_Chw: tuple[int, int, int],
    *,
    noise_offset: float = 0.02,
    num_train_timesteps: int = 1000,
) -> NoiseDraws:
    """The draws of `samples`, each a function of (seed, its own number) alone.

    Source: train_SDXL_stage_2.py:896-905 @ f11af6c: noise = randn + noise_offset * randn(B, C, 1, 1), t ~ U{0..999};
    there all ranks shared one global generator.
    """
    timesteps, noise, posterior = [], [], []
    for sample in samples:
        rng = np.random.default_rng([seed, _NOISE_STREAM, sample])
        timesteps.append(int(rng.integers(num_train_timesteps)))
        offset = rng.standard_normal((shape_Chw[0], 1, 1), dtype=np.float32)
        noise.append(rng.standard_normal(shape_Chw, dtype=np.float32) + np.float32(noise_offset) * offset)
        posterior.append(rng.standard_normal(shape_Chw, dtype=np.float32))
    return NoiseDraws(
        torch.tensor(timesteps, dtype=torch.int64),
        torch.from_numpy(np.stack(noise)),
        torch.from_numpy(np.stack(posterior)),
    )


def denoising_loss(noise_pred: Tensor, noise: Tensor) -> Tensor:
    """Mean absolute error over all elements, in fp32 whatever the inputs' precision.

    Source: equation 3 of the paper; train_SDXL_stage_2.py:935 @ f11af6c.
    """
    return (noise_pred.float() - noise.float()).abs().mean()


class FaithDiffForTraining(nn.Module):
    """UNet and LQ encoder as the one module that is trained; `forward` gives the loss.

    Inputs are cast to the weights' precision here, the noise schedule and the loss stay in fp32.
    """

    def __init__(self, unet: FaithDiffUNet, lq_encoder: LQEncoder, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.lq_encoder = lq_encoder
        # Kept out of the state dict, and out of reach of `.to(bf16)`: 1 - alphas_cumprod needs fp32.
        self._alphas_cumprod = alphas_cumprod.float()

    def predict_noise(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        *,
        lq: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        time_ids: Tensor,
    ) -> Tensor:
        """noise_pred [B, C, h, w]; lq [B, 3, 8h, 8w] in [-1, 1], prompt_embeds [B, T, D], time_ids [B, 6] in pixels."""
        dtype = self.unet.dtype
        return self.unet(
            noisy_latents.to(dtype),
            timesteps,
            encoder_hidden_states=prompt_embeds.to(dtype),
            # time_ids stay fp32: half precision rounds sizes above 2048 px.
            added_cond_kwargs={"text_embeds": pooled_prompt_embeds.to(dtype), "time_ids": time_ids.float()},
            lq_features=self.lq_encoder(lq.to(dtype)),
        ).sample

    def forward(self, latents: Tensor, draws: NoiseDraws, conditions: dict[str, Tensor]) -> Tensor:
        """The scalar loss of one micro-batch; `conditions` are the keyword arguments of `predict_noise`."""
        alphas_cumprod = self._alphas_cumprod.to(latents.device, non_blocking=True)
        noisy_latents = add_noise(latents.float(), draws.noise, draws.timesteps, alphas_cumprod)
        return denoising_loss(self.predict_noise(noisy_latents, draws.timesteps, **conditions), draws.noise)


def trained_parameters(model: FaithDiffForTraining, stage: str) -> list[str]:
    """Names of the parameters that `stage` trains; every other parameter is frozen, this one unfrozen.

    "align": the alignment module only. "unified": LQ encoder, alignment module and UNet.
    """
    assert stage in ("align", "unified"), stage
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage == "unified" or name.startswith("unet.alignment."))
        if parameter.requires_grad:
            names.append(name)
    return names

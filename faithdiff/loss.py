"""The objective of equation 3: mean |noise - noise_pred|, the noise including a small offset per channel.

In : `latents` [B, C, h, w] (VAE posterior sample x scaling factor), `lq` [B, 3, 8h, 8w] in [-1, 1], embeddings.
Out: a loss per sample [B] in fp32.

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
from faithdiff.errors import InputError
from faithdiff.parts import PARTS, Part
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
        return NoiseDraws(*(upload(tensor, device) for tensor in (self.timesteps, self.noise, self.posterior_noise)))


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`, without waiting: CUDA copies from ordinary memory only after all it was given before."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


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


def denoising_losses(noise_pred: Tensor, noise: Tensor) -> Tensor:
    """Mean absolute error of each sample [B], in fp32 whatever the inputs' precision.

    Source: equation 3 of the paper; train_SDXL_stage_2.py:935 @ f11af6c, which takes the mean of the batch as well.
    """
    return (noise_pred.float() - noise.float()).abs().flatten(1).mean(1)


class FaithDiffForTraining(nn.Module):
    """UNet and LQ encoder as the one module that is trained, in train mode; `forward` gives the losses.

    Inputs are cast to the weights' precision here, the noise schedule and the losses stay in fp32.
    """

    def __init__(self, unet: FaithDiffUNet, lq_encoder: LQEncoder, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.lq_encoder = lq_encoder
        # Kept out of the state dict, and out of reach of `.to(bf16)`: 1 - alphas_cumprod needs fp32.
        self._alphas_cumprod = alphas_cumprod.float()
        # Loaded models are in eval mode, in which neither gradient checkpointing nor batch attention happens.
        self.train()

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
            lq_features=self._encode_lq(lq.to(dtype)),
        ).sample

    def forward(self, latents: Tensor, draws: NoiseDraws, conditions: dict[str, Tensor]) -> Tensor:
        """The losses [B] of one micro-batch; `conditions` are the keyword arguments of `predict_noise`."""
        alphas_cumprod = self._alphas_cumprod.to(latents.device, non_blocking=True)
        noisy_latents = add_noise(latents.float(), draws.noise, draws.timesteps, alphas_cumprod)
        return denoising_losses(self.predict_noise(noisy_latents, draws.timesteps, **conditions), draws.noise)

    def _encode_lq(self, lq: Tensor) -> Tensor:
        """LQ features; a frozen encoder runs as it does at inference, without a graph or checkpoints."""
        is_trained = any(parameter.requires_grad for parameter in self.lq_encoder.parameters())
        with torch.set_grad_enabled(is_trained and torch.is_grad_enabled()):
            features: Tensor = self.lq_encoder(lq)
            return features


def trained_parameters(model: FaithDiffForTraining, parts: Sequence[Part]) -> list[str]:
    """Names of the parameters in `parts`, which are unfrozen; every other parameter is frozen.

    Raises:
        InputError: a part is unknown, or the model has no such part.
    """
    of_part: dict[str, list[str]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        part = _part_of(name)
        parameter.requires_grad_(part in parts)
        of_part[part].append(name)
    absent = [part for part in parts if not of_part.get(part)]
    if absent:
        allowed = ", ".join(part for part in PARTS if of_part[part])
        raise InputError(f"training: this model has no {', '.join(absent)}; its parts are {allowed}")
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _part_of(name: str) -> Part:
    owner, child = name.split(".")[:2]
    if owner == "lq_encoder":
        return "lq_encoder"
    if child == "alignment":
        return "alignment"
    return "control" if child == "control" else "unet"

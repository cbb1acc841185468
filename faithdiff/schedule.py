"""Noise schedules: what training adds (DDPM) and the steps that sampling takes (Euler, Karras et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from torch import Tensor

from faithdiff.errors import InputError


def alphas_cumprod(scheduler_config: Mapping[str, Any]) -> Tensor:
    """Cumulative signal variance [num_train_timesteps] fp32 of a scheduler config (SDXL: scaled linear, 1000)."""
    schedule: Tensor = DDPMScheduler.from_config(dict(scheduler_config)).alphas_cumprod
    return schedule


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps for latents and noise [B, 4, H, W] at integer timesteps [B] (Eq. 2)."""
    abar = alphas_cumprod.to(latents.device)[timesteps].to(latents.dtype).view(-1, 1, 1, 1)
    return abar.sqrt() * latents + (1 - abar).sqrt() * noise


@dataclass(frozen=True)
class EulerSchedule:
    """The steps of one picture: `timesteps` [S], `sigmas` [S + 1] ending in 0, and the scale of the first noise."""

    timesteps: Tensor
    sigmas: Tensor
    init_noise_sigma: float

    @classmethod
    def from_scheduler(cls, scheduler: EulerDiscreteScheduler, num_inference_steps: int) -> EulerSchedule:
        """The schedule of diffusers' Euler for `num_inference_steps` steps; `scheduler` itself stays untouched."""
        num_train_timesteps = scheduler.config.num_train_timesteps
        if not 1 <= num_inference_steps <= num_train_timesteps:
            raise InputError(
                f"schedule: num_inference_steps is {num_inference_steps}; it must be 1 to {num_train_timesteps}"
            )
        if scheduler.config.prediction_type != "epsilon":
            raise InputError(
                f"schedule: the scheduler predicts {scheduler.config.prediction_type!r}; FaithDiff needs 'epsilon'"
            )
        euler = EulerDiscreteScheduler.from_config(scheduler.config)
        euler.set_timesteps(num_inference_steps)
        return cls(euler.timesteps.clone(), euler.sigmas.clone(), float(euler.init_noise_sigma))

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def scale_model_input(self, latents: Tensor, step: int) -> Tensor:
        """x / sqrt(sigma^2 + 1): the variance the network was trained on."""
        return latents / (self.sigmas[step] ** 2 + 1).sqrt().to(latents.device)

    def euler_step(self, latents: Tensor, noise_pred: Tensor, step: int) -> Tensor:
        """x + (sigma_{i+1} - sigma_i) eps."""
        return latents + (self.sigmas[step + 1] - self.sigmas[step]).to(latents.device) * noise_pred

    def to(self, device: torch.device | str) -> EulerSchedule:
        """The same schedule with its tensors on `device`, so that no step copies from the host."""
        return EulerSchedule(self.timesteps.to(device), self.sigmas.to(device), self.init_noise_sigma)

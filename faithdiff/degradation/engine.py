"""Executes a degradation: hq uint8 RGB [H, W, 3] -> lq uint8 RGB [H/4, W/4, 3]."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faithdiff.degradation import kernels
from faithdiff.degradation.filtering import filter2d
from faithdiff.degradation.jpeg import real_jpeg
from faithdiff.degradation.levels import Picture, to_uint8, to_unit
from faithdiff.degradation.noise import add_noise, gaussian_noise, poisson_noise
from faithdiff.degradation.parameters import (
    BlurStep,
    JpegStep,
    NoiseStep,
    ResizeStep,
    Step,
    draw_parameters,
    dump_steps,
)
from faithdiff.degradation.recipe import SCALE, Recipe, find_recipe
from faithdiff.degradation.resizing import resize
from faithdiff.degradation.simulated_jpeg import simulated_jpeg
from faithdiff.errors import InputError


def degrade(
    hq: NDArray[np.uint8],
    recipe: Recipe | str,
    *,
    key: str,
    seed: int,
    variant: int = 0,
    trace: list[dict[str, Any]] | None = None,
) -> NDArray[np.uint8]:
    """The degraded picture, uint8 RGB [H/4, W/4, 3], a function of the pixels and (recipe, seed, key, variant) alone.

    `recipe` is a recipe, its name, or the path of a YAML file. `trace` receives one dict per step: its name and every
    drawn parameter.

    Raises:
        InputError: hq is not uint8 RGB [H, W, 3] with sides divisible by 4, or no such recipe.
    """
    check_hq(hq)
    recipe = find_recipe(recipe) if isinstance(recipe, str) else recipe
    steps = draw_parameters(recipe, key=key, seed=seed, variant=variant)
    if trace is not None:
        trace.extend(dump_steps(steps))
    return apply_steps(hq, steps)


def apply_steps(hq: NDArray[np.uint8], steps: Iterable[Step], *, simulate_jpeg: bool = False) -> NDArray[np.uint8]:
    """`hq` after `steps`, rounded to 8 bit; `simulate_jpeg` takes the reference's simulated JPEG instead of libjpeg."""
    height, width = hq.shape[:2]
    lq_size = (height / SCALE, width / SCALE)
    image = to_unit(hq)
    for step in steps:
        image = _apply(image, step, lq_size, simulate_jpeg)
    return to_uint8(image)


def check_hq(hq: NDArray[np.uint8]) -> None:
    """Raises InputError unless `hq` is uint8 RGB [H, W, 3] with sides that are multiples of 4, at least 4."""
    if not isinstance(hq, np.ndarray) or hq.dtype != np.uint8 or hq.ndim != 3 or hq.shape[2] != 3:
        got = f"{hq.dtype} {list(hq.shape)}" if isinstance(hq, np.ndarray) else type(hq).__name__
        raise InputError(f"degradation: got {got}; a picture must be uint8 RGB [H, W, 3]; convert it first")
    height, width = hq.shape[:2]
    if height % SCALE or width % SCALE or not height or not width:
        raise InputError(
            f"degradation: picture of {height}x{width} px; both sides must be multiples of {SCALE}; crop it first"
        )


def blur_kernel(step: BlurStep) -> kernels.Kernel:
    """The kernel of a blur step, float64 [size, size]."""
    if step.shape == "sinc":
        return kernels.sinc_kernel(step.size_px, step.cutoff_rad)
    place = (step.size_px, step.sigma_x_px, step.sigma_y_px, step.theta_rad)
    if step.shape.startswith("generalized"):
        return kernels.generalized_kernel(*place, beta=step.beta)
    if step.shape.startswith("plateau"):
        return kernels.plateau_kernel(*place, beta=step.beta)
    return kernels.gaussian_kernel(*place)


def _apply(image: Picture, step: Step, lq_size: tuple[float, float], simulate_jpeg: bool) -> Picture:
    if isinstance(step, BlurStep):
        return filter2d(image, blur_kernel(step))
    if isinstance(step, ResizeStep):
        return _resized(image, step, lq_size)
    if isinstance(step, NoiseStep):
        return add_noise(image, _noise(image, step))
    assert isinstance(step, JpegStep)
    return (simulated_jpeg if simulate_jpeg else real_jpeg)(image, step.quality)


def _resized(image: Picture, step: ResizeStep, lq_size: tuple[float, float]) -> Picture:
    height, width = lq_size if step.of == "lq" else image.shape[:2]
    size_px = (max(1, int(height * step.factor)), max(1, int(width * step.factor)))
    if step.factor == 1.0 and size_px == image.shape[:2]:
        return image
    if step.of == "lq" or 1 in size_px:
        return resize(image, step.mode, size_px=size_px)
    return resize(image, step.mode, factor=step.factor)


def _noise(image: Picture, step: NoiseStep) -> Picture:
    rng = np.random.default_rng(step.noise_seed)
    if step.kind == "gaussian":
        return gaussian_noise(image.shape, step.strength, gray=step.gray, rng=rng)
    return poisson_noise(image, step.strength, gray=step.gray, rng=rng)

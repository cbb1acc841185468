"""Draws one sample's degradation as a list of steps; everything derives from (seed, key, variant).

A step is plain data: dumped it is the audit record, and the same steps on the same picture give the same lq.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from faithdiff.degradation.recipe import BlurRecipe, NoiseRecipe, OrderRecipe, Range, Recipe, ResizeRecipe
from faithdiff.degradation.resizing import ResizeMode
from faithdiff.errors import InputError

T = TypeVar("T")
_MODES: tuple[ResizeMode, ...] = ("area", "bilinear", "bicubic")


@dataclass(frozen=True)
class BlurStep:
    """Filter with one kernel; `beta` only for generalised and plateau shapes, `cutoff_rad` only for sinc."""

    shape: str
    size_px: int
    sigma_x_px: float = 0.0
    sigma_y_px: float = 0.0
    theta_rad: float = 0.0
    beta: float = 1.0
    cutoff_rad: float = 0.0


@dataclass(frozen=True)
class ResizeStep:
    """Resize by `factor` of the picture as it is, or to `factor` of the final lq size."""

    mode: ResizeMode
    factor: float
    of: Literal["current", "lq"]


@dataclass(frozen=True)
class NoiseStep:
    """Add noise; `strength` is sigma in 0..255 for gaussian, the scale of the noise for poisson."""

    kind: Literal["gaussian", "poisson"]
    strength: float
    gray: bool
    noise_seed: int
    """Seeds the field itself, so that a step can be repeated alone."""


@dataclass(frozen=True)
class JpegStep:
    """Compress; quality as in libjpeg, 1..100."""

    quality: float


Step = BlurStep | ResizeStep | NoiseStep | JpegStep
_STEPS: dict[str, type[Step]] = {cls.__name__: cls for cls in (BlurStep, ResizeStep, NoiseStep, JpegStep)}


def dump_steps(steps: Iterable[Step]) -> list[dict[str, Any]]:
    """One dict per step, ready for JSON: its name as `step`, and everything that was drawn for it."""
    return [{"step": type(step).__name__, **dataclasses.asdict(step)} for step in steps]


def load_steps(records: Iterable[Mapping[str, Any]]) -> tuple[Step, ...]:
    """The steps that `dump_steps` wrote."""
    plain = [dict(record) for record in records]
    return tuple(_STEPS[record.pop("step")](**record) for record in plain)


def sample_rng(seed: int, key: str, variant: int) -> np.random.Generator:
    """The generator of one sample: the same for the same (seed, key, variant), whatever ran before it."""
    if seed < 0 or variant < 0:
        raise InputError(f"degradation: seed {seed} and variant {variant} must not be negative")
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng([seed, variant, *np.frombuffer(digest, "<u4").tolist()])


def draw_parameters(recipe: Recipe, *, key: str, seed: int, variant: int = 0) -> tuple[Step, ...]:
    """The steps that turn the hq picture `key` into its lq picture.

    Raises:
        InputError: seed or variant is negative.
    """
    rng = sample_rng(seed, key, variant)
    steps = _first_order(rng, recipe.first)
    if recipe.second is None:
        return (*steps, _to_lq_size(rng))
    steps += _second_order(rng, recipe.second)
    jpeg = JpegStep(_uniform(rng, recipe.second.jpeg_quality))
    resize = _to_lq_size(rng)
    sinc = _final_sinc(rng, recipe)
    if rng.random() < 0.5:
        return (*steps, resize, *sinc, jpeg)
    return (*steps, jpeg, resize, *sinc)


def _first_order(rng: np.random.Generator, order: OrderRecipe) -> list[Step]:
    steps = _blur_and_resize(rng, order, of="current")
    return [*steps, _noise(rng, order.noise), JpegStep(_uniform(rng, order.jpeg_quality))]


def _second_order(rng: np.random.Generator, order: OrderRecipe) -> list[Step]:
    """Without its JPEG: that comes before or after the last resize."""
    return [*_blur_and_resize(rng, order, of="lq"), _noise(rng, order.noise)]


def _blur_and_resize(rng: np.random.Generator, order: OrderRecipe, *, of: Literal["current", "lq"]) -> list[Step]:
    steps: list[Step] = []
    if rng.random() < order.blur.probability:
        steps.append(_blur(rng, order.blur))
    steps.append(ResizeStep(mode=_choice(rng, _MODES), factor=_resize_factor(rng, order.resize), of=of))
    return steps


def _to_lq_size(rng: np.random.Generator) -> ResizeStep:
    return ResizeStep(mode=_choice(rng, _MODES), factor=1.0, of="lq")


def _final_sinc(rng: np.random.Generator, recipe: Recipe) -> list[Step]:
    assert recipe.second is not None
    if rng.random() >= recipe.final_sinc_probability:
        return []
    size_px = _choice(rng, recipe.second.blur.sizes_px)
    return [BlurStep("sinc", size_px, cutoff_rad=_uniform(rng, (np.pi / 3, np.pi)))]


def _blur(rng: np.random.Generator, blur: BlurRecipe) -> BlurStep:
    size_px = _choice(rng, blur.sizes_px)
    if rng.random() < blur.sinc_probability:
        # A small kernel cannot carry the ringing of a low cut-off.
        lowest = np.pi / 3 if size_px < 13 else np.pi / 5
        return BlurStep("sinc", size_px, cutoff_rad=_uniform(rng, (lowest, np.pi)))
    weights = np.array(list(blur.shapes.values()))
    shape = list(blur.shapes)[rng.choice(len(weights), p=weights / weights.sum())]
    sigma_x_px = _uniform(rng, blur.sigma_px)
    sigma_y_px, theta_rad = sigma_x_px, 0.0
    if shape.endswith("aniso"):
        sigma_y_px, theta_rad = _uniform(rng, blur.sigma_px), _uniform(rng, blur.rotation_rad)
    return BlurStep(shape, size_px, sigma_x_px, sigma_y_px, theta_rad, beta=_beta(rng, shape, blur))


def _beta(rng: np.random.Generator, shape: str, blur: BlurRecipe) -> float:
    if not shape.startswith(("generalized", "plateau")):
        return 1.0
    low, high = blur.beta_generalized if shape.startswith("generalized") else blur.beta_plateau
    return _uniform(rng, (low, 1.0)) if rng.random() < 0.5 else _uniform(rng, (1.0, high))


def _resize_factor(rng: np.random.Generator, resize: ResizeRecipe) -> float:
    which = rng.random()
    if which < resize.up_probability:
        return _uniform(rng, (1.0, resize.factor[1]))
    if which < resize.up_probability + resize.down_probability:
        return _uniform(rng, (resize.factor[0], 1.0))
    return 1.0


def _noise(rng: np.random.Generator, noise: NoiseRecipe) -> NoiseStep:
    gaussian = rng.random() < noise.gaussian_probability
    return NoiseStep(
        kind="gaussian" if gaussian else "poisson",
        strength=_uniform(rng, noise.gaussian_sigma if gaussian else noise.poisson_scale),
        gray=bool(rng.random() < noise.gray_probability),
        noise_seed=int(rng.integers(2**63)),
    )


def _uniform(rng: np.random.Generator, bounds: Range) -> float:
    return float(rng.uniform(*bounds))


def _choice(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]

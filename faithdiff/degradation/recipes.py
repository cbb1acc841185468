"""The degradation recipes as data: what may be drawn, how often, and from which range.

Sources: FaithDiff @ f11af6c dataloader/train_kernel.yml (equal to PASD's params_realesrgan.yml value for value);
DASR @ b2269e4 scripts/data_preparation/create_realsr_validation_set_type{1,2,3}.py, options/train/DASR/train_DASR.yml.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from faithdiff.errors import InputError

SCALE = 4
"""Every recipe gives an lq picture of a quarter of the hq picture's height and width."""

Range = tuple[float, float]


@dataclass(frozen=True)
class BlurRecipe:
    """Blur kernels: mixture weights of the shapes, and the ranges of their parameters (pixels, radians)."""

    probability: float
    """Chance that this blur is applied at all."""
    sizes_px: tuple[int, ...]
    sinc_probability: float
    """Chance of a circular low-pass kernel instead of the mixture."""
    shapes: Mapping[str, float]
    """Weights of iso, aniso, generalized_iso, generalized_aniso, plateau_iso, plateau_aniso."""
    sigma_px: Range
    rotation_rad: Range = (-math.pi, math.pi)
    beta_generalized: Range = (0.5, 4.0)
    """Half of the draws lie below 1, half above."""
    beta_plateau: Range = (1.0, 2.0)


@dataclass(frozen=True)
class ResizeRecipe:
    """Up, down or keep with these chances; factors are drawn between 1 and the end of the range."""

    up_probability: float
    down_probability: float
    factor: Range


@dataclass(frozen=True)
class NoiseRecipe:
    """Gaussian noise with probability 1/2, else Poisson noise."""

    gaussian_sigma: Range
    """In grey levels of 0..255."""
    poisson_scale: Range
    gaussian_probability: float = 0.5
    gray_probability: float = 0.4
    """Chance that one noise field is shared by the three colours."""


@dataclass(frozen=True)
class OrderRecipe:
    """One order of the process: blur, resize, noise, JPEG."""

    blur: BlurRecipe
    resize: ResizeRecipe
    noise: NoiseRecipe
    jpeg_quality: Range


@dataclass(frozen=True)
class Recipe:
    """One or two orders; `final_sinc_probability` is the chance of a low-pass kernel at the end of the second."""

    name: str
    first: OrderRecipe
    second: OrderRecipe | None
    final_sinc_probability: float


_PASD_SHAPES = MappingProxyType(
    {
        "iso": 0.45,
        "aniso": 0.25,
        "generalized_iso": 0.12,
        "generalized_aniso": 0.03,
        "plateau_iso": 0.12,
        "plateau_aniso": 0.03,
    }
)
_LEVEL_SHAPES = MappingProxyType({"iso": 0.65, "aniso": 0.35})


def _pasd_blur(probability: float, sigma_px: Range) -> BlurRecipe:
    return BlurRecipe(
        probability=probability,
        sizes_px=tuple(range(7, 22, 2)),
        sinc_probability=0.1,
        shapes=_PASD_SHAPES,
        sigma_px=sigma_px,
    )


def _level_blur(sigma_px: Range, *, probability: float = 1.0) -> BlurRecipe:
    # The scripts say 7 to 21, and compute 9 to 21.
    return BlurRecipe(
        probability=probability,
        sizes_px=tuple(range(9, 22, 2)),
        sinc_probability=0.0,
        shapes=_LEVEL_SHAPES,
        sigma_px=sigma_px,
    )


PASD = Recipe(
    name="pasd",
    first=OrderRecipe(
        blur=_pasd_blur(1.0, (0.2, 3.0)),
        resize=ResizeRecipe(up_probability=0.2, down_probability=0.7, factor=(0.3, 1.5)),
        noise=NoiseRecipe(gaussian_sigma=(1, 15), poisson_scale=(0.05, 2.0)),
        jpeg_quality=(60, 95),
    ),
    second=OrderRecipe(
        blur=_pasd_blur(0.5, (0.2, 1.5)),
        resize=ResizeRecipe(up_probability=0.3, down_probability=0.4, factor=(0.6, 1.2)),
        noise=NoiseRecipe(gaussian_sigma=(1, 12), poisson_scale=(0.05, 1.0)),
        jpeg_quality=(60, 100),
    ),
    final_sinc_probability=0.8,
)
"""The training degradation of the paper."""

_LEVEL_I = Recipe(
    name="level_I",
    first=OrderRecipe(
        blur=_level_blur((0.2, 0.8)),
        resize=ResizeRecipe(up_probability=0.1, down_probability=0.2, factor=(0.85, 1.2)),
        noise=NoiseRecipe(gaussian_sigma=(1, 10), poisson_scale=(0.05, 0.5)),
        jpeg_quality=(90, 95),
    ),
    second=None,
    final_sinc_probability=0.0,
)
_LEVEL_II = Recipe(
    name="level_II",
    first=OrderRecipe(
        blur=_level_blur((0.2, 1.5)),
        resize=ResizeRecipe(up_probability=0.3, down_probability=0.4, factor=(0.5, 1.2)),
        noise=NoiseRecipe(gaussian_sigma=(1, 20), poisson_scale=(0.05, 1.5)),
        jpeg_quality=(50, 95),
    ),
    second=None,
    final_sinc_probability=0.0,
)
_LEVEL_III = Recipe(
    name="level_III",
    first=OrderRecipe(
        blur=_level_blur((0.2, 3.0)),
        resize=ResizeRecipe(up_probability=0.2, down_probability=0.7, factor=(0.15, 1.5)),
        noise=NoiseRecipe(gaussian_sigma=(1, 30), poisson_scale=(0.05, 3.0)),
        jpeg_quality=(30, 95),
    ),
    second=OrderRecipe(
        blur=_level_blur((0.2, 1.5), probability=0.8),
        resize=ResizeRecipe(up_probability=0.3, down_probability=0.4, factor=(0.3, 1.2)),
        noise=NoiseRecipe(gaussian_sigma=(1, 25), poisson_scale=(0.05, 2.5)),
        jpeg_quality=(30, 95),
    ),
    final_sinc_probability=0.8,
)

D_LEVELS: Mapping[str, Recipe] = MappingProxyType({"I": _LEVEL_I, "II": _LEVEL_II, "III": _LEVEL_III})
"""The validation degradations: weak, standard and severe."""

RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in (PASD, *D_LEVELS.values())})
"""Every recipe by its name."""


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises InputError with the names that exist."""
    if name in RECIPES:
        return RECIPES[name]
    close = difflib.get_close_matches(name, list(RECIPES), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(f"degradation: no recipe {name!r}; there are {', '.join(RECIPES)}{hint}")

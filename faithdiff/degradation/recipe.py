"""The degradation recipes as data: what may be drawn, how often, and from which range.

The shipped ones lie in `recipes/*.yaml`; a user's own is a file of the same form. A recipe is checked when it is made,
and `Recipe.as_dict` gives its whole content as plain values, which says everything that decides a picture's lq.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from faithdiff.errors import InputError

SCALE = 4
"""Every recipe gives an lq picture of a quarter of the hq picture's height and width."""

RECIPES_PATH = Path(__file__).parent / "recipes"
SHAPES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
MAX_KERNEL_PX = 63

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
    """Weights of some of SHAPES."""
    sigma_px: Range
    rotation_rad: Range = (-math.pi, math.pi)
    beta_generalized: Range = (0.5, 4.0)
    """Half of the draws lie below 1, half above."""
    beta_plateau: Range = (1.0, 2.0)

    def __post_init__(self) -> None:
        _check_probabilities(self, "probability", "sinc_probability")
        _check_sizes(self)
        _check_shapes(self)
        _check_range(self, "sigma_px", 0.05, 100.0)
        _check_range(self, "rotation_rad", -2 * math.pi, 2 * math.pi)
        for name in ("beta_generalized", "beta_plateau"):
            _check_range(self, name, 0.05, 20.0, holds_one=True)


@dataclass(frozen=True)
class ResizeRecipe:
    """Up, down or keep with these chances; factors are drawn between 1 and the end of the range."""

    up_probability: float
    down_probability: float
    factor: Range

    def __post_init__(self) -> None:
        _check_probabilities(self, "up_probability", "down_probability")
        if self.up_probability + self.down_probability > 1.0 + 1e-9:
            raise InputError(
                f"up_probability {self.up_probability} and down_probability {self.down_probability} "
                "sum to more than 1; what they leave is the chance to keep the size"
            )
        _check_range(self, "factor", 0.01, 8.0, holds_one=True)


@dataclass(frozen=True)
class NoiseRecipe:
    """Gaussian noise with `gaussian_probability`, else Poisson noise."""

    gaussian_sigma: Range
    """In grey levels of 0..255."""
    poisson_scale: Range
    gaussian_probability: float = 0.5
    gray_probability: float = 0.4
    """Chance that one noise field is shared by the three colours."""

    def __post_init__(self) -> None:
        _check_range(self, "gaussian_sigma", 0.0, 255.0)
        _check_range(self, "poisson_scale", 0.0, 100.0)
        _check_probabilities(self, "gaussian_probability", "gray_probability")


@dataclass(frozen=True)
class OrderRecipe:
    """One order of the process: blur, resize, noise, JPEG."""

    blur: BlurRecipe
    resize: ResizeRecipe
    noise: NoiseRecipe
    jpeg_quality: Range

    def __post_init__(self) -> None:
        _check_range(self, "jpeg_quality", 1.0, 100.0)


@dataclass(frozen=True)
class Recipe:
    """One or two orders; `final_sinc_probability` is the chance of a low-pass kernel at the end of the second.

    Raises InputError, as every part of it does, when a value is out of range.
    """

    name: str
    first: OrderRecipe
    second: OrderRecipe | None = None
    final_sinc_probability: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or not self.name.isprintable():
            raise InputError(f"name is {self.name!r}; it must be printable text")
        _check_probabilities(self, "final_sinc_probability")
        if self.second is None and self.final_sinc_probability > 0:
            raise InputError("final_sinc_probability is above 0 without a second order; add one, or set it to 0")

    def as_dict(self) -> dict[str, Any]:
        """Every value as plain data, ready for JSON or YAML; `recipe_from` reads it back."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain


def find_recipe(name: str) -> Recipe:
    """The shipped recipe called `name`, or the one in a YAML file at that path.

    Raises:
        InputError: there is no such recipe, or its file is wrong.
    """
    if name in RECIPES:
        return RECIPES[name]
    if name.endswith((".yaml", ".yml")):
        return read_recipe(Path(name))
    close = difflib.get_close_matches(name, list(RECIPES), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(f"degradation: no recipe {name!r}; there are {', '.join(RECIPES)}, or give a .yaml file{hint}")


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises InputError when it cannot be read, or for the first value that is wrong."""
    where = f"degradation: recipe {path}"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: is not YAML: {' '.join(str(error).split())}") from error
    return recipe_from(values, where=where)


def recipe_from(values: Any, *, where: str) -> Recipe:
    """The recipe in plain values. Raises InputError, one line that begins with `where`, for the first wrong one."""
    recipe: Recipe = _build(Recipe, values, where)
    return recipe


_PARTS: dict[str, type[Any]] = {
    "first": OrderRecipe,
    "second": OrderRecipe,
    "blur": BlurRecipe,
    "resize": ResizeRecipe,
    "noise": NoiseRecipe,
}


def _build(cls: type[Any], values: Any, where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: got {values!r}; it must be a mapping of {', '.join(fields)}")
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"{where}: no field {name!r}; there are {', '.join(fields)}{hint}")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values]
    if missing:
        raise InputError(f"{where}: {', '.join(missing)} missing; add it")
    parts = {
        name: _build(_PARTS[name], value, f"{where}: {name}")
        for name, value in values.items()
        if name in _PARTS and not (name == "second" and value is None)
    }
    try:
        return cls(**{**values, **parts})
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _check_probabilities(part: Any, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        if not _is_number(value) or not 0 <= value <= 1:
            raise InputError(f"{name} is {value!r}; it must be a number from 0 to 1")
        _canonical(part, name, float(value))


def _check_range(part: Any, name: str, lowest: float, highest: float, *, holds_one: bool = False) -> None:
    value = getattr(part, name)
    ends = list(value) if isinstance(value, list | tuple) else []
    if len(ends) != 2 or not all(_is_number(end) for end in ends):
        raise InputError(f"{name} is {value!r}; it must be two numbers, [low, high]")
    low, high = float(ends[0]), float(ends[1])
    if low > high:
        raise InputError(f"{name} is {value!r}; its low end is above its high end; swap them")
    if low < lowest or high > highest:
        raise InputError(f"{name} is {value!r}; it must lie within {lowest:.4g} to {highest:.4g}")
    if holds_one and not low <= 1.0 <= high:
        raise InputError(f"{name} is {value!r}; it must hold 1, because draws lie between 1 and either end")
    _canonical(part, name, (low, high))


def _check_sizes(blur: BlurRecipe) -> None:
    sizes = list(blur.sizes_px) if isinstance(blur.sizes_px, list | tuple) else []
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    if not sizes or not whole or not all(size % 2 and 1 <= size <= MAX_KERNEL_PX for size in sizes):
        raise InputError(f"sizes_px is {blur.sizes_px!r}; it must be a list of odd whole numbers, 1 to {MAX_KERNEL_PX}")
    _canonical(blur, "sizes_px", tuple(sizes))


def _check_shapes(blur: BlurRecipe) -> None:
    if not isinstance(blur.shapes, Mapping) or not blur.shapes:
        raise InputError(f"shapes is {blur.shapes!r}; it must map shapes to weights; there are {', '.join(SHAPES)}")
    for shape, weight in blur.shapes.items():
        if shape not in SHAPES:
            close = difflib.get_close_matches(str(shape), SHAPES, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"shapes: no shape {shape!r}; there are {', '.join(SHAPES)}{hint}")
        if not _is_number(weight) or weight < 0:
            raise InputError(f"shapes: the weight of {shape} is {weight!r}; it must be a number, 0 or more")
    if not sum(blur.shapes.values()) > 0:
        raise InputError("shapes: every weight is 0; one must be above 0")
    # A plain dict in one order: read-only views do not pickle, and the order decides what a draw means.
    _canonical(blur, "shapes", {shape: float(blur.shapes[shape]) for shape in SHAPES if shape in blur.shapes})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _canonical(part: Any, name: str, value: Any) -> None:
    """Sets a field of a frozen part: 15 and 15.0, lists and tuples say the same and must be dumped alike."""
    object.__setattr__(part, name, value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _shipped(names: Iterable[str]) -> dict[str, Recipe]:
    return {name: read_recipe(RECIPES_PATH / f"{name}.yaml") for name in names}


RECIPES: Mapping[str, Recipe] = MappingProxyType(_shipped(("pasd", "level_I", "level_II", "level_III")))
"""Every shipped recipe by its name."""

PASD: Recipe = RECIPES["pasd"]
"""The training degradation of the paper."""

D_LEVELS: Mapping[str, Recipe] = MappingProxyType({level: RECIPES[f"level_{level}"] for level in ("I", "II", "III")})
"""The validation degradations: weak, standard and severe."""

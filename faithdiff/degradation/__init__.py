"""hq -> lq: PASD's two-order degradation and the D-level I, II and III recipes, executed by one engine.

    from faithdiff.degradation import PASD, D_LEVELS, degrade
    lq = degrade(hq, PASD, key="astronaut-00", seed=0)

`recipes` holds the numbers as data, `parameters` draws one sample's parameters from them, `engine` executes what was
drawn, `kernels` and `primitives` are the arithmetic.
"""

from __future__ import annotations

from faithdiff.degradation.engine import apply_steps, degrade
from faithdiff.degradation.parameters import BlurStep, JpegStep, NoiseStep, ResizeStep, Step, draw_parameters
from faithdiff.degradation.recipes import D_LEVELS, PASD, RECIPES, Recipe, find_recipe

__all__ = [
    "D_LEVELS",
    "PASD",
    "RECIPES",
    "BlurStep",
    "JpegStep",
    "NoiseStep",
    "Recipe",
    "ResizeStep",
    "Step",
    "apply_steps",
    "degrade",
    "draw_parameters",
    "find_recipe",
]

"""hq -> lq: PASD's two-order degradation and the D-level I, II and III recipes, executed by one engine.

    from faithdiff.degradation import PASD, D_LEVELS, degrade
    lq = degrade(hq, PASD, key="astronaut-00", seed=0)

`recipes/` holds the numbers as data and `recipe` reads them, `parameters` draws one sample's parameters, `engine`
executes what was drawn; `kernels`, `filtering`, `resizing`, `noise` and `jpeg` are the arithmetic on `levels`.
"""

from __future__ import annotations

from faithdiff.degradation.engine import apply_steps, degrade
from faithdiff.degradation.parameters import (
    BlurStep,
    JpegStep,
    NoiseStep,
    ResizeStep,
    Step,
    draw_parameters,
    dump_steps,
    load_steps,
)
from faithdiff.degradation.recipe import D_LEVELS, PASD, RECIPES, Recipe, find_recipe

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
    "dump_steps",
    "find_recipe",
    "load_steps",
]

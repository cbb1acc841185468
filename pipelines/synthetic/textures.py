"""Textures: one material, or one laid over another, seen from the side or from above under some light."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.synthetic import materials, patterns
from pipelines.synthetic.fields import TILE_PX, Field, grid, light, noise, relief, sample, step
from pipelines.synthetic.materials import Surface
from pipelines.synthetic.picture import SUPERSAMPLING, Picture, quantized, reduced

Material = Callable[[np.random.Generator, Field, Field], Surface]

MATERIALS: dict[str, Material] = {
    material.__name__: material
    for material in (
        materials.stone,
        materials.marble,
        materials.sand,
        materials.metal,
        materials.wood,
        materials.pebbles,
        materials.grass,
        patterns.bricks,
        patterns.tiles,
        patterns.fabric,
        patterns.stripes,
    )
}
_LAYERED_SHARE = 0.3
_MIN_MEAN, _MIN_DEVIATION = 0.15, 0.05


def texture(rng: np.random.Generator, height_px: int, width_px: int) -> Picture:
    """One picture of a texture."""
    names = rng.choice(list(MATERIALS), 2, replace=False)
    sun = rng.uniform(0, 2 * np.pi)
    rgb, caption = lit_surface(rng, MATERIALS[names[0]], height_px, width_px, sun)
    if rng.random() < _LAYERED_SHARE:
        above, name = lit_surface(rng, MATERIALS[names[1]], height_px, width_px, sun)
        cover, shadow = _layer(rng, height_px, width_px, sun)
        rgb = rgb * shadow * (1 - cover) + above * cover
        caption = f"{caption}, partly covered by {name}"
    rgb = exposed(rgb * light(rng, height_px, width_px)[..., None])
    return Picture(quantized(rgb), f"{caption[0].upper()}{caption[1:]}, seen from close by.")


def exposed(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    """As a photographer would expose what is very dark or has hardly any contrast; everything else is left alone."""
    mean, deviation = float(rgb.mean()), float(rgb.mean(axis=-1).std())
    gain = max(1.0, min(_MIN_DEVIATION / max(deviation, 1e-6), 4.0))
    return (rgb - mean) * gain + max(mean, _MIN_MEAN)


def lit_surface(
    rng: np.random.Generator, material: Material, height_px: int, width_px: int, sun: float
) -> tuple[NDArray[np.float32], str]:
    """The material from some point of view, [height_px, width_px, 3], and its name."""
    u, v = view(rng, height_px, width_px)
    surface = material(rng, u, v)
    return reduced(surface.planes * relief(surface.height, sun, rng.uniform(0.3, 1.4))), surface.name


def view(rng: np.random.Generator, height_px: int, width_px: int) -> tuple[Field, Field]:
    """Coordinates on the material, in px of the finished picture, of every point of the supersampled canvas.

    Half of the views are straight, the others are turned, tilted in perspective and nearer or farther.
    """
    height, width = height_px * SUPERSAMPLING, width_px * SUPERSAMPLING
    x = (np.arange(width, dtype=np.float32) - width / 2)[None, :]
    y = (np.arange(height, dtype=np.float32) - height / 2)[:, None]
    angle = rng.normal(0, 0.02) if rng.random() < 0.5 else rng.uniform(0, math.pi)
    is_tilted = rng.random() < 0.5
    towards_x, towards_y = (rng.uniform(-0.5, 0.5, 2) / max(height, width) * is_tilted).tolist()
    scale = math.exp(rng.normal(0, 0.2)) / SUPERSAMPLING
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    far_u, far_v = rng.uniform(0, 4096, 2).tolist()
    depth = 1 / (1 + towards_x * x + towards_y * y)
    return (cos * x - sin * y) * depth + far_u, (sin * x + cos * y) * depth + far_v


def _layer(rng: np.random.Generator, height_px: int, width_px: int, sun: float) -> tuple[Field, Field]:
    """Where an upper layer lies (1), and how dark its shadow makes what lies below; both [height_px, width_px, 1]."""
    x, y = grid(height_px, width_px)
    side = min(height_px, width_px)
    ragged = sample(noise(rng, 1.9), x * (TILE_PX / side), y * (TILE_PX / side))
    angle = rng.uniform(0, 2 * np.pi)
    across = math.cos(angle) * (x / side - 0.5) + math.sin(angle) * (y / side - 0.5)
    edge = across * 5 + float(rng.choice([0.03, 0.35, 1.0])) * ragged
    cover = step(0, edge, 8 / side)
    reach = rng.uniform(2, 7)
    away = (math.cos(sun) * reach, math.sin(sun) * reach)
    moved = cv2.warpAffine(
        cover,
        np.array([[1, 0, away[0]], [0, 1, away[1]]], np.float32),
        (width_px, height_px),
        borderMode=cv2.BORDER_REPLICATE,
    )
    return cover[..., None], np.asarray(1 - 0.4 * moved[..., None], np.float32)

"""Materials without a repeating pattern: stone, sand, wood, brushed metal, grass, pebbles.

A material is `(rng, u, v) -> Surface`, where u and v are the coordinates of every point on it, in px of the finished
picture; `pipelines.synthetic.textures` bends them as it looks at the material from the side.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.synthetic.colours import Colours, colour_names, draw_palette, from_lab, ramp, to_lab, vary
from pipelines.synthetic.fields import TILE_PX, Field, noise, sample, step, wrapped


class Surface(NamedTuple):
    """What a material looks like, without light."""

    planes: NDArray[np.float32]
    """sRGB in 0..1, [3, height, width]."""
    height: Field
    """How far each point stands out, in about -2..2."""
    name: str
    """Read after "a picture of": "a gray stone wall"."""


def stone(rng: np.random.Generator, u: Field, v: Field) -> Surface:
    """Mottled stone or plaster: 1 / f noise through a scale of colours."""
    tile = noise(rng, rng.uniform(0.9, 1.5), angle=rng.uniform(0, np.pi), stretch=rng.uniform(1, 2.5))
    scale = ramp(rng)
    return _through(scale, sample(tile, u, v), f"mottled stone in {_names(scale)}")


def marble(rng: np.random.Generator, u: Field, v: Field) -> Surface:
    """Veins: stripes that 1 / f noise bends far."""
    bend = sample(noise(rng, 1.7), u, v)
    fine = sample(noise(rng, 1.0), u * 1.3, v * 1.3)
    angle, period = rng.uniform(0, np.pi), rng.uniform(60, 160)
    phase = (math.cos(angle) * u + math.sin(angle) * v) * (2 * math.pi / period)
    veins = 1 - np.abs(np.sin(phase + np.float32(rng.uniform(1.5, 3.5)) * bend)) ** np.float32(rng.uniform(0.3, 0.7))
    scale = ramp(rng)[:: int(rng.choice([-1, 1]))]
    surface = _through(scale, 3.2 * veins - 1.4 + 0.25 * fine, f"veined marble in {_names(scale)}")
    # Polished.
    return surface._replace(height=np.zeros_like(u))


def sand(rng: np.random.Generator, u: Field, v: Field) -> Surface:
    """Ripples: noise of one band of frequencies and one direction, as a Gabor filter leaves it."""
    ripples = rng.uniform(10, 40)
    angle = rng.uniform(0, np.pi)
    wave = sample(noise(rng, 0.0, angle=angle, stretch=rng.uniform(2, 4), ring=(ripples, ripples / 5)), u, v)
    grains = sample(noise(rng, 0.3), u * 1.7, v * 1.7)
    base = to_lab(draw_palette(rng, 1))[0]
    scale = from_lab(np.column_stack([np.linspace(base[0] * 0.55, min(base[0] * 1.3 + 6, 95), 256), *_flat(base)]))
    surface = _through(scale, 0.6 * wave + 0.35 * grains, f"rippled sand in {_names(scale)}")
    return surface._replace(height=1.5 * wave + 0.3 * grains)


def metal(rng: np.random.Generator, u: Field, v: Field) -> Surface:
    """Brushed metal: noise drawn out along one direction, and scratches."""
    angle = rng.uniform(0, np.pi)
    brushed = sample(noise(rng, 0.5, angle=angle, stretch=rng.uniform(20, 60)), u, v)
    broad = sample(noise(rng, 1.8), u * 0.7, v * 0.7)
    base = to_lab(draw_palette(rng, 1))[0] * [1, 0.4, 0.4]
    scale = from_lab(np.column_stack([np.linspace(base[0] * 0.5, min(base[0] * 1.5 + 10, 97), 256), *_flat(base)]))
    surface = _through(scale, 0.55 * brushed + 0.5 * broad, f"brushed {_names(scale)} metal")
    return surface._replace(height=0.4 * brushed)


def wood(rng: np.random.Generator, u: Field, v: Field) -> Surface:
    """Planks cut along the trunk: year rings, bent by noise, with fibres and dark joints."""
    plank = rng.uniform(50, 170)
    board = np.floor(v / np.float32(plank))
    index = wrapped(board, 64).astype(np.int32)
    shift = rng.uniform(0, 4000, 64).astype(np.float32)[index]
    bend = sample(noise(rng, 1.9, stretch=rng.uniform(5, 9)), u + shift, v + shift)
    fibres = sample(noise(rng, 0.5, stretch=rng.uniform(15, 30)), u + shift, v)
    phase = v / rng.uniform(7, 20) + rng.uniform(0.8, 2.0) * bend
    rings = (phase - np.floor(phase)) ** 2
    hue = rng.uniform([25, 4, 12], [72, 16, 34])
    scale = from_lab(np.linspace(hue * [0.5, 1.1, 0.9], np.minimum(hue * [1.15, 0.9, 1.05] + 3, 92), 256))
    tone = 1.2 - 2.4 * rings + 0.6 * fibres + rng.normal(0, 0.5, 64).astype(np.float32)[index]
    surface = _through(scale, tone, f"{_names(scale)} wooden planks")
    joint = np.abs(v - (board + 0.5) * np.float32(plank)) - np.float32(plank / 2 - 1.2)
    gap = step(0, joint, 1.0)
    return surface._replace(planes=surface.planes * (1 - 0.8 * gap), height=0.3 * fibres - 3 * gap)


def pebbles(rng: np.random.Generator, u: Field, v: Field) -> Surface:
    """Gravel, scales or cobbles: the cells nearest to scattered points, rounded towards their edges."""
    size = rng.uniform(14, 48)
    cells, distance = _cells(rng, size)
    bend = sample(noise(rng, 1.6), u, v) * np.float32(0.12 * size)
    label = sample(cells, u + bend, v - bend, cv2.INTER_NEAREST).astype(np.int32)
    inside = sample(distance, u + bend, v - bend)
    palette = draw_palette(rng, 5)
    colour = vary(rng, palette[rng.integers(5, size=int(label.max()) + 1)], 9)
    round_off = np.clip(inside / np.float32(size * rng.uniform(0.18, 0.4)), 0, 1)
    grain = sample(noise(rng, 0.9), u * 1.5, v * 1.5)
    shade = (0.35 + 0.65 * step(0.12, round_off, 0.24)) * (1 + np.float32(rng.uniform(0.03, 0.12)) * grain)
    planes = np.stack([colour[:, channel][label] * shade for channel in range(3)])
    domes = np.float32(size / 3) * np.sqrt(1 - (1 - round_off) ** 2)
    return Surface(planes, domes + 0.3 * grain, f"{colour_names(colour, 2)} pebbles")


def grass(rng: np.random.Generator, u: Field, v: Field) -> Surface:
    """Tapered blades that lie over each other, the upper ones lighter."""
    num, lean, disorder = 3600, rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.8)
    length, width = rng.uniform(18, 75, num), rng.uniform(0.8, 2.4, num)
    share = np.linspace(0, 1, 6)[None, :]
    heading = rng.normal(lean, disorder, num)[:, None] + rng.normal(0, 0.35, num)[:, None] * share
    along = np.stack([np.cos(heading), np.sin(heading)], axis=-1)
    aside = np.stack([-np.sin(heading), np.cos(heading)], axis=-1) * (width[:, None] * (1 - share))[..., None]
    spine = rng.uniform(0, TILE_PX, (num, 1, 2)) + along * (length[:, None] * share)[..., None]
    blades = np.concatenate([spine + aside, (spine - aside)[:, ::-1]], axis=1)
    hue = to_lab(draw_palette(rng, 4)) * [0.4, 0.35, 0.35] + rng.uniform([22, -24, 18], [40, -4, 36])
    tones = vary(rng, from_lab(hue)[rng.integers(4, size=num)], 6) * np.linspace(0.3, 1.25, num)[:, None]
    tile = _strewn(blades, np.clip(tones, 0, 1))
    planes = np.stack([sample(channel, 2 * u, 2 * v) for channel in tile])
    return Surface(planes, np.zeros_like(u), f"{colour_names(tones[num // 2 :], 2)} blades of grass")


def _through(scale: Colours, tone: Field, name: str) -> Surface:
    """Tones of deviation about 1 through a scale of colours."""
    index = np.clip(tone * np.float32(48) + 128, 0, 255).astype(np.uint8)
    return Surface(np.stack([cv2.LUT(index, scale[:, channel].copy()) for channel in range(3)]), tone, name)


def _cells(rng: np.random.Generator, size: float) -> tuple[Field, Field]:
    """A periodic tile of cells: each point's cell, and its distance to the nearest edge."""
    side = int(TILE_PX / size)
    corners = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
    places = corners + rng.uniform(0, 0.9, (side**2, 2))
    places = np.mod(np.rint(places * TILE_PX / side), TILE_PX).astype(int)
    number = np.zeros((TILE_PX, TILE_PX), np.int32)
    number[places[:, 1], places[:, 0]] = np.arange(1, side**2 + 1)
    # No point is farther than this from the nearest place.
    margin = int(3 * TILE_PX / side)
    number = np.pad(number, margin, mode="wrap")
    _, nearest = cv2.distanceTransformWithLabels(
        (number == 0).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    of_label = np.zeros(int(nearest.max()) + 1, np.float32)
    of_label[nearest[number > 0]] = number[number > 0]
    cells = of_label[nearest]
    edges = (cells != np.roll(cells, 1, 0)) | (cells != np.roll(cells, 1, 1))
    distance = cv2.distanceTransform((~edges).astype(np.uint8), cv2.DIST_L2, 5)
    inner = slice(margin, margin + TILE_PX)
    return np.ascontiguousarray(cells[inner, inner]), np.ascontiguousarray(distance[inner, inner])


def _strewn(outlines: NDArray[np.float64], colours: Colours) -> NDArray[np.float32]:
    """Outlines [n, points, 2], in px of a tile, painted one over another: planes of twice that size, without a seam."""
    side = 2 * TILE_PX
    tile = np.zeros((side, side, 3), np.uint8)
    tile[:] = colours[: len(colours) // 4].mean(axis=0) * 128
    points = np.rint(outlines * 32).astype(np.int32)
    low, high = points.min(axis=1), points.max(axis=1)
    for index, colour in enumerate((colours * 255).tolist()):
        for x in _shifts(low[index, 0], high[index, 0], side * 16):
            for y in _shifts(low[index, 1], high[index, 1], side * 16):
                cv2.fillPoly(tile, [points[index] + [x, y]], colour, cv2.LINE_AA, shift=4)
    return np.asarray(tile.transpose(2, 0, 1) / np.float32(255), np.float32, order="C")


def _shifts(low: int, high: int, period: int) -> list[int]:
    """Where else to draw what crosses the border of a tile that repeats."""
    return [0, *([period] if low < 0 else []), *([-period] if high >= period else [])]


def _flat(lab: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two chroma axes of one colour, 256 times."""
    return np.full(256, lab[1]), np.full(256, lab[2])


def _names(scale: Colours) -> str:
    return colour_names(scale[40:216:8], 2)

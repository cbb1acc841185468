"""Materials with a repeating pattern, mostly made by people: bricks, tiles, fabric, stripes.

Each is a material as in `pipelines.synthetic.materials`: `(rng, u, v) -> Surface`.
"""

from __future__ import annotations

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from pipelines.synthetic.colours import Colours, colour_names, draw_palette, from_lab, to_lab, vary
from pipelines.synthetic.fields import Field, noise, sample, step, wrapped
from pipelines.synthetic.materials import Surface

_KINDS = 1024
"""Stones of one wall differ; after so many they repeat."""


def bricks(rng: np.random.Generator, u: Field, v: Field) -> Surface:
    """A brick wall in running bond, with rough edges and mortar."""
    length = rng.uniform(44, 120)
    height = length * rng.uniform(0.28, 0.48)
    row = np.floor(v / np.float32(height))
    place = u / np.float32(length) + np.float32(rng.uniform(0.25, 0.5)) * wrapped(row, 2)
    column = np.floor(place)
    rough = sample(noise(rng, 1.0), u * 1.5, v * 1.5)
    inside = np.minimum(_to_edge(place - column, length), _to_edge(v / np.float32(height) - row, height))
    joint = height * rng.uniform(0.04, 0.1)
    face = step(joint, inside + np.float32(0.35 * joint) * rough, 1.6)
    palette = draw_palette(rng, 3)
    colour = vary(rng, palette[rng.choice(3, _KINDS, p=[0.6, 0.3, 0.1])], 6)
    mortar = from_lab(to_lab(draw_palette(rng, 1)) * [0.5, 0.3, 0.3] + [35, 0, 3])
    planes = _laid(colour, _number(row, column), mortar, face)
    planes *= 1 + np.float32(rng.uniform(0.05, 0.14)) * rough
    return Surface(planes, 2.5 * face + 0.5 * rough, f"a wall of {colour_names(colour, 2)} bricks")


def tiles(rng: np.random.Generator, u: Field, v: Field) -> Surface:
    """Square tiles, in two colours as on a chessboard or each a little different, with grout."""
    size = rng.uniform(28, 90)
    row, column = np.floor(v / np.float32(size)), np.floor(u / np.float32(size))
    inside = np.minimum(_to_edge(u / np.float32(size) - column, size), _to_edge(v / np.float32(size) - row, size))
    face = step(rng.uniform(0.4, 2.2), inside, 1.2)
    palette = draw_palette(rng, 3)
    is_checkered = rng.random() < 0.5
    colour = vary(rng, palette[: 2 if is_checkered else 1].repeat(_KINDS, axis=0)[: 2 * _KINDS], 3)
    number = _number(row, column)
    if is_checkered:
        number = wrapped(row + column, 2).astype(np.int32) * _KINDS + number
    planes = _laid(colour, number, palette[2:], face)
    veins = sample(noise(rng, 1.4), u, v)
    planes *= 1 + np.float32(rng.uniform(0.01, 0.09)) * veins
    kind = "checkered tiles" if is_checkered else "tiles"
    return Surface(planes, 1.5 * face, f"{colour_names(palette[: 1 + is_checkered], 2)} {kind}")


def fabric(rng: np.random.Generator, u: Field, v: Field) -> Surface:
    """Woven cloth: threads go over and under each other; their colours repeat as stripes or as a tartan."""
    thread = rng.uniform(2.6, 6.5)
    warp, weft = u / np.float32(thread), v / np.float32(thread)
    column, row = np.floor(warp), np.floor(weft)
    twill = int(rng.choice([2, 3, 4]))
    over = wrapped(column + row, twill) < twill / 2
    across, along = (warp - column) * 2 - 1, (weft - row) * 2 - 1
    rounding = np.where(over, 1 - across**2, 1 - along**2)
    palette = draw_palette(rng, 4)
    sett = _sett(rng, palette)
    is_tartan = rng.random() < 0.6
    lying = sett if is_tartan else vary(rng, palette[:1].repeat(len(sett), axis=0), 3)
    columns, rows = (wrapped(line, len(sett)).astype(np.int32) % len(sett) for line in (column, row))
    fuzz = sample(noise(rng, 0.6), u * 2, v * 2)
    shade = (0.55 + 0.45 * rounding) * (1 + 0.07 * fuzz)
    planes = np.stack([np.where(over, sett[columns, c], lying[rows, c]) * shade for c in range(3)])
    kind = "tartan cloth" if is_tartan else "striped cloth"
    return Surface(planes, 0.8 * rounding, f"{colour_names(sett, 3)} {kind}")


def stripes(rng: np.random.Generator, u: Field, v: Field) -> Surface:
    """Painted stripes of unequal width, straight or in waves, worn here and there."""
    palette = draw_palette(rng, 5)
    widths = rng.uniform(5, 45, len(palette))
    bow = rng.choice([0.0, 1.0]) * rng.uniform(6, 24)
    wave = v + np.float32(bow) * np.sin(u * np.float32(2 * np.pi / rng.uniform(120, 300)))
    # One repeat in steps of a fraction of a pixel, its edges softened.
    lines = palette[
        np.searchsorted(np.cumsum(widths), np.linspace(0, widths.sum(), 2048, endpoint=False), side="right")
    ]
    lines = np.asarray(scipy.ndimage.uniform_filter1d(lines, int(2048 / widths.sum()), axis=0, mode="wrap"))
    place = (wrapped(wave, widths.sum()) * np.float32(2047.9 / widths.sum())).astype(np.int32)
    planes = np.stack([lines[:, channel][place] for channel in range(3)])
    worn = sample(noise(rng, 1.1), u, v)
    planes *= 1 + np.float32(rng.uniform(0.02, 0.1)) * worn
    shape = "wavy" if bow else "straight"
    return Surface(planes, 0.3 * worn, f"{shape} stripes in {colour_names(palette)}")


def _to_edge(place: Field, length: float) -> Field:
    """Distance in px to the nearer end of a cell, from a place in 0..1 within it."""
    return np.asarray((0.5 - np.abs(place - 0.5)) * np.float32(length), np.float32)


def _number(row: Field, column: Field) -> NDArray[np.int32]:
    """A number for every cell that does not repeat along any visible direction."""
    return np.asarray((row.astype(np.int32) * 389 + column.astype(np.int32) * 151) & (_KINDS - 1), np.int32)


def _laid(colour: Colours, number: NDArray[np.int32], between: Colours, face: Field) -> NDArray[np.float32]:
    """Planes of numbered cells and of what lies between them."""
    return np.stack([between[0, c] + (colour[:, c][number] - between[0, c]) * face for c in range(3)])


def _sett(rng: np.random.Generator, palette: Colours) -> Colours:
    """The colour of every thread of one repeat."""
    counts = rng.integers(1, 14, 6)
    return vary(rng, palette[np.repeat(rng.integers(len(palette), size=6), counts)], 2)

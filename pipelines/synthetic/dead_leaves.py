"""Dead leaves: shapes of all sizes that fall on top of each other until they cover the picture.

With radii of density r^-3 the result is scale invariant and shares the statistics of photographs: sharp edges,
occlusion, and a power spectrum that falls about as 1 / f^2. Source: Lee, Mumford and Huang, "Occlusion Models for
Natural Images" (2001); for training on them, Baradad et al., "Learning to See by Looking at Noise" (2021).
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.synthetic.colours import Colours, colour_names, draw_palette, enumerated, vary
from pipelines.synthetic.fields import Field, light, noise
from pipelines.synthetic.picture import SUPERSAMPLING, Picture, quantized, reduced

COVERAGE = 5.0
"""Mean number of leaves over a point; the last shows where none fell, in less than 1 % of the picture."""
_OUTLINE_POINTS = 60
_SUBPIXEL_BITS = 4
_SHAPES = ("ellipses", "triangles", "rectangles", "hexagons", "stars", "pebbles")


class Leaves(NamedTuple):
    """Leaves from the lowest to the topmost; lengths in px of the supersampled canvas."""

    centre: NDArray[np.float64]
    """[n, 2], x and y."""
    radius: NDArray[np.float64]
    """Of the disc of equal area."""
    shape: NDArray[np.int64]


def dead_leaves(rng: np.random.Generator, height_px: int, width_px: int) -> Picture:
    """One picture of dead leaves."""
    height, width = height_px * SUPERSAMPLING, width_px * SUPERSAMPLING
    kinds = sorted(rng.choice(len(_SHAPES), rng.integers(1, 4), replace=False))
    leaves = fall(rng, height, width, kinds)
    palette = draw_palette(rng, 9)
    labels = paint_labels(rng, leaves, height, width)
    planes = shade(rng, labels, leaves, palette)
    rgb = reduced(planes) * light(rng, height_px, width_px)[..., None]
    names = enumerated([_SHAPES[kind] for kind in kinds])
    return Picture(quantized(rgb), f"Overlapping {names} of all sizes in {colour_names(palette)}.")


def draw_radii(rng: np.random.Generator, num: int, smallest: float, largest: float) -> NDArray[np.float64]:
    """Radii of density proportional to r^-3 between the two."""
    share = rng.random(num) * (1 - (smallest / largest) ** 2)
    return np.asarray(smallest / np.sqrt(1 - share))


def fall(rng: np.random.Generator, height: int, width: int, kinds: list[int]) -> Leaves:
    """Leaves that touch the canvas, enough to cover it; they fall beyond its border too, so that it looks the same."""
    side = min(height, width)
    smallest = SUPERSAMPLING * np.exp(rng.uniform(np.log(1.6), np.log(6.0)))
    largest = max(side * rng.uniform(0.12, 0.4), 2 * smallest)
    mean_area = 2 * np.pi * smallest**2 * np.log(largest / smallest) / (1 - (smallest / largest) ** 2)
    num = int(COVERAGE * (height + 2 * largest) * (width + 2 * largest) / mean_area)
    radius = draw_radii(rng, num, smallest, largest)
    centre = rng.random((num, 2)) * [width + 2 * largest, height + 2 * largest] - largest
    shape = rng.choice(kinds, num)
    outside = np.maximum(np.abs(centre - [width / 2, height / 2]) - [width / 2, height / 2], 0).max(axis=1)
    # Stretched and starred outlines reach beyond the disc of their area.
    touches = outside < 2 * radius
    return Leaves(centre[touches], radius[touches], shape[touches])


def paint_labels(rng: np.random.Generator, leaves: Leaves, height: int, width: int) -> NDArray[np.int32]:
    """[height, width]: the number of the topmost leaf at each point; 0 is the lowest, which lies everywhere."""
    num = len(leaves.radius)
    outlines = unit_outlines(rng)
    angle, stretch = rng.uniform(0, 2 * np.pi, num), np.exp(rng.normal(0, 0.25, num))
    stretched = np.stack([stretch, 1 / stretch], axis=-1) * leaves.radius[:, None]
    turn = np.stack([np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)], axis=-1).reshape(num, 2, 2)
    is_small = leaves.radius < 6 * SUPERSAMPLING
    points: list[NDArray[np.int32]] = [np.empty(0, np.int32)] * num
    for chosen, every in ((is_small, 5), (~is_small, 1)):
        unit = outlines[leaves.shape[chosen], ::every] * stretched[chosen, None]
        outline = unit @ turn[chosen] + leaves.centre[chosen, None]
        fixed = np.rint(outline * 2**_SUBPIXEL_BITS).astype(np.int32)
        for index, corners in zip(np.flatnonzero(chosen), fixed, strict=True):
            points[index] = corners
    labels = np.zeros((height, width), np.int32)
    for label, corners in enumerate(points):
        cv2.fillPoly(labels, [corners], label, shift=_SUBPIXEL_BITS)
    return labels


def unit_outlines(rng: np.random.Generator) -> NDArray[np.float64]:
    """[shapes, points, 2]: the outlines, each of the area of a disc of radius 1."""
    angle = np.linspace(0, 2 * np.pi, _OUTLINE_POINTS, endpoint=False)
    waves = sum(rng.normal(0, 0.28 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 6))
    pebble = np.stack([np.cos(angle), np.sin(angle)], axis=-1) * np.exp(waves)[:, None]
    num_rays = int(rng.choice([5, 6, 10]))
    star = _polygon(2 * num_rays, radii=(1.0, rng.uniform(0.45, 0.7)))
    drawn = [_polygon(_OUTLINE_POINTS), _polygon(3), _polygon(4), _polygon(6), star, pebble]
    return np.stack([outline * np.sqrt(np.pi / _area(outline)) for outline in drawn])


def shade(rng: np.random.Generator, labels: NDArray[np.int32], leaves: Leaves, palette: Colours) -> NDArray[np.float32]:
    """Planes [3, height, width]: every leaf in its colour, with a gradient, some texture and a shadow below."""
    num = len(leaves.radius)
    colour = vary(rng, palette[rng.integers(len(palette), size=num)], 7)
    v, u = (np.arange(n, dtype=np.float32) for n in labels.shape)
    angle, slope = rng.uniform(0, 2 * np.pi, num), np.abs(rng.normal(0, 0.12, num)) / leaves.radius
    across, down = slope * np.cos(angle), slope * np.sin(angle)
    offset = 1 - across * leaves.centre[:, 0] - down * leaves.centre[:, 1]
    factor = _of(labels, across) * u + _of(labels, down) * v[:, None] + _of(labels, offset)
    np.clip(factor, 0.6, 1.4, out=factor)
    for field in (noise(rng, 1.0), noise(rng, 0.9, angle=rng.uniform(0, np.pi), stretch=rng.uniform(4, 16))):
        roughness = np.abs(rng.normal(0, 0.09, num)) * (rng.random(num) < 0.6)
        factor += _of(labels, roughness) * _spread(field, *labels.shape)
    factor *= _shadow(rng, labels)
    return np.stack([_of(labels, colour[:, channel]) * factor for channel in range(3)])


def _polygon(corners: int, radii: tuple[float, ...] = (1.0,)) -> NDArray[np.float64]:
    """Points evenly along the edges of a polygon, its corners among them; the first edge stands upright."""
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False) - np.pi / corners
    tips = np.stack([np.cos(angle), np.sin(angle)], axis=-1) * np.resize(radii, corners)[:, None]
    place = np.arange(_OUTLINE_POINTS) * corners / _OUTLINE_POINTS
    start = place.astype(int)
    share = (place - start)[:, None]
    return np.asarray(tips[start] * (1 - share) + tips[(start + 1) % corners] * share)


def _area(outline: NDArray[np.float64]) -> float:
    x, y = outline.T
    return float(np.abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def _of(labels: NDArray[np.int32], values: NDArray[np.floating]) -> Field:
    """The value of the leaf at each point."""
    return np.asarray(np.asarray(values, np.float32)[labels])


def _spread(tile: Field, height: int, width: int) -> Field:
    """A noise tile over the canvas, at the scale of the finished picture."""
    large = cv2.resize(tile, None, fx=SUPERSAMPLING, fy=SUPERSAMPLING, interpolation=cv2.INTER_LINEAR)
    repeats = (-(-height // large.shape[0]), -(-width // large.shape[1]))
    return np.asarray(np.tile(large, repeats)[:height, :width])


def _shadow(rng: np.random.Generator, labels: NDArray[np.int32]) -> Field:
    """A factor per point: darker beside a leaf that lies higher, on the side away from the light."""
    angle, depth, length = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.4), rng.uniform(1, 4) * SUPERSAMPLING
    darkness, heights = np.zeros(labels.shape, np.float32), labels.astype(np.float32)
    for share in (0.25, 0.5, 0.75, 1.0):
        shift = np.array([[1, 0, length * share * np.cos(angle)], [0, 1, length * share * np.sin(angle)]], np.float32)
        moved = cv2.warpAffine(
            heights, shift, labels.shape[::-1], flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE
        )
        darkness += moved > heights
    return np.asarray(1 - np.float32(depth / 4) * darkness, np.float32)

"""Colours as photographs have them: correlated in an opponent space, mostly muted, rarely vivid.

draw_palette(rng, 8) -> float32 [8, 3] sRGB in 0..1
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Colours = NDArray[np.floating]
"""sRGB in 0..1, [n, 3]."""

_RAMP_LIGHTNESS = 33
_NAMES = {
    "black": (12, 12, 12),
    "dark gray": (72, 72, 72),
    "gray": (128, 128, 128),
    "light gray": (190, 190, 190),
    "white": (245, 245, 245),
    "red": (200, 35, 35),
    "dark red": (105, 25, 25),
    "pink": (232, 160, 170),
    "orange": (226, 125, 40),
    "brown": (115, 76, 48),
    "dark brown": (60, 40, 28),
    "beige": (214, 192, 160),
    "yellow": (230, 205, 60),
    "olive": (118, 116, 55),
    "green": (70, 140, 65),
    "dark green": (32, 66, 40),
    "light green": (165, 205, 165),
    "teal": (45, 125, 128),
    "light blue": (150, 185, 220),
    "blue": (50, 95, 175),
    "dark blue": (24, 32, 95),
    "purple": (120, 70, 140),
    "mauve": (140, 108, 130),
    "pale pink": (222, 196, 202),
}


def draw_palette(rng: np.random.Generator, num: int) -> Colours:
    """Colours of one scene: they share a light and lean along one axis of CIELAB, as pixels of a photograph do.

    Of photographs: the chroma axes are correlated (the axis of daylight, from blue to orange, carries most), have
    heavier tails than a normal distribution, and a far smaller spread than lightness.
    """
    axis = np.deg2rad(rng.normal(62, 20))
    along, across = np.array([np.cos(axis), np.sin(axis)]), np.array([-np.sin(axis), np.cos(axis)])
    spread, mean = rng.uniform(7, 19), rng.normal(5, 8)
    lightness = rng.normal(rng.normal(50, 8), rng.uniform(17, 27), num)
    chroma = (mean + spread * rng.standard_t(4, num))[:, None] * along
    chroma += (rng.uniform(0.3, 0.6) * spread * rng.standard_t(4, num))[:, None] * across
    return from_lab(np.column_stack([np.clip(lightness, 4, 96), np.clip(chroma, -75, 75)]))


def vary(rng: np.random.Generator, colours: Colours, spread: float) -> Colours:
    """Each colour a little off, by `spread` units of lightness and half as many of chroma."""
    deviation = rng.normal(0, 1, colours.shape) * [spread, spread / 2, spread / 2]
    return from_lab(to_lab(colours) + deviation)


def ramp(rng: np.random.Generator, num_steps: int = 256) -> Colours:
    """A scale of colours from dark to light, in random unequal steps, that spans a third of all lightness or more."""
    palette = to_lab(draw_palette(rng, 6))
    palette = palette[np.argsort(palette[:, 0])]
    dark, bright = palette[[0, -1], 0]
    if bright - dark < _RAMP_LIGHTNESS:
        start = np.clip((dark + bright - _RAMP_LIGHTNESS) / 2, 4, 96 - _RAMP_LIGHTNESS)
        palette[:, 0] = np.linspace(start, start + _RAMP_LIGHTNESS, len(palette))
    places = np.sort(np.append(rng.uniform(0.1, 0.9, 4), [0.0, 1.0]))
    steps = np.linspace(0, 1, num_steps)
    return from_lab(np.column_stack([np.interp(steps, places, palette[:, c]) for c in range(3)]))


def to_lab(colours: Colours) -> NDArray[np.float32]:
    """CIELAB: lightness 0..100 and two chroma axes."""
    return np.asarray(cv2.cvtColor(np.asarray(colours, np.float32)[None], cv2.COLOR_RGB2Lab)[0], np.float32)


def from_lab(lab: NDArray[np.floating]) -> Colours:
    """sRGB; what the screen cannot show is clipped."""
    rgb = cv2.cvtColor(np.asarray(lab, np.float32)[None], cv2.COLOR_Lab2RGB)[0]
    return np.asarray(np.clip(rgb, 0, 1), np.float32)


def colour_names(colours: Colours, num: int = 3) -> str:
    """The most frequent names among these colours, as one reads them: "brown, gray and dark green"."""
    known = to_lab(np.array(list(_NAMES.values()), np.float32) / 255)
    # People name the hue before the shade.
    distances = np.linalg.norm((to_lab(colours)[:, None] - known) * [0.5, 1, 1], axis=2)
    counts = np.bincount(distances.argmin(axis=1), minlength=len(_NAMES))
    names = list(_NAMES)
    return enumerated([names[i] for i in np.argsort(-counts, kind="stable")[:num] if counts[i]])


def enumerated(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def contrast(one: Colours, other: Colours) -> float:
    """Contrast ratio of two colours, 1 to 21. Source: WCAG 2.1, 1.4.3."""
    lighter, darker = sorted([_luminance(one), _luminance(other)], reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: Colours) -> float:
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])

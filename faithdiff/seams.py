"""Seams of tiled restoration, measured: what happens across the borders of tiles, against everywhere else.

    borders = tile_borders(plan)
    seam_score(picture, borders).levels             -> 0.0 for a smooth blend, 1.0 for steps of one grey level
    seam_against_whole(tiled, whole, borders).levels    the same of the difference, in which the picture cancels

At a place between two pixels, straight lines through the 8 pixels on either side are continued to it, and the jump
between them is averaged over 32 px along the border: slopes and texture cancel, a step stays. The score compares the
energy of these jumps at borders with that elsewhere. What texture hides from people it hides from the score of a
picture, too; where the whole picture fits the model, the score against it hides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from faithdiff.errors import InputError
from faithdiff.tiling import CELL_PX, TilePlan

REACH_PX = 8
_SEGMENT_PX = 32
_LUMA = np.array([0.299, 0.587, 0.114])

Picture = NDArray[np.uint8]
Plane = NDArray[np.float64]


@dataclass(frozen=True)
class Borders:
    """Where tiles begin or end inside a picture: a row or column r lies between the pixels r - 1 and r."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def num_borders(self) -> int:
        return len(self.rows) + len(self.columns)


@dataclass(frozen=True)
class SeamScore:
    """Energies are mean squared jumps, in grey levels squared."""

    border_energy: float
    """Over all borders."""
    worst_energy: float
    """Of the border where it is largest."""
    elsewhere_energy: float
    """Over all places farther than REACH_PX from a border."""
    chance_energy: float
    """What the largest of as many places elsewhere typically has."""

    @property
    def levels(self) -> float:
        """How many grey levels the jumps across borders are larger than elsewhere, as a root of mean squares."""
        return float(np.sqrt(max(0.0, self.border_energy - self.elsewhere_energy)))

    @property
    def worst_levels(self) -> float:
        """The same of the worst border, beyond what chance alone makes of the largest of so many."""
        return float(np.sqrt(max(0.0, self.worst_energy - self.chance_energy)))

    @property
    def ratio(self) -> float:
        """Energy across borders as a multiple of that elsewhere; rounding to 8 bits counts as a little of both."""
        rounding = 1 / 12 / _SEGMENT_PX
        return (self.border_energy + rounding) / (self.elsewhere_energy + rounding)


def tile_borders(plan: TilePlan) -> Borders:
    """The borders of a plan's tiles inside its canvas, in pixels."""
    found = []
    for axis in (0, 1):
        starts = {origin[axis] for origin in plan.origins}
        edges = starts | {start + plan.tile[axis] for start in starts}
        found.append(tuple(sorted(edge * CELL_PX for edge in edges if 0 < edge < plan.canvas[axis])))
    return Borders(*found)


def seam_score(picture: Picture, borders: Borders) -> SeamScore:
    """The score of one picture, uint8 RGB [H, W, 3].

    Raises:
        InputError: there is no border inside the picture, or nothing that is farther than REACH_PX from one.
    """
    return _score(picture @ _LUMA, borders)


def seam_against_whole(tiled: Picture, whole: Picture, borders: Borders) -> SeamScore:
    """The score of what tiling changed: the same restoration in tiles and in one piece. Raises as `seam_score`."""
    if tiled.shape != whole.shape:
        raise InputError(f"seams: the tiled picture is {tiled.shape[:2]} px and the whole one {whole.shape[:2]}")
    return _score(tiled @ _LUMA - whole @ _LUMA, borders)


def _score(plane: Plane, borders: Borders) -> SeamScore:
    at, elsewhere = [], []
    for turned, places in ((plane, borders.columns), (plane.T, borders.rows)):
        energies = _energies(turned)
        numbers = np.arange(energies.size) + REACH_PX
        is_border = np.isin(numbers, places)
        distances = np.abs(numbers[:, None] - np.array(places or (-(10**9),))[None]).min(axis=1)
        at.append(energies[is_border])
        elsewhere.append(energies[distances > REACH_PX])
    at_all, elsewhere_all = np.concatenate(at), np.concatenate(elsewhere)
    if not at_all.size or not elsewhere_all.size:
        what = "no tile border" if not at_all.size else f"nothing farther than {REACH_PX} px from a tile border"
        raise InputError(
            f"seams: {what} in {plane.shape[1]}x{plane.shape[0]} px; take a larger picture or another tile"
        )
    chance = np.quantile(elsewhere_all, at_all.size / (at_all.size + 1))
    return SeamScore(float(at_all.mean()), float(at_all.max()), float(elsewhere_all.mean()), float(chance))


def _energies(plane: Plane) -> Plane:
    """Mean squared jump at every place between columns that has REACH_PX pixels on both sides."""
    width = plane.shape[1]
    if width < 2 * REACH_PX:
        return np.zeros(0)
    kernel = _jump_kernel()
    windows = np.lib.stride_tricks.sliding_window_view(plane, 2 * REACH_PX, axis=1)
    jumps = windows @ kernel
    num_segments = max(1, plane.shape[0] // _SEGMENT_PX)
    segments = np.array_split(jumps, num_segments, axis=0)
    return np.asarray(np.mean([segment.mean(axis=0) ** 2 for segment in segments], axis=0))


def _jump_kernel() -> Plane:
    """Weights [2 * REACH_PX]: the right side's line at the border minus the left side's, by least squares."""
    distances = np.arange(REACH_PX) + 0.5
    design = np.stack([np.ones(REACH_PX), distances], axis=1)
    at_border = np.linalg.pinv(design)[0]
    return np.concatenate([-at_border[::-1], at_border])

"""Latent tiles: where they lie, how they are cut from a canvas and how they are blended back after every step.

Shapes: N tiles, C channels, H x W latent cells of the canvas, h x w of a tile. One latent cell is 8 x 8 px.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from faithdiff.errors import InputError

CELL_PX = 8
_WEIGHT_VARIANCE = 0.01

Placement = Literal["balanced", "released"]


@dataclass(frozen=True)
class TilePlan:
    """Tiles of one canvas in row-major order: `origins` (row, column) in cells, all of size `tile`."""

    canvas: tuple[int, int]
    tile: tuple[int, int]
    origins: tuple[tuple[int, int], ...]
    weights: Placement = "balanced"

    @property
    def num_tiles(self) -> int:
        return len(self.origins)

    @cached_property
    def tile_weights(self) -> Tensor:
        """Blending weights [h, w] fp64, positive, highest in the middle."""
        return tile_weights(self.tile, self.weights)

    @cached_property
    def total_weights(self) -> Tensor:
        """Sum of the weights of all tiles at every cell, [H, W] fp64."""
        total = torch.zeros(self.canvas, dtype=torch.float64)
        for top, left in self.origins:
            total[top : top + self.tile[0], left : left + self.tile[1]] += self.tile_weights
        return total

    def cut(self, canvas: Tensor, index: int) -> Tensor:
        """Tile [B, C, h, w] of a canvas [B, C, H, W]: a view."""
        (top, left), (height, width) = self.origins[index], self.tile
        return canvas[..., top : top + height, left : left + width]

    def blend(self, tiles_NCHW: Tensor) -> Tensor:
        """Canvas [1, C, H, W] fp32 of all tiles [N, C, h, w]: their weighted mean, summed in row-major tile order."""
        if self.num_tiles == 1:
            return tiles_NCHW.float()
        shares = _shares(self, tiles_NCHW.device)
        canvas = torch.zeros(1, tiles_NCHW.shape[1], *self.canvas, device=tiles_NCHW.device)
        for index, tile in enumerate(tiles_NCHW.float()):
            self.cut(canvas, index).add_(tile * shares[index])
        return canvas


@lru_cache(maxsize=16)
def _shares(plan: TilePlan, device: torch.device) -> Tensor:
    """Each tile's share of every cell it covers, [N, h, w] fp32; the shares of a cell add up to one."""
    shares = [plan.tile_weights / plan.cut(plan.total_weights, i) for i in range(plan.num_tiles)]
    return torch.stack(shares).float().to(device)


def plan_tiles(
    canvas: tuple[int, int],
    tile: tuple[int, int],
    stride: tuple[int, int],
    *,
    placement: Placement = "balanced",
    weights: Placement = "balanced",
) -> TilePlan:
    """Tiles that cover a canvas; all sizes (rows, columns) in cells. A tile never exceeds the canvas.

    Source: spec 2.5. "released" walks with a fixed stride and snaps the last tile to the border, so the last two may
    nearly coincide; "balanced" uses as many tiles, evenly spread.
    """
    for name, (height, width) in (("tile", tile), ("stride", stride)):
        if height < 1 or width < 1:
            raise InputError(f"tiling: {name} is {height}x{width} cells; it must be at least 1x1 (8x8 px)")
    if stride[0] > tile[0] or stride[1] > tile[1]:
        raise InputError(
            f"tiling: stride {stride[0]}x{stride[1]} cells leaves gaps between tiles of {tile[0]}x{tile[1]}; "
            f"it must not exceed the tile"
        )
    fitted = (min(tile[0], canvas[0]), min(tile[1], canvas[1]))
    rows, columns = (_axis_origins(canvas[axis], fitted[axis], stride[axis], placement) for axis in (0, 1))
    return TilePlan(canvas, fitted, tuple((i, j) for i in rows for j in columns), weights)


def tile_weights(tile: tuple[int, int], kind: Placement = "balanced") -> Tensor:
    """Gaussian weights [h, w] fp64, variance 0.01 of the squared side; "released" is off centre by half a row."""
    height, width = tile
    middle = height / 2 if kind == "released" else (height - 1) / 2
    return torch.outer(_gaussian(height, middle), _gaussian(width, (width - 1) / 2))


def _gaussian(size: int, middle: float) -> Tensor:
    offsets = (torch.arange(size, dtype=torch.float64) - middle) / size
    return torch.exp(-(offsets**2) / (2 * _WEIGHT_VARIANCE)) / math.sqrt(2 * math.pi * _WEIGHT_VARIANCE)


def _axis_origins(canvas: int, tile: int, stride: int, placement: Placement) -> list[int]:
    last = canvas - tile
    if last == 0:
        return [0]
    count = math.ceil(last / stride) + 1
    if placement == "released":
        return [min(i * stride, last) for i in range(count)]
    return [round(i * last / (count - 1)) for i in range(count)]

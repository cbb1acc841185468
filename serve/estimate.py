"""What a request will cost, before it starts: pixels, tiles, device seconds and a price. Pure; needs no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, NonNegativeFloat, PositiveFloat

from serve.form import UpscaleRequest
from sr_platform.config import StrictConfig

CELL_PX = 8


class Rates(StrictConfig):
    """What estimates are made with; what replicas report about themselves goes before the assumptions."""

    price_per_device_second: NonNegativeFloat = 0.0
    """Price of one second of a replica's device."""
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")
    """ISO 4217 code of the price."""
    megapixel_steps_per_s: PositiveFloat = 1.0
    """What a replica does in a second, assumed until one has reported it: output megapixels x steps."""
    tile_px: int = Field(default=1024, ge=64, multiple_of=8)
    """Side of a tile, assumed until a replica has reported it."""
    tile_stride_fraction: float = Field(default=0.5, gt=0, le=1)
    """Distance of tiles / their side, assumed until a replica has reported it."""


@dataclass(frozen=True)
class Speed:
    """What the replicas that serve now do together, and how they cut pictures into tiles."""

    megapixel_steps_per_s: float
    num_replicas: int
    tile_px: int
    tile_stride_fraction: float
    max_megapixels: float = math.inf
    """Of the largest result that one of them has the memory for."""


@dataclass(frozen=True)
class Estimate:
    """Of one picture: `size_px` (width, height) of the result; `work` in megapixel-steps; seconds of one device."""

    size_px: tuple[int, int]
    megapixels: float
    num_tiles: int
    work: float
    device_seconds: float
    price: float
    currency: str


def speed_of(replicas: Sequence[dict[str, Any]], rates: Rates) -> Speed:
    """Means over what the replicas report; the assumptions of `rates` where none does."""
    measured = [rate for replica in replicas if (rate := replica.get("megapixel_steps_per_s"))]
    rate = sum(measured) / len(measured) if measured else rates.megapixel_steps_per_s
    first = replicas[0] if replicas else {}
    return Speed(
        megapixel_steps_per_s=rate,
        num_replicas=len(replicas),
        tile_px=first.get("tile_px") or rates.tile_px,
        tile_stride_fraction=first.get("tile_stride_fraction") or rates.tile_stride_fraction,
        max_megapixels=max((replica.get("max_megapixels", math.inf) for replica in replicas), default=math.inf),
    )


def estimate(size_px: tuple[int, int], request: UpscaleRequest, speed: Speed, rates: Rates) -> Estimate:
    """For a picture of (width, height) px, upright, as it comes in."""
    width, height = (side * request.scale for side in size_px)
    megapixels = width * height / 1e6
    work = megapixels * request.num_inference_steps
    device_seconds = work / speed.megapixel_steps_per_s
    return Estimate(
        size_px=(width, height),
        megapixels=round(megapixels, 6),
        num_tiles=count_tiles((width, height), speed.tile_px, speed.tile_stride_fraction),
        work=work,
        device_seconds=round(device_seconds, 3),
        price=price_of(device_seconds, rates),
        currency=rates.currency,
    )


def count_tiles(size_px: tuple[int, int], tile_px: int, stride_fraction: float) -> int:
    """Tiles of a picture of (width, height) px, as `faithdiff.tiling.plan_tiles` lays them; a test compares the two."""
    tile = tile_px // CELL_PX
    stride = max(1, round(tile * stride_fraction))
    return math.prod(_along(math.ceil(side / CELL_PX), tile, stride) for side in size_px)


def price_of(device_seconds: float, rates: Rates) -> float:
    """In the currency of `rates`."""
    return round(device_seconds * rates.price_per_device_second, 6)


def _along(cells: int, tile: int, stride: int) -> int:
    return max(0, math.ceil((cells - tile) / stride)) + 1

"""How much memory a restoration needs, known from the sizes of its picture and of the model before any work starts.

A picture holds memory while others run, and works with more of it during its own quanta. One quantum runs at a time, so
pictures fit together while the sum of what they hold and the most that any of them works with fit.

Bytes per pixel follow from the model's widths; how many maps of a width are alive at once was measured on nano, where
the model is 5 to 20 % above what a process really takes (tests/serve/test_memory_model.py measures again).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sr_platform.errors import RequestError

if TYPE_CHECKING:
    import torch

    from faithdiff import FaithDiffPipeline
    from faithdiff.request import RestorationRequest

_CELL_PX = 8
_FLOAT_BYTES = 4
# Per pixel: a picture as floats, twice while it is converted; and the planes of the colour transfer.
_PICTURE_BYTES = 2 * 3 * _FLOAT_BYTES
_COLOR_FIX_BYTES = {"adain": 48, "wavelet": 73, "none": 12}


class TooLarge(RequestError):  # noqa: N818 - reads as what is wrong
    """The picture would not fit even if it were alone; the message says which size would."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device and on the host that a picture holds between its quanta, and works with during one."""

    held_device: int
    working_device: int
    held_host: int
    working_host: int
    megapixels: float
    """Of the result."""
    tile_megapixels: float
    """Of all its tiles, which overlap."""

    @property
    def total(self) -> int:
        return self.held_device + self.working_device + self.held_host + self.working_host


@dataclass(frozen=True)
class Room:
    """Bytes there are for pictures. On a CPU device and host are one: `host` is None then, and `device` is for both."""

    device: int
    host: int | None

    def holds(self, footprints: Iterable[Footprint]) -> bool:
        """Whether pictures fit together."""
        return self.left(footprints) >= 0

    def left(self, footprints: Iterable[Footprint]) -> int:
        """Bytes to spare beside these pictures; negative where they do not fit."""
        several = list(footprints)
        device = sum(f.held_device for f in several) + max((f.working_device for f in several), default=0)
        if self.host is None:
            # A picture that is on the host, where many are at once, holds nothing large on the device.
            held = sum(max(f.held_device, f.working_host) + f.held_host for f in several)
            return self.device - held - max((f.working_device for f in several), default=0)
        return min(self.device - device, self.host - sum(f.held_host + f.working_host for f in several))


class MemoryModel:
    """Footprints of one pipeline's pictures."""

    def __init__(self, pipeline: FaithDiffPipeline, tile_px: int = 1024) -> None:
        self._pipeline, self._tile_px = pipeline, tile_px
        self._dtype_bytes = next(pipeline.unet.parameters()).element_size()
        widths = [*pipeline.vae.config.block_out_channels, pipeline.vae.config.block_out_channels[-1]]
        self._vae_widths = (widths[0] * self._dtype_bytes, widths[1] * self._dtype_bytes)
        self._lq_channels = int(pipeline.lq_encoder.out_channels)
        self._unet_width = int(pipeline.unet.config.block_out_channels[0])

    def footprint(self, size_px: tuple[int, int], request: RestorationRequest, level_bytes: int = 1) -> Footprint:
        """Of a picture that comes as (height, width) px, with one or two bytes a level."""
        height, width = (side * request.scale for side in size_px)
        padded = (math.ceil(height / _CELL_PX) * _CELL_PX, math.ceil(width / _CELL_PX) * _CELL_PX)
        pixels, cells = padded[0] * padded[1], padded[0] * padded[1] // _CELL_PX**2
        tile, num_tiles = self._tiles(padded, request)
        tile_cells = num_tiles * tile[0] * tile[1]
        features = self._lq_channels * cells * self._dtype_bytes
        embeddings = self._unet_width * tile_cells * self._dtype_bytes
        latents = _FLOAT_BYTES * (6 * 4 * cells + 2 * 4 * tile_cells + tile_cells)
        resident = features + embeddings + latents
        is_whole = max(padded) <= request.vae_tile_px
        band_px = pixels if is_whole else min(pixels, request.vae_tile_px**2)
        maps = 0 if is_whole else self._banded_maps()
        vae_working = (self._whole_maps() if is_whole else self._band_maps()) * band_px
        return Footprint(
            held_device=resident + max(maps, _PICTURE_BYTES) * pixels,
            working_device=max(vae_working, self._pass_working(tile, request)),
            held_host=level_bytes * (2 * 3 * pixels + 3 * size_px[0] * size_px[1]),
            working_host=_COLOR_FIX_BYTES[request.color_fix] * pixels,
            megapixels=height * width / 1e6,
            tile_megapixels=tile_cells * _CELL_PX**2 / 1e6,
        )

    def max_megapixels(self, room: Room, beside: Sequence[Footprint]) -> float:
        """Output megapixels of the largest square picture that fits beside others, under an ordinary request."""
        from faithdiff.request import RestorationRequest

        request = RestorationRequest(scale=1, tile_px=self._tile_px)
        height, width = self.largest((1024, 1024), request, room, beside)
        return height * width / 1e6

    def largest(
        self, size_px: tuple[int, int], request: RestorationRequest, room: Room, beside: Sequence[Footprint] = ()
    ) -> tuple[int, int]:
        """The largest (height, width) px of these proportions that fits, (0, 0) when none does."""

        def fits(factor: float) -> bool:
            return room.holds([*beside, self.footprint(_scaled(size_px, factor), request)])

        low, high = 0.0, 1.0
        while fits(high) and high < 64:
            low, high = high, 2 * high
        for _ in range(10):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return _scaled(size_px, low) if low else (0, 0)

    def _tiles(self, size_px: tuple[int, int], request: RestorationRequest) -> tuple[tuple[int, int], int]:
        """(height, width) of a tile in cells, and how many `faithdiff.tiling.plan_tiles` lays."""
        canvas = (size_px[0] // _CELL_PX, size_px[1] // _CELL_PX)
        stride = request.stride_cells(self._pipeline.tile_stride_fraction)
        height, width = (min(tile, side) for tile, side in zip(request.tile_cells(), canvas, strict=True))
        rows = math.ceil((canvas[0] - height) / stride[0]) + 1
        columns = math.ceil((canvas[1] - width) / stride[1]) + 1
        return (height, width), rows * columns

    def _banded_maps(self) -> int:
        """Bytes per pixel of the full maps of a banded walk.

        Encoding holds the picture and two maps of the first width. Decoding enters its last block with the width of
        the one before, at full size.
        """
        first, second = self._vae_widths
        return max(_PICTURE_BYTES + 2 * first, second + 2 * first)

    def _band_maps(self) -> int:
        """Bytes per pixel of a band, beside the full maps."""
        return 17 * self._vae_widths[0] // 4

    def _whole_maps(self) -> int:
        """Bytes per pixel of a picture that passes the VAE in one piece; decoding needs more than encoding."""
        first, second = self._vae_widths
        return 4 * first + 2 * second

    def _pass_working(self, tile: tuple[int, int], request: RestorationRequest) -> int:
        from faithdiff.denoiser import tiles_per_pass

        rows = tiles_per_pass(tile, self._pipeline.device) * (2 if request.has_guidance else 1)
        return rows * tile[0] * tile[1] * 18 * self._unet_width * self._dtype_bytes


def _scaled(size_px: tuple[int, int], factor: float) -> tuple[int, int]:
    return max(1, int(size_px[0] * factor)), max(1, int(size_px[1] * factor))


def measured_room(device: torch.device, memory_bytes: int | None, *, share: float = 1.0) -> Room:
    """`share` of what is free now, less a tenth; or `memory_bytes`."""
    import psutil
    import torch

    on_cpu = device.type == "cpu"
    if memory_bytes is not None:
        return Room(memory_bytes, None if on_cpu else memory_bytes)
    host = int(psutil.virtual_memory().available * 0.9 * share)
    return Room(host, None) if on_cpu else Room(int(torch.cuda.mem_get_info(device)[0] * 0.9 * share), host)

"""What one restoration is asked to do: every setting of a picture, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from faithdiff.compat import FIXED, Switches
from faithdiff.errors import InputError
from faithdiff.text import PromptEmbeds
from faithdiff.tiling import CELL_PX

StartFrom = Literal["lq", "noise"]
ColorFix = Literal["adain", "wavelet", "none"]
Size = int | tuple[int, int]
MAX_SCALE = 16
MIN_TILE_PX = 64


@dataclass(frozen=True)
class RestorationRequest:
    """Settings of `FaithDiffPipeline.__call__`, which documents them. Raises InputError when one is out of range."""

    scale: int = 4
    prompt: str = ""
    negative_prompt: str = ""
    num_inference_steps: int = 20
    guidance_scale: float = 5.0
    seed: int = 0
    start_from: StartFrom = "lq"
    tile_px: Size = 1024
    tile_stride_px: Size | None = None
    vae_tile_px: int = 1024
    color_fix: ColorFix = "adain"
    switches: Switches = FIXED
    noise: Tensor | None = None
    lq_latents: Tensor | None = None
    prompt_embeds: PromptEmbeds | None = None
    negative_prompt_embeds: PromptEmbeds | None = None

    def __post_init__(self) -> None:
        _check_integer("scale", self.scale, 1, MAX_SCALE)
        _check_integer("num_inference_steps", self.num_inference_steps, 1, 1000)
        _check_integer("seed", self.seed, 0, 2**63 - 1)
        _check_choice("start_from", self.start_from, get_args(StartFrom))
        _check_choice("color_fix", self.color_fix, get_args(ColorFix))
        if not isinstance(self.guidance_scale, int | float) or not -100 <= self.guidance_scale <= 100:
            raise InputError(f"request: guidance_scale is {self.guidance_scale!r}; it must be from -100 to 100")
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"request: {name} is {getattr(self, name)!r}; it must be text")
        self._check_tiles()

    def _check_tiles(self) -> None:
        # The released code takes latents of tile_px / 8 a side for a tile.
        least_px = 8 * MIN_TILE_PX if self.switches.vae_tiling == "released" else MIN_TILE_PX
        if self.vae_tile_px < least_px or self.vae_tile_px % MIN_TILE_PX:
            raise InputError(
                f"request: vae_tile_px is {self.vae_tile_px}; it must be a multiple of {MIN_TILE_PX}, "
                f"at least {least_px}"
            )
        for side in self.tile_size_px:
            if side < MIN_TILE_PX or side % CELL_PX:
                raise InputError(
                    f"request: tile_px is {self.tile_px}; it must be a multiple of {CELL_PX}, at least {MIN_TILE_PX}"
                )
        if self.tile_stride_px is None:
            return
        for stride, tile in zip(as_size(self.tile_stride_px), self.tile_size_px, strict=True):
            if not CELL_PX <= stride <= tile or stride % CELL_PX:
                raise InputError(
                    f"request: tile_stride_px is {self.tile_stride_px}; it must be a multiple of {CELL_PX} "
                    f"from {CELL_PX} to tile_px = {self.tile_px}"
                )

    @property
    def tile_size_px(self) -> tuple[int, int]:
        """(height, width) of a tile in pixels."""
        return as_size(self.tile_px)

    @property
    def has_guidance(self) -> bool:
        """Whether a negative prompt takes part, as in diffusers: only above a scale of 1."""
        return self.guidance_scale > 1

    def tile_cells(self) -> tuple[int, int]:
        """(height, width) of a tile in latent cells."""
        height, width = self.tile_size_px
        return height // CELL_PX, width // CELL_PX

    def stride_cells(self, default_fraction: float) -> tuple[int, int]:
        """(rows, columns) between tiles in latent cells; `default_fraction` of the tile when not given."""
        if self.tile_stride_px is None:
            rows, columns = (max(1, round(side * default_fraction)) for side in self.tile_cells())
        else:
            rows, columns = (stride // CELL_PX for stride in as_size(self.tile_stride_px))
        return rows, columns


def as_size(size: Size) -> tuple[int, int]:
    """(height, width) of a size given as one number or two. Raises InputError for anything else."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise InputError(f"request: got size {size!r}; it must be one whole number of pixels or (height, width)")
    return sides


def _check_integer(name: str, value: int, lowest: int, highest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise InputError(f"request: {name} is {value!r}; it must be a whole number from {lowest} to {highest}")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"request: {name} is {value!r}; it must be one of {', '.join(allowed)}")

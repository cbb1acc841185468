"""Where we differ from the released code, switch by switch; `RELEASED` sets them all back (specification 2.10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from faithdiff.errors import InputError


@dataclass(frozen=True)
class Switches:
    """The defaults are our fixes; the other value of each switch reproduces a number of the released code."""

    tile_placement: Literal["balanced", "released"] = "balanced"
    """balanced: tiles spread evenly; released: fixed stride and a last tile snapped to the border."""
    tile_weights: Literal["balanced", "released"] = "balanced"
    """balanced: a symmetric Gaussian; released: its vertical centre sits half a cell too low."""
    tile_offsets: Literal["pixels", "latent"] = "pixels"
    """Unit of the crop offsets in a tile's micro-conditioning; training used pixels, the released code gives cells."""
    time_ids: Literal["exact", "float16"] = "exact"
    """float16 rounds sizes above 2048 px, as the released code does."""
    lq_start: Literal["consistent", "released"] = "consistent"
    """consistent: x_0 + sigma_0 eps; released: DDPM's mixture, which keeps 6.8 % of x_0."""
    lq_latents: Literal["mode", "sample"] = "mode"
    """Which latents of the VAE's posterior an lq start takes."""
    vae_tiling: Literal["exact", "released"] = "exact"
    """exact: parts that equal the whole picture; released: the overlapping tiles of the script's `--use_tile_vae`."""
    color_rounding: Literal["round", "truncate"] = "round"
    """truncate darkens the result by half a level on average."""


FIXED = Switches()
# `vae_tiling` stays exact: without `--use_tile_vae` the released code encodes and decodes the whole picture.
RELEASED = Switches(
    tile_placement="released",
    tile_weights="released",
    tile_offsets="latent",
    time_ids="float16",
    lq_start="released",
    lq_latents="sample",
    color_rounding="truncate",
)


def resolve_switches(compat: str | Switches | None) -> Switches:
    """Switches of a `compat` argument: None (our fixes), "released", or switches set one by one."""
    if isinstance(compat, Switches):
        return compat
    if compat is None:
        return FIXED
    if compat == "released":
        return RELEASED
    raise InputError(f"compat: got {compat!r}; it must be None, 'released' or faithdiff.compat.Switches(...)")

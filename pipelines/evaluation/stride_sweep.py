"""How far apart may tiles lie: `evaluate.py sweep protocol.yaml --model M --data D --strides-px 64 96 128`.

Every picture is restored with every stride. Printed are the seams (`faithdiff/seams.py`: grey levels across tile
borders beyond those elsewhere; against the whole picture where it fits into one tile), the work (how often the UNet
passes over each place of the picture in a step) and the seconds. The largest stride below the threshold is the answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pydantic
from tqdm import tqdm

from faithdiff.errors import InputError
from faithdiff.request import RestorationRequest
from faithdiff.seams import seam_against_whole, seam_score, tile_borders
from faithdiff.tiling import CELL_PX, TilePlan
from pipelines.evaluation.pictures import Loaded, list_pictures, load
from pipelines.evaluation.protocol import EvaluateConfig
from pipelines.evaluation.restoring import load_pipeline, picture_seed
from sr_platform.config import load_config
from sr_platform.errors import ConfigError

if TYPE_CHECKING:
    from faithdiff.pipeline import FaithDiffPipeline


class SweepConfig(EvaluateConfig):
    """The protocol whose pictures and restoration settings are used, and the strides."""

    strides_px: tuple[pydantic.PositiveInt, ...] = ()
    """Strides to try, multiples of 8 up to restoration.tile_px; by default 3/8 to 8/8 of the tile."""
    max_seam_levels: pydantic.PositiveFloat = 0.5
    """A stride is good when the seams of no picture are above this, in grey levels."""
    num_pictures: pydantic.PositiveInt = 3
    """Of the data, the first ones."""
    whole_up_to_px: pydantic.NonNegativeInt = 2048
    """Pictures up to this side are also restored in one tile, and compared with that; 0 never."""


@dataclass(frozen=True)
class StrideResult:
    """One stride, the worst or the sum over all pictures."""

    stride_px: int
    num_tiles: int
    work: float
    """Tiles' area as a multiple of the picture's."""
    seam_levels: float | None
    """Of the pictures as they are; None where no border could be scored."""
    whole_levels: float | None
    """Against the same pictures in one tile."""
    seconds: float

    @property
    def judged_levels(self) -> float | None:
        """What the threshold is for: against the whole where that is known."""
        return self.seam_levels if self.whole_levels is None else self.whole_levels


def main(argv: Sequence[str]) -> None:
    cfg = load_config(SweepConfig, argv, job="evaluate sweep", description=__doc__ or "")
    results = sweep(cfg)
    print("\n".join(table(results)))
    best = largest_good(results, cfg.max_seam_levels)
    if best is None:
        print(f"\nno stride keeps its seams below {cfg.max_seam_levels:g} grey levels; try smaller ones")
    else:
        print(f"\nlargest stride below {cfg.max_seam_levels:g} grey levels: {best.stride_px} px")


def sweep(cfg: SweepConfig) -> list[StrideResult]:
    """One result per stride, from the smallest on.

    Raises:
        ConfigError: there is no model, or a stride does not fit the tile.
        InputDataError: pictures cannot be used, or all of them fit into one tile.
    """
    if not cfg.model:
        raise ConfigError("model: required, and missing; give a preset, a folder or models:/name@alias")
    pictures = [load(picture, cfg) for picture in list_pictures(cfg)[: cfg.num_pictures]]
    pipeline = load_pipeline(cfg, cfg.model)
    tiled = [p for p in pictures if max(p.lq.shape[:2]) * cfg.restoration.scale > cfg.restoration.tile_px]
    if not tiled:
        raise ConfigError(
            f"restoration.tile_px: all {len(pictures)} pictures fit into one tile of {cfg.restoration.tile_px} px; "
            "give a smaller tile, or larger pictures"
        )
    strides, whole = strides_of(cfg), {}
    with tqdm(total=len(tiled) * (len(strides) + 1), desc="restore", unit=" pictures", disable=None) as bar:
        for picture in tiled:
            if max(picture.lq.shape[:2]) * cfg.restoration.scale <= cfg.whole_up_to_px:
                whole[picture.name] = in_one_tile(pipeline, cfg, picture)
            bar.update()
        results = []
        for stride in strides:
            results.append(try_stride(pipeline, cfg, stride, tiled, whole))
            bar.update(len(tiled))
    return results


def strides_of(cfg: SweepConfig) -> list[int]:
    tile_px = cfg.restoration.tile_px
    eighths = [tile_px * part // 8 // CELL_PX * CELL_PX for part in (3, 4, 5, 6, 7, 8)]
    strides = sorted(set(cfg.strides_px or eighths))
    wrong = [stride for stride in strides if stride % CELL_PX or not CELL_PX <= stride <= tile_px]
    if wrong:
        raise ConfigError(
            f"strides_px: got {', '.join(map(str, wrong))}; a stride is a multiple of {CELL_PX} up to tile_px={tile_px}"
        )
    return strides


def try_stride(
    pipeline: FaithDiffPipeline,
    cfg: SweepConfig,
    stride_px: int,
    pictures: Sequence[Loaded],
    whole: dict[str, np.ndarray],
) -> StrideResult:
    """The worst seams over all pictures, and the sums of tiles and seconds."""
    seams, against, seconds, num_tiles, areas = [], [], 0.0, 0, []
    for picture in pictures:
        request = replace(request_of(cfg, picture), tile_stride_px=stride_px)
        pixels, plan, spent_s = finished(pipeline, picture, request)
        seconds += spent_s
        num_tiles += plan.num_tiles
        areas.append(plan.num_tiles * np.prod(plan.tile) / np.prod(plan.canvas))
        try:
            seams.append(seam_score(pixels, tile_borders(plan)).levels)
            if picture.name in whole:
                against.append(seam_against_whole(pixels, whole[picture.name], tile_borders(plan)).levels)
        except InputError:  # too small a picture for so many borders
            continue
    return StrideResult(
        stride_px, num_tiles, float(np.mean(areas)), max(seams, default=None), max(against, default=None), seconds
    )


def in_one_tile(pipeline: FaithDiffPipeline, cfg: SweepConfig, picture: Loaded) -> np.ndarray:
    side_px = max(picture.lq.shape[:2]) * cfg.restoration.scale
    request = request_of(cfg, picture)
    return finished(pipeline, picture, replace(request, tile_px=-(-side_px // CELL_PX) * CELL_PX, tile_stride_px=None))[
        0
    ]


def finished(
    pipeline: FaithDiffPipeline, picture: Loaded, request: RestorationRequest
) -> tuple[np.ndarray, TilePlan, float]:
    """The restored picture, its tiles and its seconds."""
    from faithdiff.denoiser import advance

    start_s = time.perf_counter()
    restoration = pipeline.prepare(picture.lq, request)
    while not restoration.canvas.is_done:
        advance(pipeline.unet, [restoration.canvas], tiles_per_batch=pipeline.tiles_per_batch)
    result = pipeline.finish(restoration)
    return np.asarray(result.image), restoration.canvas.plan, time.perf_counter() - start_s


def request_of(cfg: SweepConfig, picture: Loaded) -> RestorationRequest:
    return cfg.restoration.request(prompt=picture.caption, seed=picture_seed(cfg.restoration.seed, picture.name))


def largest_good(results: Sequence[StrideResult], max_levels: float) -> StrideResult | None:
    """The largest stride whose seams are known and at most so strong."""
    good = [r for r in results if r.judged_levels is not None and r.judged_levels <= max_levels]
    return max(good, key=lambda r: r.stride_px, default=None)


def table(results: Sequence[StrideResult]) -> list[str]:
    """A line per stride."""
    lines = [f"{'stride':>8} {'tiles':>6} {'work':>6} {'seams':>12} {'against whole':>14} {'seconds':>9}"]
    for r in results:
        seam, whole = (_levels(value) for value in (r.seam_levels, r.whole_levels))
        lines.append(f"{r.stride_px:>5} px {r.num_tiles:>6} {r.work:>6.2f} {seam:>12} {whole:>14} {r.seconds:>9.2f}")
    return lines


def _levels(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faithdiff.pictures import to_network_input, upscale_lq
from faithdiff.request import RestorationRequest
from faithdiff.tiling import CELL_PX, plan_tiles
from serve import estimate as module
from serve.estimate import Rates, count_tiles, estimate, speed_of
from serve.form import UpscaleRequest

NO_REPLICAS = speed_of([], Rates())


@settings(max_examples=300, deadline=None)
@given(
    size_px=st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)),
    tile_px=st.sampled_from([64, 128, 512, 1000, 1024, 2048]),
    fraction=st.sampled_from([0.01, 0.25, 0.5, 0.75, 0.9, 1.0]),
)
def test_tiles_are_counted_as_the_denoiser_lays_them(size_px: tuple[int, int], tile_px: int, fraction: float) -> None:
    width, height = size_px
    request = RestorationRequest(tile_px=tile_px)
    canvas = (-(-height // CELL_PX), -(-width // CELL_PX))
    plan = plan_tiles(canvas, request.tile_cells(), request.stride_cells(fraction))
    assert count_tiles(size_px, tile_px, fraction) == plan.num_tiles


@pytest.mark.parametrize(("width", "height", "scale"), [(1, 1, 1), (37, 21, 3), (64, 64, 16), (129, 300, 2)])
def test_an_estimate_is_about_the_picture_the_network_sees(width: int, height: int, scale: int) -> None:
    import numpy as np

    canvas = to_network_input(upscale_lq(np.zeros((height, width, 3), np.uint8), scale)).shape
    plan = plan_tiles((canvas[2] // CELL_PX, canvas[3] // CELL_PX), (16, 16), (8, 8))
    rates = Rates(tile_px=128, tile_stride_fraction=0.5)
    found = estimate((width, height), UpscaleRequest(scale=scale), speed_of([], rates), rates)
    assert found.num_tiles == plan.num_tiles
    assert found.size_px == (width * scale, height * scale)


def test_work_seconds_and_price_follow_from_pixels_steps_and_rates() -> None:
    rates = Rates(price_per_device_second=0.002, currency="EUR", megapixel_steps_per_s=4.0)
    found = estimate((1000, 500), UpscaleRequest(scale=2, num_inference_steps=10), speed_of([], rates), rates)
    assert (found.megapixels, found.work, found.device_seconds) == (2.0, 20.0, 5.0)
    assert (found.price, found.currency) == (0.01, "EUR")


def test_what_replicas_report_goes_before_assumptions() -> None:
    replicas = [
        {"megapixel_steps_per_s": 10.0, "tile_px": 512, "tile_stride_fraction": 0.75},
        {"megapixel_steps_per_s": 30.0, "tile_px": 512, "tile_stride_fraction": 0.75},
        {"megapixel_steps_per_s": None},
    ]
    speed = speed_of(replicas, Rates())
    assert (speed.megapixel_steps_per_s, speed.num_replicas) == (20.0, 3)
    assert (speed.tile_px, speed.tile_stride_fraction) == (512, 0.75)
    assert (NO_REPLICAS.megapixel_steps_per_s, NO_REPLICAS.num_replicas) == (Rates().megapixel_steps_per_s, 0)


def test_an_estimate_needs_no_torch() -> None:
    code = f"import sys, {module.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

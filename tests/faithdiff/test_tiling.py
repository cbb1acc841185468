import math
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from faithdiff.errors import InputError
from faithdiff.tiling import plan_tiles, tile_weights

GEOMETRIES = [
    "24x32_k16x16_ov0.5",
    "25x29_k16x16_ov0.5",
    "24x32_k16x24_ov0.25",
    "12x32_k16x16_ov0.75",
    "128x128_k128x128_ov0.5",
    "160x224_k128x128_ov0.5",
]


def _released_plan(name):
    height, width, tile_h, tile_w = map(int, re.findall(r"\d+", name)[:4])
    fraction = float(name.split("_ov")[1])
    stride = (math.ceil(tile_h * fraction), math.ceil(tile_w * fraction))
    return plan_tiles((height, width), (tile_h, tile_w), stride, placement="released", weights="released")


@pytest.mark.parametrize("name", GEOMETRIES)
def test_released_placement_gives_the_released_origins(name, golden):
    expected = golden("case04b_tiling_primitives").about["tile_origins_latent"][name]
    assert [list(origin) for origin in _released_plan(name).origins] == expected


@pytest.mark.parametrize("name", GEOMETRIES[:4])
def test_released_weights_and_blending_are_reproduced(name, golden, rel_error):
    case, plan = golden("case04b_tiling_primitives"), _released_plan(name)
    assert rel_error(plan.tile_weights, case[f"{name}_weights"]) < 1e-6
    assert rel_error(plan.blend(case[f"{name}_tiles"]), case[f"{name}_blended"]) < 1e-6


def test_balanced_weights_are_symmetric_and_highest_in_the_middle():
    weights = tile_weights((9, 16))
    assert torch.allclose(weights, weights.flip(0))
    assert torch.allclose(weights, weights.flip(1))
    assert weights.argmax() == 4 * 16 + 7
    assert (weights > 0).all()


sizes = st.integers(1, 70)


@given(sizes, sizes, sizes, sizes, st.floats(0.05, 1), st.sampled_from(["balanced", "released"]))
def test_tiles_of_a_constant_canvas_blend_to_that_canvas(height, width, tile_h, tile_w, fraction, placement):
    stride = (max(1, int(tile_h * fraction)), max(1, int(tile_w * fraction)))
    plan = plan_tiles((height, width), (tile_h, tile_w), stride, placement=placement)
    canvas = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width) + 1
    tiles = torch.cat([plan.cut(canvas, i) for i in range(plan.num_tiles)])
    assert torch.allclose(plan.blend(tiles), canvas, rtol=1e-5)


@given(st.integers(17, 200), st.integers(4, 16))
def test_balanced_tiles_are_as_many_as_released_ones_and_evenly_spread(length, stride):
    balanced = [j for _, j in plan_tiles((16, length), (16, 16), (stride, stride)).origins]
    released = [j for _, j in plan_tiles((16, length), (16, 16), (stride, stride), placement="released").origins]
    steps = {b - a for a, b in pairwise(balanced)}
    assert len(balanced) == len(released)
    assert balanced[0] == 0
    assert balanced[-1] == length - 16
    assert max(steps) - min(steps) <= 1
    assert max(steps) <= stride


def test_a_stride_that_leaves_gaps_is_refused():
    with pytest.raises(InputError, match="gaps"):
        plan_tiles((64, 64), (16, 16), (17, 8))

"""What the memory model says against what a process really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from faithdiff import FaithDiffPipeline
from faithdiff.request import RestorationRequest
from serve.memory_model import Footprint, MemoryModel, Room

# A process of its own, in which freed memory goes back to the system at once. Writing 5 forgets the peak so far.
MEASURE = """
import gc, json, re, sys
from pathlib import Path
import numpy as np, torch
from faithdiff import FaithDiffPipeline
from faithdiff.denoiser import advance
from faithdiff.request import RestorationRequest
from serve.memory_model import MemoryModel, Room

torch.set_num_threads(1)

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

def measured(pipeline, lq, request):
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    restoration = pipeline.prepare(lq, request)
    advance(pipeline.unet, [restoration.canvas])
    pipeline.finish(restoration)
    return status("VmHWM") - before

pipeline = FaithDiffPipeline.from_pretrained("nano")
model = MemoryModel(pipeline)
for height, width, fields in [(64, 64, {}), *json.loads(sys.argv[1])]:
    request = RestorationRequest(scale=2, num_inference_steps=1, **fields)
    lq = np.zeros((height // 2, width // 2, 3), np.uint8)
    needed = Room(0, None).left([model.footprint(lq.shape[:2], request)])
    print(json.dumps([-needed, measured(pipeline, lq, request)]))
"""


def test_the_model_is_a_little_above_what_a_process_takes():
    cases = [(512, 512, {}), (640, 640, {"tile_px": 256, "vae_tile_px": 512})]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(cases)], env=env, capture_output=True, text=True, check=True
    )
    figures = [json.loads(line) for line in done.stdout.splitlines()][1:]
    assert len(figures) == len(cases)
    for (model_bytes, real_bytes), case in zip(figures, cases, strict=True):
        assert 0.95 <= model_bytes / real_bytes <= 1.3, f"{case}: {model_bytes} by the model, {real_bytes} measured"


@pytest.fixture(scope="module")
def model() -> MemoryModel:
    return MemoryModel(FaithDiffPipeline.from_pretrained("nano"))


@pytest.mark.parametrize("size_px", [(100, 100), (64, 2000), (1, 1), (517, 333)])
@pytest.mark.parametrize("fields", [{"tile_px": 64}, {"tile_px": (128, 64), "tile_stride_px": 40}, {"scale": 3}])
def test_tiles_are_counted_as_they_are_laid(size_px, fields, model):
    pipeline = FaithDiffPipeline.from_pretrained("nano")
    request = RestorationRequest(**{"scale": 1, **fields})
    padded = tuple(-(-side * request.scale // 8) * 8 for side in size_px)
    plan = pipeline.plan(padded, request)
    expected = plan.num_tiles * plan.tile[0] * plan.tile[1] * 64e-6
    assert model.footprint(size_px, request).tile_megapixels == pytest.approx(expected)


def test_the_largest_size_fits_and_a_little_more_does_not(model):
    request, room = RestorationRequest(scale=2, tile_px=256), Room(500_000_000, None)
    height, width = model.largest((300, 200), request, room)
    assert room.holds([model.footprint((height, width), request)])
    assert not room.holds([model.footprint((height * 102 // 100, width * 102 // 100), request)])
    assert model.largest((300, 200), request, Room(1000, None)) == (0, 0)


def test_pictures_fit_together_while_what_they_hold_and_the_most_that_one_works_with_fit():
    one = Footprint(held_device=10, working_device=100, held_host=1, working_host=5, megapixels=1, tile_megapixels=1)
    assert Room(133, None).holds([one, one, one])
    assert not Room(132, None).holds([one, one, one])
    assert Room(130, 18).holds([one, one, one])
    assert not Room(130, 17).holds([one, one, one])
    assert Room(0, None).holds([])

"""Pictures degraded per second and core: ours against the same process done plainly (plain_degradation.py).

Both degrade the same photographs, in turns, in one process, each on one thread, and both draw anew for every picture.
What is counted is CPU time, so that whatever else the machine does falls on neither. Prints a table, writes JSON.

    python benchmarks/degradation.py [--size-px 512] [--pictures 96] [--recipes pasd level_III]
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import tyro
from PIL import Image
from plain_degradation import plain_degrade, seed_everything

from faithdiff.degradation import degrade
from pipelines.photographs import write_photographs

NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "china.jpg", "flower.jpg")
WARM_UP = 8


def photographs(size_px: int) -> list[np.ndarray]:
    """Squares from the middle of the colour photographs, uint8 RGB [size_px, size_px, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [path for path in write_photographs(Path(folder)) if path.name in NAMES]
        return [square(Image.open(path).convert("RGB"), size_px) for path in paths]


def square(picture: Image.Image, size_px: int) -> np.ndarray:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    cut = picture.crop((left, top, left + side, top + side))
    return np.asarray(cut.resize((size_px, size_px), Image.Resampling.LANCZOS))


@torch.inference_mode()
def measure(recipe: str, pictures: list[np.ndarray], num_pictures: int) -> dict[str, float]:
    """CPU milliseconds per picture of both ways."""
    seed_everything(0)
    ways: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
        "plain": lambda hq, index: plain_degrade(hq, recipe),
        "ours": lambda hq, index: degrade(hq, recipe, key=f"picture-{index}", seed=0),
    }
    spent_s: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(WARM_UP + num_pictures):
        for name, way in ways.items():
            start = time.process_time()
            way(pictures[index % len(pictures)], index)
            if index >= WARM_UP:
                spent_s[name].append(time.process_time() - start)
    means = {f"{name}_ms": 1e3 * statistics.mean(values) for name, values in spent_s.items()}
    medians = {f"{name}_median_ms": 1e3 * statistics.median(values) for name, values in spent_s.items()}
    return {**means, **medians, "ratio": means["plain_ms"] / means["ours_ms"]}


def main(
    size_px: int = 512,
    pictures: int = 96,
    recipes: tuple[str, ...] = ("pasd", "level_II", "level_III"),
    out: Path = Path("out/benchmarks"),
) -> None:
    """Degrades `pictures` photographs of size_px x size_px with each recipe, both ways."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    hq = photographs(size_px)
    print(f"{'recipe':12}{'plain ms':>10}{'ours ms':>10}{'plain/s/core':>14}{'ours/s/core':>13}{'plain/ours':>12}")
    rows = {}
    for recipe in recipes:
        row = rows[recipe] = measure(recipe, hq, pictures)
        rates = f"{1e3 / row['plain_ms']:14.1f}{1e3 / row['ours_ms']:13.1f}"
        print(f"{recipe:12}{row['plain_ms']:10.1f}{row['ours_ms']:10.1f}{rates}{row['ratio']:12.1f}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()  # noqa: S607
    about = {"size_px": size_px, "pictures": pictures, "commit": commit, "machine": platform.machine()}
    about |= {"cores": os.cpu_count(), "torch": torch.__version__, "opencv": cv2.__version__}
    out.mkdir(parents=True, exist_ok=True)
    (out / "degradation.json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

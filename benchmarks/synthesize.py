"""Synthesized pictures per second and core, by kind: drawing, and drawing with the PNG that is written.

The kinds take turns in one process with one thread, after a warm-up. Prints a table and writes JSON.

    python benchmarks/synthesize.py [--size-px 512] [--pictures 24]
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import cv2
import numpy as np
import tyro

from pipelines.stages.write import encode_png
from pipelines.synthetic.mixture import KINDS, MixtureConfig


def measure(size_px: int, pictures: int) -> dict[str, dict[str, float]]:
    """Per kind: median and mean seconds of processor time to draw, to encode, and the bytes of a PNG."""
    draw_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    encode_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    size_bytes: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for number in range(-2, pictures):
        for kind, draw in KINDS.items():
            start = time.process_time()
            pixels = draw(np.random.default_rng([7, number + 2]), size_px, size_px).pixels
            drawn = time.process_time()
            png = encode_png(pixels)
            encoded = time.process_time()
            if number >= 0:  # the first two warm up caches and fonts
                draw_s[kind].append(drawn - start)
                encode_s[kind].append(encoded - drawn)
                size_bytes[kind].append(len(png))
    return {
        kind: {
            "draw_s": statistics.mean(draw_s[kind]),
            "draw_median_s": statistics.median(draw_s[kind]),
            "encode_s": statistics.mean(encode_s[kind]),
            "png_bytes": statistics.mean(size_bytes[kind]),
        }
        for kind in KINDS
    }


def main(size_px: int = 512, pictures: int = 24, out: Path = Path("out/benchmarks")) -> None:
    """Times `pictures` pictures of every kind, size_px x size_px."""
    cv2.setNumThreads(1)
    rows = measure(size_px, pictures)
    print(f"{'kind':14}{'draw ms':>10}{'median':>10}{'png ms':>10}{'KiB':>8}{'pictures/s/core':>18}")
    for kind, row in rows.items():
        seconds = row["draw_s"] + row["encode_s"]
        times = "".join(f"{1000 * row[name]:10.1f}" for name in ("draw_s", "draw_median_s", "encode_s"))
        print(f"{kind:14}{times}{row['png_bytes'] / 1024:8.0f}{1 / seconds:18.1f}")
    shares = MixtureConfig().shares()
    mixed = sum(shares[k] * (r["draw_s"] + r["encode_s"]) for k, r in rows.items()) / sum(shares.values())
    print(f"{'default mixture':52}{1 / mixed:18.1f}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()  # noqa: S607
    about = {"size_px": size_px, "pictures": pictures, "commit": commit, "machine": platform.machine()}
    about["mixture_per_s_core"] = round(1 / mixed, 2)
    out.mkdir(parents=True, exist_ok=True)
    (out / "synthesize.json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

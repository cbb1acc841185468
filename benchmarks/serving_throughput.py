"""What the engine is worth: pictures per second and the wait of a small picture, against one request at a time.

1. Throughput: 8 requests of mixed sizes at once through the Engine, and one after the other through the pipeline.
2. Latency: a small picture on an idle engine, and one that comes while the engine works on a picture with 64 times its
   pixels. First come, first served would have it wait until the large one is done.

Both sides of each run in one process, in turns, after a warm-up. Prints a table and writes JSON.

    python benchmarks/serving_throughput.py [--model nano] [--device cuda] [--small-px 64] [--rounds 5]
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from faithdiff import FaithDiffPipeline
from faithdiff.request import RestorationRequest
from serve.engine import Engine, EngineConfig


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def seconds(work: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def through_pipeline(pipeline: FaithDiffPipeline, lq: np.ndarray, request: RestorationRequest) -> bytes:
    restoration = pipeline.prepare(lq, request)
    pipeline._denoise(restoration, None)
    return np.asarray(pipeline.finish(restoration).image).tobytes()


def throughput(pipeline: FaithDiffPipeline, engine: Engine, small_px: int, steps: int, rounds: int) -> dict[str, float]:
    """Pictures per second of both ways, medians; the bytes of both must agree."""
    sides = [(1, 1), (1, 1), (1, 2), (2, 1), (1, 1), (2, 2), (1, 1), (1, 2)]
    lqs = [picture(small_px * rows, small_px * columns) for rows, columns in sides]
    requests = [
        RestorationRequest(scale=1, num_inference_steps=steps, tile_px=small_px, seed=i) for i in range(len(lqs))
    ]
    jobs = list(zip(lqs, requests, strict=True))
    results: dict[str, list[bytes]] = {}

    def one_at_a_time() -> None:
        results["pipeline"] = [through_pipeline(pipeline, *job) for job in jobs]

    def at_once() -> None:
        tickets = [engine.submit(*job, name=str(i)) for i, job in enumerate(jobs)]
        results["engine"] = [np.asarray(ticket.future.result().image).tobytes() for ticket in tickets]

    ways = {"pipeline": one_at_a_time, "engine": at_once}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            taken_s = seconds(way)
            if number > 0:  # the first round warms up both
                taken[name].append(taken_s)
    assert results["pipeline"] == results["engine"], "a picture depends on its company"
    rates = {f"{name}_per_s": len(jobs) / statistics.median(values) for name, values in taken.items()}
    return rates | {"ratio": rates["engine_per_s"] / rates["pipeline_per_s"], "batch_fill": engine.load().batch_fill}


def latency(engine: Engine, small_px: int, steps: int, rounds: int) -> dict[str, float]:
    """Median seconds of a small picture alone and behind a large one, and of the large one alone."""
    small, large = picture(small_px, small_px), picture(8 * small_px, 8 * small_px)
    request = RestorationRequest(scale=1, num_inference_steps=steps, tile_px=small_px)
    pauses = np.random.default_rng(0)

    def restore(lq: np.ndarray) -> None:
        engine.submit(lq, request, name="picture").future.result()

    restore(small)
    large_s = seconds(lambda: restore(large))
    alone: list[float] = []
    behind: list[float] = []
    for _ in range(rounds):
        alone.append(seconds(lambda: restore(small)))
        ticket = engine.submit(large, request, name="large")
        # At any moment of its encoding, its steps or its decoding.
        for _ in range(4):
            time.sleep(float(pauses.uniform(0, large_s / 6)))
            if not ticket.future.done():
                behind.append(seconds(lambda: restore(small)))
        ticket.future.result()
    alone_s, behind_s = statistics.median(alone), statistics.median(behind)
    worst_s = float(np.quantile(behind, 0.99))
    figures = {"alone_s": alone_s, "behind_s": behind_s, "behind_p99_s": worst_s, "large_alone_s": large_s}
    return figures | {"ratio": behind_s / alone_s, "p99_ratio": worst_s / alone_s, "samples": len(behind)}


def told(name: str, row: dict[str, float]) -> dict[str, float]:
    """The row, after it was printed: what is measured is seen even where the rest is cut off."""
    print(f"{name:12}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
    return row


def main(
    model: str = "nano",
    device: str = "cpu",
    small_px: int = 64,
    steps: int = 8,
    rounds: int = 5,
    threads: int = 1,
    out: Path = Path("out/benchmarks"),
) -> None:
    """Small pictures of small_px x small_px, one tile each; the large one has 8 x 8 times as many pixels."""
    torch.set_num_threads(threads)
    pipeline = FaithDiffPipeline.from_pretrained(model, device=device)
    engine = Engine(pipeline, EngineConfig())
    rows = {
        "throughput": told("throughput", throughput(pipeline, engine, small_px, steps, rounds)),
        "latency": told("latency", latency(engine, small_px, steps, rounds)),
    }
    engine.close()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()  # noqa: S607
    about = {"model": model, "device": device, "small_px": small_px, "steps": steps, "rounds": rounds, "commit": commit}
    about |= {"machine": platform.machine(), "threads": threads, "torch": torch.__version__}
    out.mkdir(parents=True, exist_ok=True)
    (out / "serving_throughput.json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

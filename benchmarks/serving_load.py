"""The whole service over HTTP on Ray Serve: what it adds, what a large picture costs a small one, a storm.

1. Overhead: a small picture through `FaithDiffPipeline` in this process, by a direct call of the replica (Serve's
   handle), through POST /v1/upscale, and as a job until its `done` event, with the parts of that; in turns. The gateway
   may add 20 ms to the replica's answer at the median.
2. Fairness: a small job on an idle service, and behind a job with 64 times its pixels; median and 99th percentile.
3. Load: 200 jobs of mixed sizes from 16 clients; pictures per second, waits by size, what was refused or failed.

Prints a table and writes JSON. RAY_SERVE_ENABLE_HA_PROXY=1 measures it as clusters run it, behind HAProxy.

    python benchmarks/serving_load.py [--small-px 64] [--rounds 40] [--jobs 200] [--clients 16]
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import tyro
from PIL import Image

from faithdiff import FaithDiffPipeline
from sr_platform import cluster

from ray import serve  # isort: skip
from serve.app import ServeConfig, build_app  # isort: skip
from serve.form import UpscaleRequest  # isort: skip
from serve.jobs import JobStore  # isort: skip

_SEED = 3


def png(height: int, width: int) -> bytes:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def service(folder: Path, tile_px: int, replicas: int, port: int) -> Iterator[httpx.Client]:
    """The application with nano on a Ray of its own."""
    cfg = {
        # In proportion to nano's tiles, as 1024 px are to SDXL's.
        "restorer": {
            "num_replicas": replicas,
            "tile_px": tile_px,
            "vae_tile_px": tile_px,
            "spread": {"max_peers": 0},
        },
        "gateway": {
            "store_url": f"sqlite:///{folder}/jobs.db",
            "storage_uri": str(folder / "files"),
            "logs": {"level": "WARNING"},
        },
    }
    with cluster.connected(num_cpus=6, local=True):
        serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 600})
        serve.run(build_app(ServeConfig.model_validate(cfg)), name="faithdiff", route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            yield client
        serve.shutdown()


def job_s(client: httpx.Client, picture: bytes, fields: dict[str, str]) -> float:
    """Seconds from before the upload to the event that says done."""
    start_s = time.perf_counter()
    run_job(client, picture, fields)
    return time.perf_counter() - start_s


def job_parts_s(client: httpx.Client, jobs: JobStore, picture: bytes, fields: dict[str, str]) -> dict[str, float]:
    """Seconds until the job is accepted, until a replica has it, until its result is stored, until the event of it."""
    times = [time.time()]
    job = jobs.get(run_job(client, picture, fields), None)
    assert job is not None
    assert job.started_at is not None
    assert job.ended_at is not None
    times += [job.submitted_at, job.started_at, job.ended_at, time.time()]
    return {name: b - a for name, (a, b) in zip(("accept", "queue", "work", "tell"), pairwise(times), strict=True)}


def run_job(client: httpx.Client, picture: bytes, fields: dict[str, str]) -> str:
    """The job's id, when the event has come that says done."""
    job = client.post("/v1/jobs", files={"picture": picture}, data=fields).raise_for_status().json()
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as stream:
        for line in stream.iter_lines():
            if line.startswith("event: ") and line != "event: progress":
                assert line == "event: done", line
    return str(job["id"])


def overhead(
    client: httpx.Client, jobs: JobStore, small_px: int, fields: dict[str, str], tile_px: int, rounds: int
) -> dict[str, Any]:
    """Milliseconds, medians of runs in turns. One step each: what is added does not depend on how long a model takes,
    and how unsteady the machine is does.
    """
    pipeline = FaithDiffPipeline.from_pretrained("nano")
    picture = png(small_px, small_px)
    settings = {"scale": 1, "num_inference_steps": 1, "seed": _SEED, "tile_px": tile_px, "vae_tile_px": tile_px}
    fields = {**fields, "num_inference_steps": "1"}
    parts: list[dict[str, float]] = []

    def direct() -> None:
        pipeline(np.asarray(Image.open(BytesIO(picture))), **settings)

    def upscale() -> None:
        client.post("/v1/upscale", files={"picture": picture}, data=fields).raise_for_status()

    replica = serve.get_deployment_handle("Restorer", "faithdiff")
    request = UpscaleRequest(scale=1, num_inference_steps=1, seed=_SEED)
    pixels = np.asarray(Image.open(BytesIO(picture)))
    ways: dict[str, Callable[[], Any]] = {
        "direct": direct,
        "replica": lambda: replica.restore.remote(pixels, request, None).result(),
        "upscale": upscale,
        "job": lambda: parts.append(job_parts_s(client, jobs, picture, fields)),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 3):
        for name, way in ways.items():
            start_s = time.perf_counter()
            way()
            taken[name].append(1e3 * (time.perf_counter() - start_s))
    taken = {name: values[3:] for name, values in taken.items()}
    medians = {f"{name}_ms": statistics.median(values) for name, values in taken.items()}
    added = {
        f"{name}_adds_ms": statistics.median(
            mine - theirs for mine, theirs in zip(taken[name], taken["replica"], strict=True)
        )
        for name in ("upscale", "job")
    }
    of_job = {f"job_{name}_ms": 1e3 * statistics.median(part[name] for part in parts[3:]) for name in parts[0]}
    return {**medians, **added, **of_job}


def fairness(client: httpx.Client, small_px: int, fields: dict[str, str], rounds: int) -> dict[str, Any]:
    """Seconds of a small job alone, and behind a large one in whichever of its phases."""
    small, large = png(small_px, small_px), png(8 * small_px, 8 * small_px)
    pauses = np.random.default_rng(0)
    alone, behind = [], []
    job_s(client, small, fields)
    while len(behind) < rounds:
        alone += [job_s(client, small, fields) for _ in range(10)]
        large_id = client.post("/v1/jobs", files={"picture": large}, data=fields).json()["id"]
        while client.get(f"/v1/jobs/{large_id}").json()["state"] == "queued":
            time.sleep(0.01)
        while len(behind) < rounds and client.get(f"/v1/jobs/{large_id}").json()["state"] == "running":
            behind.append(job_s(client, small, fields))
            time.sleep(float(pauses.uniform(0, 0.5)))
        client.delete(f"/v1/jobs/{large_id}")
        while client.get(f"/v1/jobs/{large_id}").json()["state"] in ("queued", "running"):
            time.sleep(0.02)
    figures = {"alone_s": statistics.median(alone), "alone_p99_s": float(np.quantile(alone, 0.99))}
    figures |= {"behind_s": statistics.median(behind), "behind_p99_s": float(np.quantile(behind, 0.99))}
    figures["ratio"] = figures["behind_s"] / figures["alone_s"]
    figures["p99_ratio"] = figures["behind_p99_s"] / figures["alone_p99_s"]
    return {**figures, "samples": len(behind)}


def load(client: httpx.Client, small_px: int, fields: dict[str, str], jobs: int, clients: int) -> dict[str, Any]:
    """Jobs of four sizes; every client sends its next one when the last one is done."""
    sides = [1, 1, 1, 1, 2, 1, 1, 2, 4, 1]
    pictures = {side: png(side * small_px, side * small_px) for side in set(sides)}
    waits: dict[int, list[float]] = {side: [] for side in pictures}
    failures: list[str] = []
    lock = threading.Lock()

    def one(number: int) -> None:
        side = sides[number % len(sides)]
        try:
            seconds = job_s(client, pictures[side], fields)
        except (httpx.HTTPError, AssertionError) as error:
            with lock:
                failures.append(repr(error)[:200])
        else:
            with lock:
                waits[side].append(seconds)

    start_s = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(jobs)))
    seconds = time.perf_counter() - start_s
    by_size = {f"x{side * side}_median_s": statistics.median(values) for side, values in sorted(waits.items())}
    done = sum(len(values) for values in waits.values())
    return {"done": done, "failed": len(failures), "seconds": seconds, "per_s": done / seconds, **by_size}


def main(
    small_px: int = 64,
    steps: int = 8,
    tile_px: int = 64,
    rounds: int = 40,
    jobs: int = 200,
    clients: int = 16,
    replicas: int = 1,
    port: int = 8123,
    out: Path = Path("out/benchmarks"),
) -> None:
    """Small pictures are small_px x small_px, one tile each, restored at their own size; jobs 0 leaves out the load."""
    torch.set_num_threads(1)
    fields = {"scale": "1", "num_inference_steps": str(steps), "seed": str(_SEED)}
    with tempfile.TemporaryDirectory() as folder, service(Path(folder), tile_px, replicas, port) as client:
        rows = {
            "overhead": overhead(client, JobStore(f"sqlite:///{folder}/jobs.db"), small_px, fields, tile_px, rounds),
            "fairness": fairness(client, small_px, fields, rounds),
            **({"load": load(client, small_px, fields, jobs, clients)} if jobs else {}),
        }
    for name, row in rows.items():
        print(f"{name:10}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()  # noqa: S607
    about = {"small_px": small_px, "steps": steps, "tile_px": tile_px, "replicas": replicas, "clients": clients}
    about |= {"machine": platform.machine(), "torch": torch.__version__, "commit": commit}
    about |= {"haproxy": os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"}
    out.mkdir(parents=True, exist_ok=True)
    (out / "serving_load.json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

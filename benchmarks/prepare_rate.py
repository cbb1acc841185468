"""Does the pipeline cost more than its stages? Pictures per second of prepare against the same stages called plainly.

plain      the stage functions one after the other on every shard, in as many processes as cores, without Ray
pipeline   `prepare()` as users run it on a connected Ray: both passes, markers, commit, contact sheet, progress

Both start from the same files and end with the same shards in another folder; they take turns, after a warm-up. The
ratio is the rate of the pipeline over that of the plain sum. Prints a table and writes JSON.

    python benchmarks/prepare_rate.py [--num-pictures 300] [--rounds 2]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro

from sr_platform import cluster

# isort: split
# Ray reads its environment when it is imported, and `cluster` sets it.
import cv2
import numpy as np
from PIL import Image

from pipelines.photographs import write_photographs
from pipelines.preparation.plan import Plan
from pipelines.preparation.recipe import PrepareConfig
from pipelines.prepare import prepare

STAGES = ("ingest", "filter", "crop", "caption", "degrade", "write")


def write_pictures(folder: Path, num_pictures: int, side_px: int) -> None:
    """JPEG photographs of side_px x side_px, every one another cut-out and another file."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_photographs(Path(scratch))
        photographs = [Image.open(path).convert("RGB").resize((2 * side_px, 2 * side_px)) for path in paths]
    for number in range(num_pictures):
        rng = np.random.default_rng(number)
        left, top = (int(v) for v in rng.integers(0, side_px, 2))
        photograph = photographs[number % len(photographs)]
        photograph.crop((left, top, left + side_px, top + side_px)).save(folder / f"{number:05d}.jpg", quality=92)


def recipe(folder: Path, out: Path) -> PrepareConfig:
    return PrepareConfig.model_validate(
        {
            "input": str(folder),
            "out": str(out),
            "samples_per_shard": 64,
            "filter": {"min_side_px": 512, "min_deviation": 0.0, "duplicate_bits": -1},
            "crop": {"size_px": 512, "max_per_picture": 4, "min_deviation": 0.0},
        }
    )


def plain_seconds(cfg: PrepareConfig, pool: Any) -> dict[str, float]:
    """Wall seconds of all shards, and busy seconds of each stage added up over the processes."""
    from pipelines.preparation.passes import plan_of
    from pipelines.stages.filter import Facts
    from pipelines.stages.ingest import list_pictures
    from sr_platform.storage import open_storage

    sources = cfg.resolved_sources()
    pictures = list_pictures(sources, open_storage(f"{cfg.out}/listing"))
    start = time.perf_counter()
    parts = [pictures[at : at + 32] for at in range(0, len(pictures), 32)]
    surveyed = pool.starmap(plain_survey, [(cfg, part) for part in parts], chunksize=1)
    facts = {row["name"]: Facts(**row) for found, _ in surveyed for row in found}
    plan = plan_of(cfg, sources, pictures, facts, cfg.recipe(sources))
    made = pool.starmap(plain_shard, [(cfg, plan, index) for index in range(len(plan.shards))], chunksize=1)
    wall_s = time.perf_counter() - start
    busy = dict.fromkeys(STAGES, 0.0)
    for seconds in [*(s for _, s in surveyed), *made]:
        for stage, value in seconds.items():
            busy[stage] += value
    return {"wall_s": wall_s, **busy}


def plain_survey(cfg: PrepareConfig, pictures: list[Any]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    import pyarrow as pa

    from pipelines.preparation.survey import picture_rows
    from pipelines.stages.filter import Filter
    from pipelines.stages.ingest import Ingest

    cv2.setNumThreads(1)
    rows = pa.Table.from_pylist([{"shard": 0, "pictures": picture_rows(pictures)}])
    ingest = Ingest(cfg.resolved_sources(), f"{cfg.out}/listing")
    facts, seconds = timed({"ingest": ingest, "filter": Filter(cfg.filter.max_pixels, {})}, rows)
    return facts.to_pylist(), seconds


def plain_shard(cfg: PrepareConfig, plan: Plan, index: int) -> dict[str, float]:
    import pyarrow as pa

    from pipelines.preparation.survey import picture_rows
    from pipelines.stages.caption import TextCaption
    from pipelines.stages.crop import Crop
    from pipelines.stages.degrade import Degrade
    from pipelines.stages.ingest import Ingest
    from pipelines.stages.write import Write

    cv2.setNumThreads(1)
    sources = cfg.resolved_sources()
    stages = {
        "ingest": Ingest(sources, f"{cfg.out}/listing"),
        "crop": Crop(cfg.crop, {s.name: s for s in sources}, seed=cfg.seed, max_pixels=cfg.filter.max_pixels),
        "caption": TextCaption(),
        "degrade": Degrade(cfg.degrade, seed=cfg.seed),
        "write": Write(cfg.out, name=cfg.name, about={}, groups={}),
    }
    shard = plan.shards[index]
    rows = pa.Table.from_pylist([{"shard": index, "pictures": picture_rows(shard.pictures, plan.sha256)}])
    return timed(stages, rows)[1]


def timed(stages: dict[str, Any], table: Any) -> tuple[Any, dict[str, float]]:
    seconds = {}
    for name, stage in stages.items():
        start = time.perf_counter()
        table = stage(table)
        seconds[name] = time.perf_counter() - start
    return table, seconds


def main(
    num_pictures: int = 300, side_px: int = 1024, rounds: int = 2, out: Path = Path("out/benchmarks"), cores: int = 0
) -> None:
    """Prepares num_pictures photographs of side_px, four crops of 512 px each; cores 0: all of this machine."""
    cores = cores or os.cpu_count() or 1
    place = Path(tempfile.mkdtemp(prefix="prepare-rate-"))
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        write_pictures(place / "pictures", num_pictures, side_px)
        plain, pipeline = [], []
        write_pictures(place / "few", 32 * cores, side_px)
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(cores) as pool, cluster.connected(num_cpus=cores, local=True):
            plain_seconds(recipe(place / "few", place / "plain-warm"), pool)
            prepare(recipe(place / "few", place / "pipeline-warm"))
            for number in range(rounds):
                plain.append(plain_seconds(recipe(place / "pictures", place / f"plain{number}"), pool))
                start = time.perf_counter()
                prepare(recipe(place / "pictures", place / f"pipeline{number}"))
                pipeline.append(time.perf_counter() - start)
    finally:
        shutil.rmtree(place)
    plain_s, pipeline_s = statistics.median(p["wall_s"] for p in plain), statistics.median(pipeline)
    print(f"\n{num_pictures} pictures of {side_px} px, 4 crops of 512 px each, {cores} cores, median of {rounds}")
    for stage in STAGES:
        busy_s = statistics.median(p[stage] for p in plain)
        print(f"  {stage:<9}{busy_s:8.1f} s of one core, {1e3 * busy_s / num_pictures:7.1f} ms per picture")
    print(f"  plain    {plain_s:8.1f} s, {num_pictures / plain_s:6.2f} pictures/s")
    print(f"  pipeline {pipeline_s:8.1f} s, {num_pictures / pipeline_s:6.2f} pictures/s")
    print(f"  pipeline / plain: {plain_s / pipeline_s:.3f}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()  # noqa: S607
    about = {"num_pictures": num_pictures, "side_px": side_px, "cores": cores, "commit": commit}
    out.mkdir(parents=True, exist_ok=True)
    result = {**about, "plain": plain, "pipeline_s": pipeline, "ratio": plain_s / pipeline_s}
    (out / "prepare_rate.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

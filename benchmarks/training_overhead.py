"""What Ray Train, DeepSpeed and tracking cost: pictures per second of the job against a plain PyTorch loop.

Both train nano's second stage on the same samples, batch, crops, draws and cores: the job on one worker with all
threads, on as many workers as threads, and a loop of a page in one process: forward, backward, clipping, AdamW, moving
average. They run in turns, each in processes of its own, and only updates after the first look are timed. The job saves
checkpoints meanwhile, and says how long training stood still for each. Prints a table and writes JSON.

    python benchmarks/training_overhead.py [--rounds 3] [--updates 60] [--size-px 128]
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch
import tyro
from encoded_training import publish

LOOK = 10
"""Updates between two looks."""


def plain(data: str, batch: int, size_px: int, updates: int, threads: int) -> list[float]:
    """Seconds per update of the plain loop, look by look, the first one left out."""
    from faithdiff import FaithDiffPipeline
    from faithdiff.loss import FaithDiffForTraining, trained_parameters
    from faithdiff.schedule import alphas_cumprod
    from pipelines.training.batch_split import BatchSplit
    from pipelines.training.batches import CropConfig, MicroBatches
    from pipelines.training.inputs import FrozenModels
    from sr_platform.sample_reader import SampleReader

    torch.set_num_threads(threads)
    pipe = FaithDiffPipeline.from_pretrained("nano")
    model = FaithDiffForTraining(pipe.unet, pipe.lq_encoder, alphas_cumprod(pipe.scheduler.config)).train()
    trained_parameters(model, ("alignment", "lq_encoder", "unet"))
    split, crop = BatchSplit.derive(batch, 1, batch // threads), CropConfig(size_px=size_px, caption_dropout=0.2)
    batches = MicroBatches(SampleReader(data), split, rank=0, seed=0, crop=crop)
    frozen = FrozenModels(pipe, device=torch.device("cpu"), dtype=torch.float32, seed=0, noise_offset=0.02)
    parameters = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    seconds, number = [], 0
    for _ in range(updates // LOOK):
        started_s = time.perf_counter()
        for _ in range(LOOK):
            for _ in range(split.accumulation):
                inputs = frozen.encode(batches[number])
                loss = model(inputs.latents, inputs.draws, inputs.conditions).mean() / split.accumulation
                loss.backward()
                number += 1
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 0.1)
        seconds.append((time.perf_counter() - started_s) / LOOK)
    return seconds[1:]


def job(data: str, batch: int, size_px: int, updates: int, threads: int, workers: int) -> dict[str, list[float]]:
    """Seconds per update of the job by look, the first one left out, and seconds that each checkpoint took."""
    from mlflow import MlflowClient

    from pipelines.train import train
    from pipelines.training.recipe import TrainConfig
    from sr_platform.config import load_config

    os.environ["OMP_NUM_THREADS"] = str(threads // workers)
    flags = ["--data", data, "--stage", "unified", "--global-batch", str(batch), "--size-px", str(size_px)]
    flags += [
        "--num-workers",
        str(workers),
        "--max-micro-batch",
        str(batch // threads),
        "--log-every-updates",
        str(LOOK),
    ]
    flags += ["--unified.num-updates", str(updates), "--checkpoint-every-updates", str(2 * LOOK)]
    with tempfile.TemporaryDirectory() as out:
        result = train(load_config(TrainConfig, ["train_nano.yaml", *flags, "--out", out], job="train"))
        client = MlflowClient(result.tracking_uri)
        parent = client.get_run(result.run_id).info
        stage = next(r.info.run_id for r in client.search_runs([parent.experiment_id]) if r.info.run_name == "unified")
        rates = [m.value for m in client.get_metric_history(stage, "train/updates_per_s")]
        stalls = [m.value for m in client.get_metric_history(stage, "perf/checkpoint_s")]
    return {"update_s": [1 / rate for rate in rates[1:]], "checkpoint_s": stalls}


def measured(way: str, **settings: object) -> dict[str, list[float]]:
    """One way in a process of its own."""
    arguments = [flag for name, value in settings.items() for flag in (f"--{name.replace('_', '-')}", str(value))]
    env = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"])}
    command = [sys.executable, __file__, "--only", way, *arguments]
    answer = subprocess.run(command, env=env, capture_output=True, text=True, check=False)  # noqa: S603
    assert answer.returncode == 0, answer.stderr[-3000:]
    rows: dict[str, list[float]] = json.loads(answer.stdout.splitlines()[-1])
    return rows


def main(
    rounds: int = 3,
    updates: int = 60,
    size_px: int = 128,
    batch: int = 8,
    threads: int = os.cpu_count() or 1,
    data: str = "",
    only: Literal["", "plain", "one", "all"] = "",
    out: Path = Path("out/benchmarks"),
) -> None:
    """Times `rounds` x `updates` updates of every way; `only` runs one of them and prints its times."""
    if only == "plain":
        print(json.dumps({"update_s": plain(data, batch, size_px, updates, threads), "checkpoint_s": []}))
        return
    if only:
        workers = 1 if only == "one" else threads
        print(json.dumps(job(data, batch, size_px, updates, threads, workers)))
        return
    settings = {"updates": updates, "size_px": size_px, "batch": batch, "threads": threads}
    found: dict[str, list[dict[str, list[float]]]] = {"plain": [], "one": [], "all": []}
    with tempfile.TemporaryDirectory() as folder:
        publish(folder, 4 * batch, size_px, None)
        for _ in range(rounds):
            for way, rows in found.items():
                rows.append(measured(way, data=folder, **settings))
    report(found, {**settings, "rounds": rounds}, out)


def report(found: dict[str, list[dict[str, list[float]]]], settings: dict[str, int], out: Path) -> None:
    labels = {"plain": "plain PyTorch loop", "one": "job, 1 worker", "all": f"job, {settings['threads']} workers"}
    medians = {way: [statistics.median(row["update_s"]) for row in rows] for way, rows in found.items()}
    table = {}
    print(
        f"{'way':22}{'update s':>10}{'pictures/s':>12}{'overhead':>10}   {'overhead per round':28}{'checkpoint s':>13}"
    )
    for way, rows in found.items():
        update_s = statistics.median(medians[way])
        overheads = [mine / theirs - 1 for mine, theirs in zip(medians[way], medians["plain"], strict=True)]
        stalls = [second for row in rows for second in row["checkpoint_s"]]
        table[way] = {
            "update_s": update_s,
            "overhead": statistics.median(overheads),
            "checkpoint_s": statistics.median(stalls) if stalls else None,
        }
        each = " ".join(f"{value:+.1%}" for value in overheads)
        stall = f"{statistics.median(stalls):.4f}" if stalls else "-"
        print(
            f"{labels[way]:22}{update_s:10.4f}{settings['batch'] / update_s:12.2f}"
            f"{statistics.median(overheads):+10.1%}   {each:28}{stall:>13}"
        )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()  # noqa: S607
    about = {**settings, "commit": commit, "machine": platform.machine(), "torch": torch.__version__}
    out.mkdir(parents=True, exist_ok=True)
    (out / "training_overhead.json").write_text(json.dumps({**about, "rows": table, "found": found}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

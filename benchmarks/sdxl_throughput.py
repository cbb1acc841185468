"""How fast does SDXL-size stage 2 train on one GPU: pictures per second, share of the matrix-product peak, memory.

Random weights and inputs, the product's module, engine and update (sdxl_parts.py). First checkpointing and micro-batch
are swept, then single changes are tried on the best setting and kept where they help. Every setting runs in a process
of its own, so that memory starts empty, until it runs out of memory. Prints a row and writes JSON after every
measurement; on a CPU it trains nano, which proves that it runs and says nothing about speed.

    python benchmarks/sdxl_throughput.py [--budget-s 500] [--profile] [--micro-batches 4 8 12 16 24 32]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from sdxl_parts import (
    HAS_GPU,
    PRESET,
    SAMPLES,
    SIZE_PX,
    Preset,
    Setting,
    about,
    alone,
    apply,
    build,
    engine_of,
    placed,
    recipe,
    split_of,
    take_split,
    update,
)

GAIN = 1.01
"""A change is kept when it gives this many times the pictures per second."""
PROFILE_S = 75.0
CHANGES: tuple[dict[str, Any], ...] = (
    {"encoder_attention": "math"},
    {"compile": "blocks"},
    {"overlap": False},
    {"cudnn_benchmark": True},
    {"compile": "all"},
    {"channels_last": True},
    {"zero_stage": 1},
)


@dataclass(frozen=True)
class Bench:
    """How to measure."""

    preset: Preset = PRESET
    micro_batches: tuple[int, ...] = (4, 8, 12, 16, 24, 32) if HAS_GPU else (4, 8)
    samples: int = SAMPLES
    """Per update, rounded up to whole micro-batches."""
    size_px: int = SIZE_PX
    updates: int = 8
    """Timed ones, after two that are not."""
    setting_s: float = 6.0 if HAS_GPU else 1.0
    """Fewer updates are timed, three at least, where they would take longer."""
    budget_s: float = 500.0 if HAS_GPU else 60.0
    profile: bool = False
    """In the end, within the budget, run sdxl_parts.py on the best setting."""
    out: Path = Path("out/benchmarks")
    child: str = ""
    """For its own use: JSON of the one setting that this process measures."""


def measure(bench: Bench, engine: Any, guard: Any, micro_batch: int) -> dict[str, Any]:
    """Seconds per update and the memory's peak with one micro-batch; warm-up counts in the peak."""
    from pipelines.training.memory_probe import random_inputs

    split = split_of(bench.samples, micro_batch)
    take_split(engine, split)
    inputs = random_inputs(engine.module, micro_batch, size_px=bench.size_px, device=engine.device)
    weights = torch.ones(micro_batch, device=engine.device)

    def run(updates: int) -> float:
        """Seconds of so many updates, by the GPU's clock where there is one."""
        started_s = time.perf_counter()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if HAS_GPU else []
        for event in events[:1]:
            event.record()
        for number in range(updates):
            update(engine, guard, split, inputs, weights, number)
        for event in events[1:]:
            event.record()
            event.synchronize()
        return events[0].elapsed_time(events[1]) / 1000 if events else time.perf_counter() - started_s

    if HAS_GPU:
        torch.cuda.reset_peak_memory_stats()
    first_s = run(1)
    updates = min(bench.updates, max(3, int(bench.setting_s / run(1))))
    seconds = run(updates)
    return {
        "micro_batch": micro_batch,
        "accumulation": split.accumulation,
        "update_s": seconds / updates,
        "pictures_per_s": split.num_slots * updates / seconds,
        "first_update_s": first_s,
        "updates": updates,
        "updates_not_finite": len(guard.check()),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if HAS_GPU else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if HAS_GPU else None,
    }


def run_child(bench: Bench) -> None:
    """Prints a line of JSON per micro-batch, ascending, the last one where memory ran out; does not return."""
    from pipelines.training.memory_probe import fitting_micro_batch
    from pipelines.training.throughput import measured_peak_flops
    from sr_platform.errors import ConfigError

    setting, sizes = Setting(**json.loads(bench.child)), sorted(bench.micro_batches)
    device, micro_batch, probe = alone(), sizes[0], 0
    peak_flops = measured_peak_flops(device, torch.bfloat16)
    try:
        module = placed(bench.preset, device)
        apply(setting, module)
        try:
            probe = fitting_micro_batch(module, recipe(setting, bench.size_px, device), device=device, world_size=1)
        except ConfigError as error:
            print(error, file=sys.stderr)
        engine, guard = engine_of(module, setting, bench.size_px, device, micro_batch)
        for micro_batch in sizes:
            row = measure(bench, engine, guard, micro_batch)
            print(json.dumps({"peak_flops": peak_flops, "probe": probe, **row}), flush=True)
    except torch.OutOfMemoryError:
        print(json.dumps({"micro_batch": micro_batch, "out_of_memory": True}), flush=True)
    # DeepSpeed with half of a backward pass done has no orderly end.
    os._exit(0)


class Sweep:
    """Runs settings one after the other until the budget is spent; every row is in the file at once."""

    def __init__(self, bench: Bench) -> None:
        from pipelines.training.memory_probe import random_inputs
        from pipelines.training.throughput import flops_per_sample

        self.bench, self.rows, self.errors = bench, list[dict[str, Any]](), list[str]()
        self.deadline_s = time.monotonic() + bench.budget_s - (PROFILE_S if bench.profile else 0)
        module = build(bench.preset, torch.device("meta"))
        inputs = random_inputs(module, 1, size_px=bench.size_px, device=torch.device("cpu"))
        self.flops = flops_per_sample(module, inputs)
        print(f"{bench.preset}, {bench.size_px} px: {self.flops / 1e12:.4f} TFLOP per picture, forward and backward")
        print(
            f"{'micro':>5}{'accum':>6}{'pict/s':>9}{'TFLOP/s':>9}{'of peak':>9}{'GiB':>7}{'probe':>6}  setting",
            flush=True,
        )

    def all(self) -> None:
        """Checkpointing by micro-batch, then the changes, then no checkpointing with the changes that were kept."""
        for checkpointing in ("all", "none", "first", "encoder", "unet"):
            self.run(Setting(checkpointing=checkpointing), self.bench.micro_batches)
        kept = max(self.done, key=rate, default=None)
        for change in CHANGES if kept else ():
            assert kept is not None
            before = len(self.done)
            self.run(replace(Setting(**kept["setting"]), **change), (kept["micro_batch"],))
            kept = max([kept, *(row for row in self.done[before:] if rate(row) > GAIN * rate(kept))], key=rate)
        if kept and kept["setting"]["checkpointing"] != "none":
            # Not all sizes: each one is compiled anew.
            sizes = tuple(size for size in sorted(self.bench.micro_batches) if size <= kept["micro_batch"])[-2:]
            self.run(replace(Setting(**kept["setting"]), checkpointing="none"), sizes)

    def run(self, setting: Setting, micro_batches: tuple[int, ...]) -> None:
        """One process, which ends after its last micro-batch, or when memory or the budget runs out."""
        left_s = self.deadline_s - time.monotonic()
        if left_s < 5:
            self.errors.append(f"{setting}: not tried, the budget is spent")
            return self.write()
        command = [sys.executable, __file__, *self.flags(micro_batches), "--child", json.dumps(asdict(setting))]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=child_env())  # noqa: S603
            timer = threading.Timer(left_s, process.kill)
            timer.start()
            for text in process.stdout or ():
                if text.startswith("{"):
                    self.add(setting, json.loads(text))
            if process.wait():
                log.seek(0)
                lines = log.read().strip().splitlines() or [f"exit status {process.returncode}"]
                self.errors.append("\n".join([str(setting), *lines[-30:]]))
                print(f"{'stopped':>16}  {setting}: {lines[-1]}", flush=True)
            timer.cancel()
        self.write()

    def flags(self, micro_batches: tuple[int, ...]) -> list[str]:
        bench = self.bench
        values = {"preset": bench.preset, "samples": bench.samples, "size-px": bench.size_px}
        values |= {"updates": bench.updates, "setting-s": bench.setting_s}
        pairs = [text for name, value in values.items() for text in (f"--{name}", str(value))]
        return [*pairs, "--micro-batches", *map(str, micro_batches)]

    def add(self, setting: Setting, row: dict[str, Any]) -> None:
        row = {"name": str(setting), "setting": asdict(setting), **row}
        if "pictures_per_s" in row:
            row["tflops"] = row["pictures_per_s"] * self.flops / 1e12
            row["share_of_peak"] = row["tflops"] * 1e12 / row["peak_flops"]
        self.rows.append(row)
        print(line(row), flush=True)
        self.write()

    @property
    def done(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "pictures_per_s" in row]

    def write(self) -> None:
        values = {**about(), "flops_per_picture": self.flops, "best": max(self.done, key=rate, default=None)}
        values |= {"bench": asdict(self.bench), "rows": self.rows, "errors": self.errors}
        self.bench.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(values, indent=2, default=str) + "\n"
        (self.bench.out / "sdxl_throughput.json").write_text(text, encoding="utf-8")


def rate(row: dict[str, Any]) -> float:
    return float(row["pictures_per_s"])


def line(row: dict[str, Any]) -> str:
    if "pictures_per_s" not in row:
        return f"{row['micro_batch']:5d}{'out of memory':>20}{'':26}  {row['name']}"
    gib = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    wrong = f"  {row['updates_not_finite']} updates were not finite" if row["updates_not_finite"] else ""
    return (
        f"{row['micro_batch']:5d}{row['accumulation']:6d}{rate(row):9.2f}{row['tflops']:9.2f}"
        f"{row['share_of_peak']:9.1%}{gib:>7}{row['probe']:6d}  {row['name']}{wrong}"
    )


def child_env() -> dict[str, str]:
    # Blocks of one size after another, as micro-batches change, must not leave the memory in pieces.
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}


def profile(bench: Bench, best: dict[str, Any]) -> None:
    setting = [
        text for name, value in best["setting"].items() for text in flag(f"setting.{name.replace('_', '-')}", value)
    ]
    shape = ["--preset", bench.preset, "--size-px", str(bench.size_px), "--micro-batch", str(best["micro_batch"])]
    command = [
        sys.executable,
        str(Path(__file__).with_name("sdxl_parts.py")),
        *shape,
        "--out",
        str(bench.out),
        *setting,
    ]
    subprocess.run(command, env=child_env(), check=False, timeout=2 * PROFILE_S)  # noqa: S603


def flag(name: str, value: Any) -> list[str]:
    """A flag as tyro reads it."""
    head, _, tail = name.rpartition(".")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--{head}.no-{tail}"]
    return [f"--{name}", str(value)]


def main(bench: Bench) -> None:
    if bench.child:
        run_child(bench)
    sweep = Sweep(bench)
    sweep.all()
    best = max(sweep.done, key=rate, default=None)
    print(f"best:\n{line(best)}" if best else "nothing ran: see errors in the file")
    if bench.profile and best:
        profile(bench, best)


if __name__ == "__main__":
    main(tyro.cli(Bench))

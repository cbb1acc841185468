"""Seconds per training update of stage one: on encoded samples against on pictures and captions.

Both read the same samples, as two datasets, and train a copy of the nano model each, in turns, update by update; their
losses must agree. The inputs of an update are reading, decoding, VAE and text encoders, or reading alone; the rest is
the same on both sides. Prints a table and writes JSON.

    python benchmarks/encoded_training.py [--size-px 128] [--updates 12]
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import tyro

from faithdiff import FaithDiffPipeline
from faithdiff.loss import FaithDiffForTraining, trained_parameters
from faithdiff.schedule import alphas_cumprod
from pipelines.stages.encode import Encode, EncodeConfig
from pipelines.stages.sample import Sample
from pipelines.stages.write import encode_png
from pipelines.training.batch_split import BatchSplit
from pipelines.training.batches import CropConfig, MicroBatches
from pipelines.training.inputs import FrozenModels, StoredInputs, find_stored_inputs
from sr_platform.publication import commit_dataset, publish_shard
from sr_platform.sample_reader import SampleReader
from sr_platform.storage import open_storage


def publish(uri: str, num_samples: int, size_px: int, encode: Encode | None) -> None:
    """A dataset of smooth noise, encoded or not."""
    rng, samples = np.random.default_rng(0), []
    for i in range(num_samples):
        coarse = rng.integers(0, 256, (size_px // 8, size_px // 8, 3), dtype=np.uint8)
        hq = cv2.resize(coarse, (size_px, size_px), interpolation=cv2.INTER_CUBIC)
        lq = cv2.resize(hq, (size_px // 4, size_px // 4), interpolation=cv2.INTER_AREA)
        caption = f"a picture of {i} smooth spots in many colours"
        members = {"hq.png": encode_png(hq), "lq.png": encode_png(lq)}
        members["json"] = json.dumps({"caption": caption}).encode()
        if encode:
            crop = Sample(0, 1, "a.png", height_px=size_px, width_px=size_px, hq=hq.tobytes(), caption=caption)
            members["latents.safetensors"] = encode.encode(crop).latents
        samples.append((f"s{i}", members))
    storage = open_storage(uri)
    report = publish_shard(storage, name="bench", index=0, samples=samples)
    commit_dataset(storage, [report], recipe={}, sources=[], counts={})


class Training:
    """Stage one on one dataset, without Ray."""

    def __init__(self, uri: str, size_px: int, batch: int) -> None:
        reader = SampleReader(uri)
        self.stored: StoredInputs = find_stored_inputs(reader, "nano", size_px=size_px)
        crop = CropConfig(size_px=size_px, caption_dropout=0.2)
        split = BatchSplit(batch, 1, batch)
        self.batches = MicroBatches(reader, split, rank=0, seed=0, crop=crop, reads=self.stored.reads)
        pipe, cpu = FaithDiffPipeline.from_pretrained("nano"), torch.device("cpu")
        self.frozen = FrozenModels(pipe, device=cpu, dtype=torch.float32, seed=0, noise_offset=0.02, stored=self.stored)
        self.model = FaithDiffForTraining(pipe.unet, pipe.lq_encoder, alphas_cumprod(pipe.scheduler.config)).train()
        trained_parameters(self.model, ("alignment",))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def update(self, number: int) -> tuple[float, float, float]:
        """Seconds of the inputs, seconds of the whole update, loss."""
        start = time.perf_counter()
        inputs = self.frozen.encode(self.batches[number])
        ready = time.perf_counter()
        loss = self.model(inputs.latents, inputs.draws, inputs.conditions).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return ready - start, time.perf_counter() - start, loss.item()


def measure(folder: Path, size_px: int, batch: int, updates: int) -> dict[str, dict[str, float]]:
    """Medians of both ways, taken in turns after one update that warms up both."""
    encoders = {"pictures": None, "encoded": Encode(EncodeConfig(model="nano"))}
    for name, encode in encoders.items():
        publish(str(folder / name), 4 * batch, size_px, encode)
    ways = {name: Training(str(folder / name), size_px, batch) for name in encoders}
    timed: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for number in range(updates + 1):
        for name, way in ways.items():
            timed[name].append(way.update(number))
    worst = max(abs(a[2] - b[2]) / a[2] for a, b in zip(timed["pictures"], timed["encoded"], strict=True))
    assert worst < 1e-4, f"the losses differ by {worst:.1e}"
    return {
        name: {
            "inputs_s": statistics.median(row[0] for row in rows[1:]),
            "update_s": statistics.median(row[1] for row in rows[1:]),
            "bytes_per_sample": sum(s.size_bytes for s in ways[name].batches.reader.manifest.shards) / (4 * batch),
            "rel_difference_of_losses": worst,
        }
        for name, rows in timed.items()
    }


def main(size_px: int = 128, batch: int = 4, updates: int = 12, out: Path = Path("out/benchmarks")) -> None:
    """Times `updates` updates of `batch` samples of size_px x size_px."""
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), size_px, batch, updates)
    print(f"{'data':10}{'inputs s/update':>17}{'update s':>11}{'bytes/sample':>14}")
    for name, row in rows.items():
        print(f"{name:10}{row['inputs_s']:17.4f}{row['update_s']:11.4f}{row['bytes_per_sample']:14.0f}")
    print(f"pictures/encoded: {rows['pictures']['update_s'] / rows['encoded']['update_s']:.2f}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()  # noqa: S607
    about = {"size_px": size_px, "batch": batch, "updates": updates, "commit": commit}
    about |= {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    out.mkdir(parents=True, exist_ok=True)
    (out / "encoded_training.json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

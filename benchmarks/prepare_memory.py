"""Does prepare need more memory for more pictures? Peak memory of the whole job for 200 and for 2,000 large pictures.

Runs `pipelines/prepare.py` as a process of its own and adds up the proportional set size (shared pages divided among
their users) of it and of all its children, Ray's included, twice a second. Prints a table and writes JSON.

    python benchmarks/prepare_memory.py [--counts 200 2000]
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import tyro
from PIL import Image

from pipelines.photographs import write_photographs
from sr_platform.cluster import REPOSITORY_PATH

SIZE_PX = (2040, 1356)


def write_pictures(folder: Path, count: int) -> None:
    """JPEG files of 2040 x 1356 px, as large as DIV2K's; they differ in a comment, so every one is read and decoded."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        photographs = [Image.open(path).convert("RGB").resize(SIZE_PX) for path in write_photographs(Path(scratch))]
    files = []
    for photograph in photographs:
        buffer = io.BytesIO()
        photograph.save(buffer, "JPEG", quality=92)
        files.append(buffer.getvalue())
    for number in range(count):
        data, comment = files[number % len(files)], f"{number:08d}".encode()
        marker = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big")
        (folder / f"{number:05d}.jpg").write_bytes(data[:2] + marker + comment + data[2:])


def peak_bytes(folder: Path, out: Path) -> tuple[int, float]:
    """Peak memory of the job and its children, and its seconds."""
    script = REPOSITORY_PATH / "pipelines" / "prepare.py"
    flags = ["--filter.min-side-px", "512", "--filter.duplicate-bits", "-1", "--crop.max-per-picture", "2"]
    flags += ["--samples-per-shard", "64"]
    command = [sys.executable, str(script), "--input", str(folder), "--out", str(out), *flags]
    start, peak = time.monotonic(), 0
    job = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: S603
    while job.poll() is None:
        peak = max(peak, total_pss_bytes(job.pid))
        time.sleep(0.5)
    if job.returncode:
        raise RuntimeError(f"prepare ended with {job.returncode}")
    return peak, time.monotonic() - start


def total_pss_bytes(pid: int) -> int:
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it ended between the listing and the look
    return total


def main(counts: tuple[int, ...] = (200, 2000), out: Path = Path("out/benchmarks")) -> None:
    """Prepares `counts` pictures one after the other, two crops of 512 px each."""
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="prepare-memory-") as scratch:
            write_pictures(Path(scratch) / "pictures", count)
            peak, seconds = peak_bytes(Path(scratch) / "pictures", Path(scratch) / "out")
        rows.append({"pictures": count, "peak_mib": round(peak / 2**20), "seconds": round(seconds, 1)})
    print(f"{'pictures':>10}{'peak MiB':>10}{'seconds':>10}")
    for row in rows:
        print(f"{row['pictures']:>10}{row['peak_mib']:>10}{row['seconds']:>10}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()  # noqa: S607
    out.mkdir(parents=True, exist_ok=True)
    (out / "prepare_memory.json").write_text(json.dumps({"commit": commit, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

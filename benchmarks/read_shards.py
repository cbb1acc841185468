"""Samples per second out of shards: our reader in a global random order against plain webdataset, front to back.

webdataset reads whole shards one after the other, shuffles the shards and keeps a buffer of samples to draw from; ours
draws every sample from the whole dataset and reads its byte ranges. Both read the same shards in one process, in turns.
Raw: the members' bytes. Decoded: hq and lq as RGB, json as text. The first pass warms up; the fastest other counts.

local        a local disk with a warm page cache
far          a model of S3: every answer begins after 20 ms and then comes at 90 MB/s, as many at once as are asked for
moto         moto's S3 server on loopback, which reads the whole object for every range of it
... copies   with a folder for local copies of shards, which the first pass fills

    python benchmarks/read_shards.py [--num-samples 384] [--passes 3]
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import cv2
import numpy as np
import tyro
import webdataset as wds
from aiohttp import web

from pipelines.stages.write import encode_png
from pipelines.training.batches import decode
from sr_platform import s3
from sr_platform.publication import commit_dataset, publish_shard
from sr_platform.sample_order import SampleOrder
from sr_platform.sample_reader import SampleReader
from sr_platform.storage import open_storage

MICRO_BATCH = 16
SHUFFLE_BUFFER = 100
BUCKET = "shards"
FAR_LATENCY_S = 0.02
FAR_BYTES_PER_S = 90e6
_FAR_CHUNK_BYTES = 2**18


@dataclass(frozen=True)
class Way:
    """One way to read every sample once; `read(pass number)` yields the bytes or pictures of each."""

    place: str
    reader: str
    what: str
    """raw or decoded"""
    read: Callable[[int], Iterable[object]]


def make_dataset(folder: Path, num_samples: int, samples_per_shard: int) -> int:
    """A dataset of 512 px pictures of smooth noise, which PNG packs about as well as photographs; returns its bytes."""
    rng, pictures = np.random.default_rng(0), []
    for _ in range(16):
        coarse = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        smooth = cv2.resize(coarse, (512, 512), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        hq = np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)
        pictures.append((encode_png(hq), encode_png(cv2.resize(hq, (128, 128), interpolation=cv2.INTER_AREA))))
    storage, reports = open_storage(folder), []
    for shard, first in enumerate(range(0, num_samples, samples_per_shard)):
        samples = []
        for i in range(first, min(first + samples_per_shard, num_samples)):
            hq_png, lq_png = pictures[i % len(pictures)]
            about = json.dumps({"caption": f"picture {i}"}).encode()
            samples.append((f"s{i:06d}", {"hq.png": hq_png, "lq.png": lq_png, "json": about}))
        reports.append(publish_shard(storage, name="x", index=shard, samples=samples))
    return sum(s.size_bytes for s in commit_dataset(storage, reports, recipe={}, sources=[], counts={}).shards)


def ours(uri: str, *, is_decoded: bool, cache_dir: Path | None = None) -> Callable[[int], Iterator[object]]:
    """Micro-batches of the training order; a pass is an epoch."""
    reader = SampleReader(uri, cache_dir)
    order = SampleOrder(0, len(reader))

    def read(number: int) -> Iterator[object]:
        indices = [order.index(n) for n in range(number * len(reader), (number + 1) * len(reader))]
        for first in range(0, len(indices), MICRO_BATCH):
            for members in reader.read_many(indices[first : first + MICRO_BATCH], ["hq.png", "lq.png", "json"]):
                yield _decoded(members) if is_decoded else members

    return read


def _decoded(members: dict[str, bytes]) -> tuple[object, object, object]:
    hq, lq = decode(members["hq.png"]), decode(members["lq.png"])
    assert hq is not None
    assert lq is not None
    return hq, lq, json.loads(members["json"])


def plain(urls: list[str], *, is_decoded: bool, cache_dir: Path | None = None) -> Callable[[int], Iterator[object]]:
    """webdataset as its documentation has it."""

    def read(number: int) -> Iterator[object]:
        cache = str(cache_dir) if cache_dir else None
        dataset = wds.WebDataset(urls, shardshuffle=len(urls), seed=number, cache_dir=cache).shuffle(SHUFFLE_BUFFER)
        return iter(dataset.decode("rgb8") if is_decoded else dataset)

    return read


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def moto_server(folder: Path) -> Iterator[str]:
    """The URL of a moto server in a process of its own that holds the dataset."""
    endpoint = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
    try:
        wait_for(port)
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket=BUCKET)
        for name in open_storage(folder).list():
            # webdataset reads through curl, which signs nothing.
            client.put_object(Bucket=BUCKET, Key=name, Body=(folder / name).read_bytes(), ACL="public-read")
        yield endpoint
    finally:
        server.terminate()
        server.wait()


@contextmanager
def far_server(folder: Path) -> Iterator[str]:
    """The URL of a server in a process of its own that answers as S3 does: late, and not too fast each."""
    server = multiprocessing.get_context("spawn").Process(target=serve_far, args=(folder, port := free_port()))
    server.start()
    try:
        wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.join()


def serve_far(folder: Path, port: int) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(FAR_LATENCY_S)
        data = np.memmap(folder / request.match_info["name"], np.uint8, "r")
        wanted = request.http_range
        start, end = wanted.start or 0, min(wanted.stop or len(data), len(data))
        headers = {"Content-Length": str(end - start), "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        response = web.StreamResponse(status=206 if "Range" in request.headers else 200, headers=headers)
        await response.prepare(request)
        if request.method == "GET":
            for first in range(start, end, _FAR_CHUNK_BYTES):
                chunk = data[first : min(first + _FAR_CHUNK_BYTES, end)].tobytes()
                await response.write(chunk)
                await asyncio.sleep(len(chunk) / FAR_BYTES_PER_S)
        return response

    app = web.Application()
    app.router.add_get(f"/{BUCKET}/{{name:.+}}", answer)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


def wait_for(port: int) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"no server at port {port}")


def pair(place: str, what: str, source: str, names: list[str], cache: Path | None) -> list[Way]:
    """webdataset and ours over the same shards; `source` is a folder or the URL of a server."""
    is_decoded, is_remote = what == "decoded", source.startswith("http")
    if is_remote:
        os.environ["AWS_ENDPOINT_URL"] = source
        s3.filesystem.cache_clear()
    caches = [cache / place / what / reader if cache else None for reader in ("plain", "ours")]
    if caches[0]:
        caches[0].mkdir(parents=True)
    urls = [f"{source}/{BUCKET}/{name}" if is_remote else f"{source}/{name}" for name in names]
    uri = f"s3://{BUCKET}" if is_remote else source
    return [
        Way(place, "webdataset", what, plain(urls, is_decoded=is_decoded, cache_dir=caches[0])),
        Way(place, "ours", what, ours(uri, is_decoded=is_decoded, cache_dir=caches[1])),
    ]


def measure(ways: list[Way], passes: int, num_samples: int) -> list[list[tuple[float, float]]]:
    """Seconds, and seconds of this process's CPU, of every pass of every way, all ways in turns."""
    seconds: list[list[tuple[float, float]]] = [[] for _ in ways]
    for number in range(passes + 1):
        for way, times in zip(ways, seconds, strict=True):
            start, cpu_start = time.perf_counter(), time.process_time()
            count = sum(1 for _ in way.read(number))
            times.append((time.perf_counter() - start, time.process_time() - cpu_start))
            assert count == num_samples, (way, count)
    return seconds


def row_of(way: Way, times: list[tuple[float, float]], num_samples: int, size_bytes: int) -> dict[str, Any]:
    seconds, cpu_seconds = zip(*times, strict=True)
    fastest_s = min(seconds[1:])
    return {
        "place": way.place,
        "what": way.what,
        "reader": way.reader,
        "samples_per_s": num_samples / fastest_s,
        "mb_per_s": size_bytes / 1e6 / fastest_s,
        "first_pass_samples_per_s": num_samples / seconds[0],
        "cpu_ms_per_sample": 1e3 * min(cpu_seconds[1:]) / num_samples,
        "passes_s": seconds,
    }


def measure_all(
    scratch: Path, num_samples: int, samples_per_shard: int, passes: int
) -> tuple[list[dict[str, Any]], int]:
    """A row for every way, and the bytes of the dataset."""
    folder = scratch / "set"
    size_bytes = make_dataset(folder, num_samples, samples_per_shard)
    names = [name for name in open_storage(folder).list() if name.endswith(".tar")]
    rows = []

    def add(ways: list[Way]) -> None:
        times = measure(ways, passes, num_samples)
        rows.extend(row_of(way, seconds, num_samples, size_bytes) for way, seconds in zip(ways, times, strict=True))

    add(pair("local", "raw", str(folder), names, None) + pair("local", "decoded", str(folder), names, None))
    for place, server in (("far", far_server), ("moto", moto_server)):
        with server(folder) as endpoint:
            add(pair(place, "raw", endpoint, names, None) + pair(f"{place}, copies", "raw", endpoint, names, scratch))
    return rows, size_bytes


def main(
    num_samples: int = 384, samples_per_shard: int = 64, passes: int = 3, out: Path = Path("out/benchmarks")
) -> None:
    """Reads every sample `passes` + 1 times in each way."""
    warnings.simplefilter("ignore")
    os.environ.update(AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", AWS_DEFAULT_REGION="us-east-1")  # noqa: S106
    with tempfile.TemporaryDirectory() as scratch:
        rows, size_bytes = measure_all(Path(scratch), num_samples, samples_per_shard, passes)
    print(
        f"{num_samples} samples in shards of {samples_per_shard}, {size_bytes / 1e6:.0f} MB; fastest of {passes} passes"
    )
    print(f"{'place':14}{'what':9}{'reader':11}{'samples/s':>10}{'MB/s':>8}{'first pass':>12}{'CPU ms':>8}  ours/plain")
    for plain_row, our_row in zip(rows[::2], rows[1::2], strict=True):
        ratio = our_row["samples_per_s"] / plain_row["samples_per_s"]
        for row, last in ((plain_row, ""), (our_row, f"{ratio:.2f}")):
            print(
                f"{row['place']:14}{row['what']:9}{row['reader']:11}{row['samples_per_s']:10.0f}{row['mb_per_s']:8.0f}"
                f"{row['first_pass_samples_per_s']:12.0f}{row['cpu_ms_per_sample']:8.2f}{last:>11}"
            )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()  # noqa: S607
    about = {"num_samples": num_samples, "samples_per_shard": samples_per_shard, "size_bytes": size_bytes}
    about |= {"commit": commit, "machine": platform.machine(), "cores": os.cpu_count()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "read_shards.json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

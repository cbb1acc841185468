"""Kills at random moments (driver, worker, whole node) leave the dataset of an undisturbed run, to the last byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from pipelines.prepare import main
from sr_platform.cluster import REPOSITORY_PATH
from sr_platform.shards import read_manifest
from sr_platform.storage import Storage, open_storage

FLAGS = [
    "--samples-per-shard",
    "12",
    "--filter.min-side-px",
    "64",
    "--crop.size-px",
    "64",
    "--crop.max-per-picture",
    "4",
]


@pytest.fixture
def pictures(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(request.param):
        coarse = np.random.default_rng(index).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((192, 192), Image.Resampling.BICUBIC).save(folder / f"{index:04d}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def cluster(make_cluster: Callable[..., Any]) -> Any:
    """A head without CPUs and two nodes that can be killed."""
    return make_cluster(
        2, 2, health_check_initial_delay_ms=0, health_check_period_ms=500, health_check_failure_threshold=3
    )


class Storm:
    """Runs one command again and again and kills at random moments; once it gets done, from an empty place again."""

    def __init__(self, cluster: Any, command: list[str], out: Storage, seed: int) -> None:
        self.cluster, self.command, self.out, self.random = cluster, command, out, np.random.default_rng(seed)
        self.killed: list[str] = []
        self.exits: list[int] = []
        self.results: list[dict[str, bytes]] = []
        """Contents of every dataset that was finished."""

    def run(self, num_kills: int) -> None:
        kinds = ["driver", "worker", "node"]
        driver = None
        while len(self.killed) < num_kills:
            driver = driver or self.start()
            if self.ended(driver, self.random.uniform(0.5, 8.0)):
                driver = None
                continue
            kind = kinds[len(self.killed) % len(kinds)]
            self.kill(kind, driver)
            if kind == "driver":
                self.exits.append(driver.wait())
                driver = None
        while not self.results or not self.out.exists("manifest.json"):
            driver = driver or self.start()
            if self.ended(driver, 200, is_last=True):
                driver = None

    def start(self) -> subprocess.Popen[bytes]:
        env = {**os.environ, "RAY_ADDRESS": self.cluster.address}
        return subprocess.Popen(self.command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ended(self, driver: subprocess.Popen[bytes], seconds: float, *, is_last: bool = False) -> bool:
        """Whether the job ended by itself in that time; a finished dataset is kept in mind and cleared away."""
        try:
            self.exits.append(driver.wait(seconds))
        except subprocess.TimeoutExpired:
            assert not is_last, f"the job hangs after {self.killed}"
            return False
        if self.exits[-1] == 0:
            self.results.append(content(self.out))
            for file in [] if is_last else self.out.list():
                self.out.delete(file)
        return True

    def kill(self, kind: str, driver: subprocess.Popen[bytes]) -> None:
        if kind == "driver":
            driver.kill()
        elif kind == "worker":
            workers = self._workers()
            if not workers:
                return  # none has started yet: this moment does not count
            workers[int(self.random.integers(len(workers)))].kill()
        elif kind == "node":
            nodes = list(self.cluster.worker_nodes)
            self.cluster.remove_node(nodes[int(self.random.integers(len(nodes)))], allow_graceful=False)
            self.cluster.add_node(num_cpus=2)
        self.killed.append(kind)

    def _workers(self) -> list[psutil.Process]:
        """Processes of this cluster that run a task right now."""
        raylets = [node.all_processes["raylet"][0].process.pid for node in self.cluster.worker_nodes]
        children = [child for pid in raylets for child in psutil.Process(pid).children(recursive=True)]
        return [child for child in children if child.is_running() and "ray::" in " ".join(child.cmdline()[:1])]


def content(out: Storage) -> dict[str, bytes]:
    """What must not depend on how often the job was killed; survey.parquet and plan.json hold times of files."""
    names = [*out.list("shards/"), "manifest.json", "quarantine.jsonl", "index.parquet", "contact_sheet.png"]
    return {name: out.read_bytes(name) for name in names}


def command(pictures: str, out: str) -> list[str]:
    script = str(REPOSITORY_PATH / "pipelines" / "prepare.py")
    return [sys.executable, script, "prepare_nano.yaml", "--input", pictures, "--out", out, *FLAGS]


def assert_as_undisturbed(storm: Storm, pictures: Path, calm: Path) -> None:
    main(["prepare_nano.yaml", "--input", str(pictures), "--out", str(calm), *FLAGS])
    undisturbed = open_storage(calm)
    for result in storm.results:
        assert result | {"manifest.json": b""} == content(undisturbed) | {"manifest.json": b""}
    manifest = read_manifest(storm.out.uri)
    assert manifest.digest == read_manifest(undisturbed.uri).digest
    assert manifest.counts["pictures"] == len(list(pictures.iterdir()))
    assert storm.out.list() == undisturbed.list()
    assert not storm.out.is_local or not list(Path(storm.out.uri).rglob(".*"))
    about = {"killed": storm.killed, "exits": storm.exits, "datasets": len(storm.results), "digest": manifest.digest}
    print(json.dumps(about))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("pictures", [60], indirect=True)
def test_an_unsteady_s3_and_three_kills_leave_the_dataset_of_an_undisturbed_run(
    faulty_s3: Callable[..., Any], local_ray: None, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    through_unsteady_s3(faulty_s3(seed=7, rate=0.1), pictures, tmp_path, request, num_kills=3, seed=7)


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("pictures", [300], indirect=True)
def test_an_unsteady_s3_and_ten_kills_leave_the_dataset_of_an_undisturbed_run(
    faulty_s3: Callable[..., Any], local_ray: None, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    through_unsteady_s3(faulty_s3(seed=8, rate=0.1), pictures, tmp_path, request, num_kills=10, seed=8)


def through_unsteady_s3(
    server: Any, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest, *, num_kills: int, seed: int
) -> None:
    """From S3 to S3, on a cluster that is started when the environment points to the unsteady server."""
    for file in pictures.iterdir():
        open_storage(f"{server.uri}/pictures").write_bytes_atomic(file.name, file.read_bytes())
    cluster = request.getfixturevalue("cluster")
    out = open_storage(f"{server.uri}/data")
    storm = Storm(cluster, command(f"{server.uri}/pictures", out.uri), out, seed)
    storm.run(num_kills)
    assert server.injected, "nothing was injected"
    print(f"injected: {dict(server.injected)}")
    assert_as_undisturbed(storm, pictures, tmp_path / "calm")


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("pictures", [400], indirect=True)
@pytest.mark.parametrize("seed", [0, 1])
def test_ten_kills_leave_the_dataset_of_an_undisturbed_run(
    cluster: Any, local_ray: None, pictures: Path, tmp_path: Path, seed: int
) -> None:
    storm = Storm(cluster, command(str(pictures), str(tmp_path / "storm")), open_storage(tmp_path / "storm"), seed)
    storm.run(10)
    assert_as_undisturbed(storm, pictures, tmp_path / "calm")

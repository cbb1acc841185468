"""Kills at random moments (driver, worker, whole node) leave the dataset of an undisturbed run, to the last byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from pipelines.prepare import main
from sr_platform.cluster import REPOSITORY_PATH
from sr_platform.shards import read_manifest

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
def cluster() -> Iterator[Any]:
    """A head without CPUs and two nodes that can be killed."""
    from ray.cluster_utils import Cluster

    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": health})
    for _ in range(2):
        made.add_node(num_cpus=2)
    yield made
    made.shutdown()


class Storm:
    """Runs one command again and again and kills at random moments, until the given number of kills is done."""

    def __init__(self, cluster: Any, command: list[str], seed: int) -> None:
        self.cluster, self.command, self.random = cluster, command, np.random.default_rng(seed)
        self.killed: list[str] = []
        self.exits: list[int] = []

    def run(self, num_kills: int) -> None:
        env = {**os.environ, "RAY_ADDRESS": self.cluster.address}
        kinds = ["driver", "worker", "node"]
        for number in range(num_kills):
            driver = subprocess.Popen(self.command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            done = self._wait(driver, self.random.uniform(1.0, 9.0))
            if not done:
                self.kill(kinds[number % len(kinds)], driver)
                self._wait(driver, 6.0)
            driver.kill()
            self.exits.append(driver.wait())
        finished = subprocess.run(self.command, env=env, capture_output=True, text=True, timeout=200, check=False)
        assert finished.returncode == 0, finished.stderr[-2000:]

    def kill(self, kind: str, driver: subprocess.Popen[bytes]) -> None:
        if kind == "driver":
            driver.kill()
        elif kind == "worker" and (workers := self._workers()):
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

    @staticmethod
    def _wait(driver: subprocess.Popen[bytes], seconds: float) -> bool:
        try:
            driver.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


def content(out: Path) -> dict[str, bytes]:
    """What must not depend on how often the job was killed; survey.parquet and plan.json hold times of files."""
    files = [
        *(out / "shards").iterdir(),
        *(out / name for name in ("manifest.json", "quarantine.jsonl", "index.parquet")),
    ]
    return {file.name: file.read_bytes() for file in files}


def assert_survives(cluster: Any, pictures: Path, tmp_path: Path, *, num_kills: int, seed: int) -> None:
    args = ["prepare_nano.yaml", "--input", str(pictures), *FLAGS]
    script = str(REPOSITORY_PATH / "pipelines" / "prepare.py")
    storm = Storm(cluster, [sys.executable, script, *args, "--out", str(tmp_path / "storm")], seed)
    storm.run(num_kills)
    assert len(storm.killed) >= num_kills // 2, f"the job was done before it could be killed: {storm.exits}"
    main([*args, "--out", str(tmp_path / "calm")])
    assert content(tmp_path / "storm") == content(tmp_path / "calm")
    manifest = read_manifest(str(tmp_path / "storm"))
    assert manifest.counts["pictures"] == len(list(pictures.iterdir()))
    left_over = {path.name for path in (tmp_path / "storm").iterdir()} - {
        path.name for path in (tmp_path / "calm").iterdir()
    }
    assert left_over == set()
    print(json.dumps({"killed": storm.killed, "exits": storm.exits, "digest": manifest.digest}))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("pictures", [60], indirect=True)
def test_three_kills_leave_the_dataset_of_an_undisturbed_run(
    cluster: Any, local_ray: None, pictures: Path, tmp_path: Path
) -> None:
    assert_survives(cluster, pictures, tmp_path, num_kills=3, seed=3)


@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("pictures", [400], indirect=True)
@pytest.mark.parametrize("seed", [0, 1])
def test_ten_kills_leave_the_dataset_of_an_undisturbed_run(
    cluster: Any, local_ray: None, pictures: Path, tmp_path: Path, seed: int
) -> None:
    assert_survives(cluster, pictures, tmp_path, num_kills=10, seed=seed)

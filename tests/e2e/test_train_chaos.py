"""Lost workers, nodes and drivers, and nodes that say goodbye: training ends with the weights of an undisturbed run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from faithdiff import FaithDiffPipeline
from sr_platform.checkpoints import list_checkpoints
from sr_platform.cluster import REPOSITORY_PATH

NUM_UPDATES = 120
FLAGS = ["--size-px", "32", "--global-batch", "4", "--stage", "align", "--align.num-updates", str(NUM_UPDATES)]
FLAGS += ["--align.warmup-updates", "4", "--log-every-updates", "4", "--checkpoint-every-updates", "8"]
FLAGS += ["--max-failures", "20", "--validation.num-pictures", "1", "--validation.every-updates", "60"]


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without CPUs and two nodes that can be killed or drained."""
    from ray.cluster_utils import Cluster

    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": health})
    for _ in range(2):
        made.add_node(num_cpus=1)
    yield made
    made.shutdown()


class Training:
    """The job as its user starts it, and starts again with the same command."""

    def __init__(self, cluster: Any, data: str, out: Path, *flags: str) -> None:
        self.cluster, self.out, self.random = cluster, out, np.random.default_rng(0)
        script = str(REPOSITORY_PATH / "pipelines" / "train.py")
        self.command = [sys.executable, script, "train_nano.yaml", "--data", data, "--out", str(out), *FLAGS, *flags]
        self.driver: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # Ray looks for the workers of a lost node for so long before it goes on.
        env = {**os.environ, "RAY_ADDRESS": self.cluster.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
        with (self.out.parent / f"{self.out.name}.log").open("ab") as log:
            self.driver = subprocess.Popen(self.command, env=env, stdout=log, stderr=log)

    @property
    def update(self) -> int:
        """Of the newest checkpoint."""
        done = list_checkpoints(f"{self.out}/checkpoints/align")
        return done[-1] if done else 0

    def reach(self, update: int, timeout_s: float = 150) -> None:
        """Returns once a checkpoint of `update` or later counts."""
        assert self.driver is not None
        deadline_s = time.monotonic() + timeout_s
        while self.update < update:
            assert time.monotonic() < deadline_s, f"no checkpoint of update {update}:\n{self.log()}"
            assert self.driver.poll() is None, self.log()
            time.sleep(0.1)

    def end(self, timeout_s: float = 200) -> None:
        assert self.driver is not None
        assert self.driver.wait(timeout_s) == 0, self.log()

    def log(self) -> str:
        return (self.out.parent / f"{self.out.name}.log").read_text()[-3000:]

    def kill(self, kind: str) -> None:
        """SIGKILL for the driver, a training worker, or everything on a node that trains; a new node comes at once."""
        if kind == "driver":
            assert self.driver is not None
            self.driver.kill()
            self.driver.wait()
            self.start()
        elif kind == "worker":
            self.workers()[0].kill()
        else:
            self.cluster.remove_node(self.training_node(), allow_graceful=False)
            self.cluster.add_node(num_cpus=1)

    def workers(self) -> list[psutil.Process]:
        return [worker for node in self.cluster.list_all_nodes() for worker in self._workers_of(node)]

    def training_node(self) -> Any:
        """One of the nodes, head aside, on which a worker trains."""
        return next(node for node in list(self.cluster.worker_nodes) if self._workers_of(node))

    def _workers_of(self, node: Any) -> list[psutil.Process]:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        children = raylet.children(recursive=True)
        return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline()[:1])]


@pytest.fixture
def undisturbed(prepared_dataset: str, tmp_path: Path, local_ray: None) -> Callable[[int], dict[str, torch.Tensor]]:
    """The weights that a run without losses ends with, on so many workers."""
    from pipelines import train as job
    from pipelines.training.recipe import TrainConfig
    from sr_platform.config import load_config

    def run(num_workers: int) -> dict[str, torch.Tensor]:
        out = ["--out", str(tmp_path / f"calm-{num_workers}"), "--num-workers", str(num_workers)]
        cfg = load_config(TrainConfig, ["train_nano.yaml", "--data", prepared_dataset, *FLAGS, *out], job="train")
        return weights(Path(job.train(cfg).model_uri))

    return run


def weights(model: Path) -> dict[str, torch.Tensor]:
    return dict(FaithDiffPipeline.from_pretrained(model).unet.alignment.state_dict())


def learnt_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Length of the difference between both, by the length of what `expected` learnt."""
    start = FaithDiffPipeline.from_pretrained("nano").unet.alignment.state_dict()
    flat = [torch.cat([model[name].flatten() for name in start]).double() for model in (actual, expected, start)]
    return float((flat[0] - flat[1]).norm() / (flat[1] - flat[2]).norm())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_lost_worker_driver_and_node_leave_the_weights_of_an_undisturbed_run_bit_for_bit(
    cluster, undisturbed, prepared_dataset: str, tmp_path: Path
) -> None:
    training = Training(cluster, prepared_dataset, tmp_path / "storm", "--num-workers", "2")
    storm(training, ["worker", "driver", "node"])
    assert_bit_equal(training, undisturbed(2))


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_losses_leave_the_weights_of_an_undisturbed_run_bit_for_bit(
    cluster, undisturbed, prepared_dataset: str, tmp_path: Path, seed: int
) -> None:
    training = Training(cluster, prepared_dataset, tmp_path / "storm", "--num-workers", "2")
    training.random = np.random.default_rng(seed)
    storm(training, ["worker", "driver", "node", "worker", "node", "worker", "driver", "node", "worker", "driver"])
    assert_bit_equal(training, undisturbed(2))


def storm(training: Training, kinds: list[str]) -> None:
    """One loss of each kind at a random update, the next one only after training has come further again."""
    training.start()
    reached = 0
    share = NUM_UPDATES // (len(kinds) + 1)
    for kind in kinds:
        training.reach(reached + 1)
        time.sleep(training.random.uniform(0, 0.5))
        reached = max(training.update, reached + int(training.random.integers(1, share)))
        training.kill(kind)
    training.end()


def assert_bit_equal(training: Training, expected: dict[str, torch.Tensor]) -> None:
    actual = weights(training.out / "models" / "align")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())
    assert list_checkpoints(f"{training.out}/checkpoints/align") == [NUM_UPDATES - 8, NUM_UPDATES]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_node_that_says_goodbye_is_left_with_a_checkpoint_and_training_goes_on_with_fewer_workers(
    cluster, undisturbed, prepared_dataset: str, tmp_path: Path
) -> None:
    """With no failure allowed, and long before the notice has run out."""
    flags = ["--num-workers", "2", "--min-workers", "1", "--max-failures", "0", "--keep-checkpoints", "99"]
    training = Training(cluster, prepared_dataset, tmp_path / "drain", *flags, "--checkpoint-every-updates", "40")
    training.start()
    training.reach(40)
    drain(cluster, training.training_node(), notice_s=600)
    started_s = time.monotonic()
    training.end()
    assert time.monotonic() - started_s < 300
    saved = list_checkpoints(f"{training.out}/checkpoints/align")
    parting = [update for update in saved if update % 40]
    assert len(parting) == 1, saved
    sizes = {update: world_size(training, update) for update in saved}
    assert sizes[40] == sizes[parting[0]] == 2
    assert sizes[NUM_UPDATES] == 1
    actual = weights(training.out / "models" / "align")
    # AdamW turns gradients that are mere rounding noise into whole steps: weights agree to a share of what was learnt.
    assert learnt_difference(actual, undisturbed(2)) < 2e-2


def drain(cluster: Any, node: Any, *, notice_s: int) -> None:
    """What a spot notice becomes: the node takes nothing new and will be gone when the notice has run out."""
    import ray
    from ray._raylet import GcsClient

    reason = ray.core.generated.autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + notice_s) * 1000)
    GcsClient(address=cluster.address).drain_node(node.node_id, reason, "spot notice", deadline_ms)


def world_size(training: Training, update: int) -> int:
    """How many workers wrote a checkpoint."""
    folder = training.out / "checkpoints" / "align" / f"update_{update:08d}"
    names = [name.name for name in folder.glob("*.safetensors")]
    return int(names[0].split("-of-")[1].split(".")[0])

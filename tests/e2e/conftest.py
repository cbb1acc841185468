"""A training as its user starts it, on a cluster that loses what is killed, and the same one left in peace; the service
behind HAProxy, as clusters serve it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from faithdiff import FaithDiffPipeline
from sr_platform.checkpoints import list_checkpoints
from sr_platform.cluster import REPOSITORY_PATH
from sr_platform.storage import open_storage


@pytest.fixture
def lone_node_cluster(make_cluster: Callable[..., Any]) -> Any:
    """A head without CPUs, where the driver lives, and one node that can be killed or drained."""
    return make_cluster(
        1, health_check_initial_delay_ms=0, health_check_period_ms=500, health_check_failure_threshold=3
    )


@pytest.fixture
def cluster(lone_node_cluster: Any) -> Any:
    """The same with two nodes."""
    lone_node_cluster.add_node(num_cpus=1)
    return lone_node_cluster


class Training:
    """The job as its user starts it, and starts again with the same command."""

    def __init__(self, cluster: Any, flags: list[str], out: str, log_path: Path) -> None:
        self.cluster, self.out, self.log_path, self.random = cluster, out, log_path, np.random.default_rng(0)
        script = str(REPOSITORY_PATH / "pipelines" / "train.py")
        self.command = [sys.executable, script, "train_nano.yaml", *flags, "--out", out]
        self.checkpoints = f"{out}/checkpoints/align"
        self.driver: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # Ray looks for the workers of a lost node for so long before it goes on.
        env = {**os.environ, "RAY_ADDRESS": self.cluster.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
        with self.log_path.open("ab") as log:
            self.driver = subprocess.Popen(self.command, env=env, stdout=log, stderr=log)

    @property
    def update(self) -> int:
        """Of the newest checkpoint."""
        done = list_checkpoints(self.checkpoints)
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
        return self.log_path.read_text()[-3000:]

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

    def drain(self, node: Any, *, notice_s: int) -> None:
        """What a spot notice becomes: the node takes nothing new and will be gone when the notice has run out."""
        import ray
        from ray._raylet import GcsClient

        reason = ray.core.generated.autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + notice_s) * 1000)
        GcsClient(address=self.cluster.address).drain_node(node.node_id, reason, "spot notice", deadline_ms)

    def parting_update(self, every: int, timeout_s: float = 60) -> int:
        """The checkpoint that was not due, once it is there; there is no other."""
        deadline_s = time.monotonic() + timeout_s
        while not (parting := [update for update in list_checkpoints(self.checkpoints) if update % every]):
            assert time.monotonic() < deadline_s, self.log()
            time.sleep(0.2)
        assert len(parting) == 1, parting
        return parting[0]

    def workers(self) -> list[psutil.Process]:
        return [worker for node in self.cluster.list_all_nodes() for worker in self._workers_of(node)]

    def training_node(self) -> Any:
        """One of the nodes, head aside, on which a worker trains."""
        return next(node for node in list(self.cluster.worker_nodes) if self._workers_of(node))

    def world_size(self, update: int) -> int:
        """How many workers wrote a checkpoint."""
        names = open_storage(self.checkpoints).list(f"update_{update:08d}/")
        part = next(name for name in names if name.endswith(".safetensors"))
        return int(part.split("-of-")[1].split(".")[0])

    def _workers_of(self, node: Any) -> list[psutil.Process]:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        children = raylet.children(recursive=True)
        return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline()[:1])]


@pytest.fixture
def training(prepared_dataset: str, tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """`training(cluster, flags)`: a Training in `tmp_path / "storm"`, or at the URI `out`, that is not started yet."""
    made: list[Training] = []

    def make(cluster: Any, flags: list[str], out: str | None = None) -> Training:
        flags = ["--data", prepared_dataset, *flags]
        made.append(Training(cluster, flags, out or str(tmp_path / "storm"), tmp_path / "storm.log"))
        return made[-1]

    yield make
    for job in made:
        if job.driver is not None and job.driver.poll() is None:
            job.driver.kill()
            job.driver.wait()


@pytest.fixture(scope="session")
def undisturbed(
    prepared_dataset: str, tmp_path_factory: pytest.TempPathFactory, local_ray: None
) -> Callable[[list[str]], Any]:
    """`undisturbed(flags)`: the TrainResult of a run without losses, made once, in a folder of its own."""
    from pipelines import train as job
    from pipelines.training.recipe import TrainConfig
    from sr_platform.config import load_config

    made: dict[tuple[str, ...], Any] = {}

    def run(flags: list[str]) -> Any:
        if tuple(flags) not in made:
            out = str(tmp_path_factory.mktemp("calm"))
            args = ["train_nano.yaml", "--data", prepared_dataset, *flags, "--out", out]
            with pytest.MonkeyPatch.context() as patch:
                patch.delenv("MLFLOW_TRACKING_URI", raising=False)
                made[tuple(flags)] = job.train(load_config(TrainConfig, args, job="train"))
        return made[tuple(flags)]

    return run


@pytest.fixture(scope="session")
def trained_weights() -> Callable[[str | Path], dict[str, torch.Tensor]]:
    """`trained_weights(folder)`: what stage align trains, of a model."""
    return _trained_weights


def _trained_weights(model: str | Path) -> dict[str, torch.Tensor]:
    return dict(FaithDiffPipeline.from_pretrained(model).unet.alignment.state_dict())


@pytest.fixture(scope="session")
def learnt_difference() -> Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], float]:
    """`learnt_difference(actual, expected)`: length of the difference, by the length of what `expected` learnt."""

    def measure(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
        start = _trained_weights("nano")
        flat = [torch.cat([model[name].flatten() for name in start]).double() for model in (actual, expected, start)]
        return float((flat[0] - flat[1]).norm() / (flat[1] - flat[2]).norm())

    return measure


@pytest.fixture
def haproxy_variables() -> Iterator[dict[str, str]]:
    """What makes Ray's processes serve behind HAProxy, with ports and files that no other HAProxy here has."""
    # A short name, for sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="ha_", ignore_cleanup_errors=True) as folder:
        yield {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port()),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
            # No load balancer in front has to hear of a gateway that leaves.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        }


@pytest.fixture
def served_behind_haproxy(haproxy_variables: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., str]]:
    """`served_behind_haproxy(settings)`: the address of the application on a Ray of its own."""
    script = Path(__file__).with_name("serve_application.py")

    @contextmanager
    def service(settings: dict[str, Any]) -> Iterator[str]:
        command = [sys.executable, str(script), json.dumps(settings)]
        env, pipe = os.environ | haproxy_variables, subprocess.PIPE
        with (tmp_path / "service.log").open("w+") as log:
            process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=log, text=True)
            try:
                assert process.stdout is not None
                address = next((line.split()[-1] for line in process.stdout if line.startswith("serving at ")), "")
                assert address, (tmp_path / "service.log").read_text()[-3000:]
                yield address
            finally:
                process.communicate(timeout=120)

    with ExitStack() as stack:
        yield lambda settings: stack.enter_context(service(settings))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port

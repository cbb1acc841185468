"""Fixtures of all tests: the environment of a local Ray, golden tensors and the weights they were made with."""

from __future__ import annotations

import os

# Before anything imports torch: Ray's workers count on one thread, and sums over more threads round otherwise.
# Before anything imports Ray: loopback only, fast polling, no token file in the home folder.
os.environ.update(
    OMP_NUM_THREADS="1",
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_USAGE_STATS_ENABLED="0",
    # Also where Ray is imported first: beside two busy tests, workers that give way would hardly ever run.
    RAY_worker_niceness="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="60",
    RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S="60",
    MLFLOW_DISABLE_TELEMETRY="true",
    HF_HUB_OFFLINE="1",
)

import contextlib
import http.client
import http.server
import io
import json
import math
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

GOLDEN_PATH = Path(__file__).parent / "golden"
GOLDEN_SOURCES: dict[int, tuple[str, str]] = {}
GOLDEN_ERRORS: dict[tuple[str, str], tuple[float, float]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-report", metavar="FILE", help="write the errors against the golden tensors as a table")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Processes share the tests: all that start a Ray go to one of them and come first, others go file by file.

    A file that names its own group has its reasons.
    """

    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            group = "ray" if item.get_closest_marker("ray") else item.location[0]
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    if getattr(session.config.option, "loadgroup", False):
        assert all("@" in item.nodeid for item in session.items), "xdist has read no groups"


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--golden-report")
    if path is None:
        return
    lines = [
        "| golden case | worst tensor | largest absolute error | relative to the largest value |",
        "|---|---|---|---|",
    ]
    for case in sorted({case for case, _ in GOLDEN_ERRORS}):
        errors = {name: error for (of_case, name), error in GOLDEN_ERRORS.items() if of_case == case}
        worst = max(errors, key=lambda name: errors[name][1])
        largest_absolute = max(absolute for absolute, _ in errors.values())
        lines.append(f"| {case} | {worst} | {largest_absolute:.1e} | {errors[worst][1]:.1e} |")
    Path(path).write_text("\n".join(lines) + "\n")


class Golden(dict[str, torch.Tensor]):
    """One golden case: its tensors by name, and `about`, the json that describes them."""

    def __init__(self, case: str) -> None:
        tensors_path = GOLDEN_PATH / f"{case}.safetensors"
        super().__init__(load_file(tensors_path) if tensors_path.exists() else {})
        GOLDEN_SOURCES.update({tensor.data_ptr(): (case, name) for name, tensor in self.items()})
        self.about: dict[str, Any] = json.loads((GOLDEN_PATH / f"{case}.json").read_text())

    def max_error(self, name: str, actual: torch.Tensor) -> float:
        """max |actual - tensor of that name|, kept for the report of golden errors."""
        relative_error(actual, self[name])
        return (actual.double() - self[name].double()).abs().max().item()


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """`golden("case01_lq_encoder")["feat_64x64"]`; `.about` is its json. Cases stay loaded for the session."""
    return lru_cache(Golden)


def recipe_tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The golden recipe: every weight is a formula of its released key name and shape (tests/golden/README.md)."""
    seed = zlib.crc32(key.encode())
    z = np.random.RandomState(seed).standard_normal(math.prod(shape)).reshape(shape)
    if len(shape) >= 2:
        value = z / math.sqrt(math.prod(shape[1:]))
    else:
        value = 1 + 0.1 * z if key.endswith("weight") else 0.05 * z
    return torch.from_numpy(value.astype(np.float32))


@pytest.fixture(scope="session")
def golden_weight() -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """`golden_weight("conv_in.weight", (320, 4, 3, 3))` -> the weight the golden tensors were made with."""
    return recipe_tensor


@pytest.fixture(scope="session")
def fill_recipe() -> Callable[[torch.nn.Module, str], torch.nn.Module]:
    """`fill_recipe(vae, "vae.")` fills a module with recipe weights under `prefix + its own key`, in place."""

    def fill(module: torch.nn.Module, prefix: str) -> torch.nn.Module:
        state = module.state_dict()
        filled = {k: recipe_tensor(prefix + k, tuple(v.shape)) for k, v in state.items() if v.is_floating_point()}
        module.load_state_dict(filled, strict=False)
        return module

    return fill


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected| / max |expected|, the measure of the golden tolerances."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    absolute = (actual.double() - expected.double()).abs().max().item()
    relative = absolute / expected.double().abs().max().item()
    source = GOLDEN_SOURCES.get(expected.data_ptr())
    if source is not None and expected.dtype == actual.dtype:
        GOLDEN_ERRORS[source] = max(GOLDEN_ERRORS.get(source, (0.0, 0.0)), (absolute, relative))
    return relative


@pytest.fixture(scope="session")
def rel_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    return relative_error


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray for the whole session, with more logical CPUs than cores: every waiting actor takes one."""
    from sr_platform import cluster

    with cluster.connected(num_cpus=6, local=True):
        yield


@pytest.fixture
def make_cluster() -> Iterator[Callable[..., Any]]:
    """`make_cluster(num_nodes, num_cpus, **head)`: a head without CPUs and nodes that can be killed or drained."""
    from ray.cluster_utils import Cluster

    made = []

    def make(num_nodes: int, num_cpus: int = 1, **system_config: Any) -> Any:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": system_config})
        made.append(cluster)
        for _ in range(num_nodes):
            cluster.add_node(num_cpus=num_cpus)
        return cluster

    yield make
    for cluster in made:
        shut_down(cluster)


def shut_down(cluster: Any) -> None:
    """Ends the cluster and nothing else: Ray forgets the store of whatever this process is connected to, too."""
    import ray
    from ray.experimental import internal_kv

    cluster.shutdown()
    if ray.is_initialized():
        internal_kv._initialize_internal_kv(ray._private.worker.global_worker.gcs_client)


@pytest.fixture(scope="session")
def lone_process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A gloo process group of this process alone: DeepSpeed works in it, and needs it to last once it has seen it."""
    store = f"file://{tmp_path_factory.mktemp('group') / 'store'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        # Ray's local mode would end it after every run, but DeepSpeed remembers its groups per process.
        patch.setattr(torch.distributed, "destroy_process_group", lambda: None)
        yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of a real S3 server on loopback that lives as long as the session."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


AWS_ACCOUNT = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}


@lru_cache
def s3_client(endpoint: str) -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=endpoint, **AWS_ACCOUNT)


def new_bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """s3://bucket of a fresh bucket, with the environment that s3fs reads."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    s3_client(endpoint).create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture
def s3_uri(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """s3://bucket of a fresh bucket, with the environment that s3fs reads."""
    return new_bucket(s3_endpoint, monkeypatch)


S3_ERRORS = {"500": "InternalError", "503": "SlowDown"}


class FaultyS3:
    """A proxy on loopback before a real S3 server, which spoils requests at a given rate.

    `injected` counts what was done, by (method, fault). Faults, drawn one after the other from `seed`:
    500         refused before the server saw it, as an internal error
    503         refused before the server saw it: SlowDown
    reset       the connection is reset before the server saw the request
    lost        the server did as asked, and the connection is cut before its answer
    cut         the connection is cut in the middle of the answer's body
    short       a read's body is cut and its Content-Length with it; only Content-Range still tells
    """

    FAULTS = ("500", "503", "reset", "lost", "cut", "short")

    def __init__(self, endpoint: str, *, seed: int = 0, rate: float = 0.2, faults: Sequence[str] = FAULTS) -> None:
        self.target = urlsplit(endpoint).netloc
        self.rate, self.faults = rate, faults
        self.injected: Counter[tuple[str, str]] = Counter()
        self.num_requests = 0
        self._rng, self._lock = np.random.default_rng(seed), threading.Lock()
        handler = type("Handler", (FaultyRequest,), {"proxy": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.uri = ""
        """s3://bucket of a fresh bucket behind the proxy."""
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def draw(self, method: str) -> str:
        """The fault of the next request; empty for none."""
        with self._lock:
            self.num_requests += 1
            chance, which = self._rng.random(), int(self._rng.integers(len(self.faults)))
            fault = self.faults[which] if chance < self.rate else ""
            if fault == "short" and method != "GET":
                fault = "lost"
            if fault:
                self.injected[method, fault] += 1
            return fault

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class FaultyRequest(http.server.BaseHTTPRequestHandler):
    """One request on its way through the proxy."""

    proxy: FaultyS3
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client gave up
            super().handle()

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.draw(self.command)
        if fault in S3_ERRORS:
            text = f"<?xml version='1.0'?><Error><Code>{S3_ERRORS[fault]}</Code></Error>".encode()
            self.answer(int(fault), [("Content-Type", "application/xml")], text)
        elif fault == "reset":
            self.reset()
        else:
            status, headers, data = self.ask(body)
            if fault == "lost" or (fault in ("cut", "short") and len(data) < 2):
                self.reset()
            elif fault == "short":
                self.answer(status, headers, data[: len(data) // 2])
            else:
                self.answer(status, headers, data, is_cut=fault == "cut")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward  # noqa: N815

    def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The server's answer."""
        connection = http.client.HTTPConnection(self.proxy.target, timeout=60)
        connection.request(self.command, self.path, body=body, headers=dict(self.headers.items()))
        response = connection.getresponse()
        data = response.read()
        connection.close()
        return response.status, response.getheaders(), data

    def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, *, is_cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = str(len(data))
        if self.command == "HEAD":
            length = next((value for name, value in headers if name.lower() == "content-length"), "0")
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if is_cut else data)
        if is_cut:
            self.wfile.flush()
            self.close_connection = True

    def reset(self) -> None:
        """No farewell: the client sees "connection reset by peer"."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def forgetful_s3() -> Iterator[Callable[[], None]]:
    """`forgetful_s3()`: S3 settings of the environment are read anew, which a process does once; at the end, too."""
    from sr_platform import s3

    yield s3.filesystem.cache_clear
    s3.filesystem.cache_clear()


@pytest.fixture
def faulty_s3(
    s3_endpoint: str, forgetful_s3: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., FaultyS3]]:
    """`faulty_s3(seed=1, rate=0.2)`: a running FaultyS3 with a fresh bucket, which the environment now points to."""
    running: list[FaultyS3] = []

    def start(**kwargs: Any) -> FaultyS3:
        proxy = FaultyS3(s3_endpoint, **kwargs)
        running.append(proxy)
        proxy.uri = new_bucket(s3_endpoint, monkeypatch)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        forgetful_s3()
        return proxy

    yield start
    for proxy in running:
        proxy.stop()


@pytest.fixture
def faulty_s3_uri(faulty_s3: Callable[..., FaultyS3]) -> str:
    """s3://bucket on a server that spoils every fifth request."""
    return faulty_s3().uri


class MlflowServer:
    """One server at `uri`, with its database and artefacts in `path`; it comes back where it was."""

    def __init__(self, path: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        self._command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{path}/server.db"]
        self._command += ["--artifacts-destination", str(path / "artifacts")]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once the server answers; one that runs already is left alone."""
        if self._process is None:
            # A session of its own, so that its worker can be killed with it.
            env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self._process = subprocess.Popen(self._command, env=env, start_new_session=True)
            self._wait_until_healthy(self._process)

    def kill(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait(timeout=20)
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            assert process.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("the server did not answer within 60 s")


@pytest.fixture(scope="session")
def _mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def mlflow_server(_mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    """The running server of the session, which MLFLOW_TRACKING_URI names; a test that kills it is tidied up after."""
    _mlflow_server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", _mlflow_server.uri)
    return _mlflow_server


@pytest.fixture(scope="session")
def prepared_dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a finished dataset: two shards of 6 samples, hq 64 x 72 px of smooth noise, with captions."""
    from sr_platform.publication import commit_dataset, publish_shard
    from sr_platform.storage import open_storage

    def png(picture: Image.Image) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()

    storage, rng, reports = open_storage(tmp_path_factory.mktemp("prepared")), np.random.default_rng(0), []
    for shard in range(2):
        samples = []
        for i in range(6):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
            hq, lq = coarse.resize((72, 64), Image.Resampling.BICUBIC), coarse.resize((18, 16))
            about = json.dumps({"caption": f"picture {i} of shard {shard}"}).encode()
            samples.append((f"s{shard}-{i}", {"hq.png": png(hq), "lq.png": png(lq), "json": about}))
        reports.append(publish_shard(storage, name="train", index=shard, samples=samples))
    commit_dataset(storage, reports, recipe={"name": "tiny"}, sources=[], counts={})
    return storage.uri

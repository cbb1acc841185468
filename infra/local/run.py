"""The platform on this machine, without Kubernetes: S3, MLflow, Ray, the endpoint, Prometheus and Grafana, on loopback.

    python infra/local/run.py --out out/local
    source out/local/environment          # in another shell: addresses and keys for ray, mlflow, aws and the jobs

Stays in the foreground; Ctrl-C stops everything that it started, and nothing else. S3 is moto's server, whose objects
are gone with it. Prometheus and Grafana start where they are installed. A port of 0 takes a free one.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pydantic
import yaml

from sr_platform.cluster import REPOSITORY_PATH
from sr_platform.config import StrictConfig, load_config, run_job
from sr_platform.errors import RequestError

BUCKETS = ("data", "checkpoints", "results")
BIN_PATH = Path(sys.executable).parent
_LOOK_EVERY_S = 0.2
_STOP_WITHIN_S = 15.0


class LocalConfig(StrictConfig):
    """Nothing has to be set."""

    out: Path = Path("out/local")
    """Folder of databases, logs and the file `environment`."""
    model: str = "nano"
    """What the endpoint serves: a preset, a folder, or models:/name@alias."""
    num_cpus: pydantic.PositiveInt = max(8, os.cpu_count() or 1)
    """Logical CPUs of Ray: every waiting actor takes one."""
    gateway_port: pydantic.NonNegativeInt = 8000
    dashboard_port: pydantic.NonNegativeInt = 8265
    mlflow_port: pydantic.NonNegativeInt = 5000
    s3_port: pydantic.NonNegativeInt = 9000
    prometheus_port: pydantic.NonNegativeInt = 9090
    grafana_port: pydantic.NonNegativeInt = 3000
    start_timeout_s: pydantic.PositiveFloat = 240.0
    """How long each part may take to answer."""


class Failed(RuntimeError):  # noqa: N818 - says what happened
    """A part did not start, or ended."""


class Parts:
    """Programs in the order in which they were started; the last one is stopped first."""

    def __init__(self, out: Path, timeout_s: float) -> None:
        self._out, self._timeout_s = out, timeout_s
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    @contextmanager
    def part(self, name: str, command: Sequence[str | Path], env: dict[str, str], health: str) -> Iterator[None]:
        """`command` runs inside the block, once `health` answers; its output goes to `out/<name>.log`."""
        with (self._out / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - our own programs
                [str(word) for word in command], env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.running[name] = process
        try:
            self._wait(name, process, health, env)
            print(f"local: {name} answers at {health}", flush=True)
            yield
        finally:
            del self.running[name]
            _end(process)

    def check(self) -> None:
        """Raises Failed when a part has ended by itself."""
        for name, process in self.running.items():
            if process.poll() is not None:
                raise Failed(f"local: {name} ended with status {process.returncode}; see {self._out / name}.log")

    def _wait(self, name: str, process: subprocess.Popen[bytes], health: str, env: dict[str, str]) -> None:
        give_up_s = time.monotonic() + self._timeout_s
        headers = {"Authorization": f"Bearer {env['RAY_AUTH_TOKEN']}"}
        while not _answers(health, headers):
            self.check()
            if time.monotonic() > give_up_s:
                raise Failed(f"local: {name} did not answer at {health}; see {self._out / name}.log")
            time.sleep(_LOOK_EVERY_S)


def _answers(url: str, headers: dict[str, str]) -> bool:
    try:
        return httpx.get(url, headers=headers, timeout=5).status_code < 400
    except httpx.TransportError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL to whatever of its children is left."""
    if process.poll() is not None:
        return
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs([psutil.Process(process.pid), *started], timeout=_STOP_WITHIN_S)
    for straggler in left:
        straggler.kill()
    process.wait(timeout=_STOP_WITHIN_S)


def free_port(wanted: int) -> int:
    """`wanted`, or one that is free for 0.

    Raises:
        RequestError: somebody else has it.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise RequestError(f"local: port {wanted} is taken; give another, or 0 for one that is free") from error
        port: int = listener.getsockname()[1]
        return port


def ports_of(cfg: LocalConfig) -> dict[str, int]:
    """Of every part, checked before anything is started."""
    names = [name for name in LocalConfig.model_fields if name.endswith("_port")]
    return {name.removesuffix("_port"): free_port(getattr(cfg, name)) for name in names}


def addresses(ports: dict[str, int]) -> dict[str, str]:
    """What jobs and people need, as variables. The token is new with every start."""
    return {
        "RAY_ADDRESS": f"http://127.0.0.1:{ports['dashboard']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports['mlflow']}",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
        "AWS_ACCESS_KEY_ID": "local",
        "AWS_SECRET_ACCESS_KEY": "local",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def write_environment(path: Path, variables: dict[str, str]) -> None:
    """For `source`; it holds the token, so that nobody else may read it."""
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text("".join(f"export {name}={value}\n" for name, value in variables.items()))


def serve_config(cfg: LocalConfig, ports: dict[str, int]) -> dict[str, Any]:
    """serve/app.yaml with this machine's port, model, job database and bucket."""
    config: dict[str, Any] = yaml.safe_load((REPOSITORY_PATH / "serve" / "app.yaml").read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": ports["gateway"]}
    arguments = config["applications"][0]["args"]
    arguments["model"] = cfg.model
    arguments["gateway"] |= {
        "store_url": f"sqlite:///{cfg.out.resolve() / 'jobs.db'}",
        "storage_uri": "s3://results/serving",
    }
    return config


def prometheus_config(ports: dict[str, int]) -> dict[str, Any]:
    """Scrapes the gateway under the name that the alerts use."""
    target = {"targets": [f"127.0.0.1:{ports['gateway']}"]}
    return {
        "global": {"scrape_interval": "5s", "evaluation_interval": "5s"},
        "rule_files": [str(REPOSITORY_PATH / "infra" / "dashboards" / "alerts.yaml")],
        "scrape_configs": [{"job_name": "faithdiff", "static_configs": [target]}],
    }


def make_buckets(variables: dict[str, str]) -> None:
    """On the S3 server that was just started."""
    import boto3

    keys = {"aws_access_key_id": "local", "aws_secret_access_key": "local", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=variables["AWS_ENDPOINT_URL"], **keys)
    for bucket in BUCKETS:
        client.create_bucket(Bucket=bucket)


def ray_command(cfg: LocalConfig, ports: dict[str, int], session_path: str) -> list[str | Path]:
    # Not Ray's usual folder: a Ray that somebody else starts here would find this one there and join it.
    return [
        *(BIN_PATH / "ray", "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={cfg.num_cpus}"),
        *(f"--port={free_port(0)}", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports['dashboard']}"),
        *(f"--dashboard-agent-listen-port={free_port(0)}", f"--ray-client-server-port={free_port(0)}"),
        *("--min-worker-port=0", "--max-worker-port=0", "--node-ip-address=127.0.0.1", f"--temp-dir={session_path}"),
    ]


def mlflow_command(cfg: LocalConfig, ports: dict[str, int]) -> list[str | Path]:
    out = cfg.out.resolve()
    store = [f"--backend-store-uri=sqlite:///{out / 'mlflow.db'}", f"--artifacts-destination={out / 'artifacts'}"]
    return [BIN_PATH / "mlflow", "server", "--host=127.0.0.1", f"--port={ports['mlflow']}", "--workers=1", *store]


def write_grafana(folder: Path, ports: dict[str, int]) -> dict[str, str]:
    """Data source and dashboards as Grafana provisions them; returns its settings."""
    source = {"name": "Prometheus", "type": "prometheus", "url": f"http://127.0.0.1:{ports['prometheus']}"}
    dashboards = {"path": str(REPOSITORY_PATH / "infra" / "dashboards")}
    files = {
        "datasources/local.yaml": {"apiVersion": 1, "datasources": [source | {"isDefault": True}]},
        "dashboards/local.yaml": {"apiVersion": 1, "providers": [{"name": "faithdiff", "options": dashboards}]},
    }
    for name, content in files.items():
        path = folder / "provisioning" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    settings = {"SERVER_HTTP_ADDR": "127.0.0.1", "SERVER_HTTP_PORT": str(ports["grafana"])}
    settings |= {"PATHS_DATA": str(folder / "data"), "PATHS_PROVISIONING": str(folder / "provisioning")}
    return {f"GF_{name}": value for name, value in settings.items()}


def start_monitoring(stack: ExitStack, parts: Parts, cfg: LocalConfig, ports: dict[str, int], env: Any) -> None:
    """Prometheus, and Grafana on top of it, where they are installed."""
    out = cfg.out.resolve()
    if shutil.which("prometheus") is None:
        print("local: prometheus is not installed; there are no dashboards and alerts", flush=True)
        return
    (out / "prometheus.yml").write_text(yaml.safe_dump(prometheus_config(ports)))
    address = f"127.0.0.1:{ports['prometheus']}"
    command: list[str | Path] = [
        "prometheus",
        f"--config.file={out / 'prometheus.yml'}",
        f"--storage.tsdb.path={out / 'prometheus'}",
    ]
    command.append(f"--web.listen-address={address}")
    stack.enter_context(parts.part("prometheus", command, env, f"http://{address}/-/ready"))
    if shutil.which("grafana-server") is None:
        print("local: grafana-server is not installed; dashboards are in infra/dashboards", flush=True)
        return
    settings = env | write_grafana(out / "grafana", ports)
    server: list[str | Path] = ["grafana-server", "--homepath", os.environ.get("GRAFANA_HOME", "/usr/share/grafana")]
    stack.enter_context(parts.part("grafana", server, settings, f"http://127.0.0.1:{ports['grafana']}/api/health"))


def deploy(cfg: LocalConfig, ports: dict[str, int], env: dict[str, str], parts: Parts) -> None:
    """The application, by the same configuration file that a cluster gets; waits until a picture could be restored."""
    path = cfg.out / "serve.yaml"
    path.write_text(yaml.safe_dump(serve_config(cfg, ports)))
    command = [BIN_PATH / "serve", "deploy", path, "--address", env["RAY_ADDRESS"]]
    words = [str(word) for word in command]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=180)  # noqa: S603 - our own program
    if done.returncode:
        raise Failed(f"local: serve deploy: {done.stderr[-2000:]}")
    url, give_up_s = f"http://127.0.0.1:{ports['gateway']}/readyz", time.monotonic() + cfg.start_timeout_s
    while not _answers(url, {}):
        parts.check()
        if time.monotonic() > give_up_s:
            raise Failed(f"local: the endpoint is not ready at {url}; see {env['RAY_ADDRESS']} and {cfg.out}/ray.log")
        time.sleep(_LOOK_EVERY_S)
    print(f"local: the endpoint is ready at http://127.0.0.1:{ports['gateway']}", flush=True)


@contextmanager
def platform(cfg: LocalConfig) -> Iterator[Parts]:
    """Everything runs inside the block."""
    cfg.out.mkdir(parents=True, exist_ok=True)
    ports = ports_of(cfg)
    variables = addresses(ports)
    path = os.pathsep.join([str(REPOSITORY_PATH / "platform"), str(REPOSITORY_PATH)])
    programs = f"{BIN_PATH}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | variables | {"PYTHONPATH": path, "PATH": programs, "MLFLOW_DISABLE_TELEMETRY": "true"}
    # The head itself must not look for another Ray.
    head_env = {name: value for name, value in env.items() if name != "RAY_ADDRESS"}
    parts = Parts(cfg.out, cfg.start_timeout_s)
    with ExitStack() as stack:
        s3: list[str | Path] = [BIN_PATH / "moto_server", "-H", "127.0.0.1", "-p", str(ports["s3"])]
        stack.enter_context(parts.part("s3", s3, env, f"{variables['AWS_ENDPOINT_URL']}/moto-api/"))
        make_buckets(variables)
        health = f"{variables['MLFLOW_TRACKING_URI']}/health"
        stack.enter_context(parts.part("mlflow", mlflow_command(cfg, ports), env, health))
        # Short, because sockets lie in it.
        session_path = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray_", ignore_cleanup_errors=True))
        head = ray_command(cfg, ports, session_path)
        stack.enter_context(parts.part("ray", head, head_env, f"{variables['RAY_ADDRESS']}/api/jobs/"))
        deploy(cfg, ports, env, parts)
        start_monitoring(stack, parts, cfg, ports, env)
        write_environment(cfg.out / "environment", variables)
        stack.callback((cfg.out / "environment").unlink, missing_ok=True)
        (cfg.out / "ports.json").write_text(json.dumps(ports))
        yield parts


def main(argv: Sequence[str]) -> None:
    cfg = load_config(
        LocalConfig, argv, job="local", description=__doc__ or "", recipe=False, prog="python infra/local/run.py"
    )
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    with platform(cfg) as parts:
        print(
            f"local: everything runs; in another shell: source {cfg.out / 'environment'}. Ctrl-C stops it.", flush=True
        )
        while not stopping.wait(_LOOK_EVERY_S):
            parts.check()
    print("local: everything is stopped", flush=True)


if __name__ == "__main__":
    run_job(main)

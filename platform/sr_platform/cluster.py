"""Connects to a Ray cluster or starts a local one; the runtime environment of every job is written here, once.

Importing this module sets the variables that Ray reads at import: import it before `ray`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sr_platform.mlflow_client import hide_credentials, public_uri

_RAY_ENVIRONMENT = {
    # Explicit, because Ray's own default depends on whether ~/.ray/auth_token exists.
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's defaults wait 30 minutes before they say that a pipeline is starved of CPUs.
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "120",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    # By default workers give way to whatever else wants a core, Ray's own processes and the driver included: a training
    # worker that uses all cores lost a seventh of its speed to that.
    "RAY_worker_niceness": "0",
    # Without this, a driver that was started by `uv run` would replace every worker's interpreter.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # `ray job submit` and the driver both set PYTHONPATH; without this Ray refuses to connect the driver.
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
}
_FORWARDED = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_PROFILE")
REPOSITORY_PATH = Path(__file__).resolve().parents[2]
_EXCLUDES = [".venv", ".git", ".env", "out", "tests", "*.tar", "*.ckpt", ".mypy_cache", ".ruff_cache"]


def _prepare_environment() -> None:
    """Sets what the user has not set, unless somebody imported Ray first, as `serve run` and Ray's workers do.

    Ray has read its variables by then. The processes it starts later would read ours and disagree with it: a head
    that asks for a token which its own driver does not send.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if "ray" in sys.modules:
        return
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "RAY_ADDRESS" not in os.environ:
        # A Ray that this process starts itself listens on loopback only.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


_prepare_environment()

import ray  # noqa: E402


def runtime_env() -> dict[str, Any]:
    """What workers need: `sr_platform` importable, one thread per worker, and where tracking and storage are.

    Credentials are never forwarded, because Ray logs all this on every node. Workers find them as boto and MLflow do:
    instance role, their own environment. A password in the URI of a database is the exception; a server has none there.
    """
    env_vars = {"PYTHONPATH": _python_path(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    env_vars.update({name: public_uri(os.environ[name]) for name in _FORWARDED if name in os.environ})
    env_vars["MLFLOW_DISABLE_TELEMETRY"] = "true"
    return {"env_vars": env_vars}


def submit_runtime_env() -> dict[str, Any]:
    """The runtime environment of `ray job submit`: the repository as working directory, `sr_platform` importable."""
    return {"working_dir": str(REPOSITORY_PATH), "excludes": _EXCLUDES, "env_vars": {"PYTHONPATH": "platform:."}}


@contextmanager
def connected(*, num_cpus: int | None = None, local: bool = False) -> Iterator[None]:
    """A Ray connection: an existing one, the cluster of RAY_ADDRESS, or a local Ray that ends with the block.

    `num_cpus` are the logical CPUs of a local Ray: at least 4 by default, because Ray's schedulers count one
    logical CPU for every waiting actor and a pipeline of several stages starves on 2. `local` ignores RAY_ADDRESS.
    """
    hide_credentials()
    if ray.is_initialized():
        yield
        return
    if "RAY_ADDRESS" in os.environ and not local:
        ray.init(address=os.environ["RAY_ADDRESS"], runtime_env=runtime_env(), log_to_driver=False)
    else:
        ray.init(
            address="local",
            num_cpus=num_cpus or max(4, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            runtime_env=runtime_env(),
        )
    try:
        yield
    finally:
        ray.shutdown()


def _python_path() -> str:
    """Both source roots, absolute: a worker's current directory is a session folder of Ray's."""
    return os.pathsep.join([str(REPOSITORY_PATH / "platform"), str(REPOSITORY_PATH)])

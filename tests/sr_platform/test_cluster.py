"""Connecting to Ray: what it listens on, what its workers get, and that secrets stay at home."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sr_platform import cluster

ROOT = Path(__file__).resolve().parents[2]


def environment_after_import(before="", **given):
    """What RAY_* and friends are in a fresh process once `sr_platform.cluster` is imported, after the code `before`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    code = f"{before}\nimport sr_platform.cluster, os, json; print(json.dumps(dict(os.environ)))"
    shown = subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **given}, capture_output=True, text=True, check=True
    )
    return json.loads(shown.stdout)


def test_importing_sets_what_ray_reads_at_import():
    environment = environment_after_import()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize("job", ["demo", "prepare", "synthesize", "train"])
def test_every_job_imports_the_cluster_before_ray(job):
    environment = environment_after_import(f"import pipelines.{job}")
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"


def test_a_ray_that_was_imported_first_is_left_as_it_is():
    environment = environment_after_import("import ray, os; os.environ.pop('RAY_AUTH_MODE', None)")
    assert "RAY_AUTH_MODE" not in environment
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in environment
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_process_that_imported_ray_first_can_start_one_as_serve_run_does(tmp_path):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    code = "import ray, sr_platform.cluster; ray.init(address='local', num_cpus=1, include_dashboard=False)"
    environment = {**inherited, "HOME": str(tmp_path), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    started = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert started.returncode == 0, started.stderr


def test_what_the_user_has_set_stays():
    assert environment_after_import(RAY_AUTH_MODE="disabled")["RAY_AUTH_MODE"] == "disabled"


def test_a_cluster_elsewhere_is_not_forced_onto_loopback():
    environment = environment_after_import(RAY_ADDRESS="10.0.0.7:6379")
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in environment


def test_workers_find_both_source_roots_and_use_one_thread(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    env_vars = cluster.runtime_env()["env_vars"]
    assert env_vars["PYTHONPATH"].split(os.pathsep) == [str(ROOT / "platform"), str(ROOT)]
    assert env_vars["OMP_NUM_THREADS"] == "1"


def test_workers_are_told_where_tracking_and_storage_are_but_no_secret(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage:9000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-tell")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "do-not-tell")
    env_vars = cluster.runtime_env()["env_vars"]
    assert env_vars["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert env_vars["AWS_ENDPOINT_URL"] == "http://storage:9000"
    assert "do-not-tell" not in str(env_vars)


def test_the_password_of_a_tracking_uri_is_for_the_environment_of_processes_and_not_for_what_ray_logs(monkeypatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:do-not-tell@mlflow:5000")
    assert cluster.runtime_env()["env_vars"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    with cluster.connected():
        assert os.environ["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
        assert {"user", "do-not-tell"} <= set(os.environ.values())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:needed@host/db")
    assert cluster.runtime_env()["env_vars"]["MLFLOW_TRACKING_URI"] == "postgresql://user:needed@host/db"


def test_a_submitted_job_brings_the_repository_without_what_is_large_or_secret():
    submitted = cluster.submit_runtime_env()
    assert Path(submitted["working_dir"]) == ROOT
    assert {".venv", ".git", ".env", "out"} <= set(submitted["excludes"])
    assert submitted["env_vars"]["PYTHONPATH"] == "platform:."


@pytest.mark.ray
def test_workers_import_both_leaves_from_any_folder(local_ray):
    import ray

    @ray.remote(num_cpus=0.1)
    def look():
        import faithdiff
        import sr_platform

        return [Path(module.__file__).parents[1] for module in (faithdiff, sr_platform)], os.environ["OMP_NUM_THREADS"]

    folders, threads = ray.get(look.remote(), timeout=60)
    assert folders == [ROOT, ROOT / "platform"]
    assert threads == "1"


@pytest.mark.ray
def test_a_connection_that_exists_is_used_and_left_open(local_ray):
    import ray

    with cluster.connected():
        assert ray.is_initialized()
    assert ray.is_initialized()


@pytest.mark.ray
def test_a_local_ray_has_the_logical_cpus_asked_for_and_a_loopback_address(local_ray):
    import ray

    assert ray.cluster_resources()["CPU"] == 6
    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}


def test_a_local_ray_ends_with_the_block():
    code = (
        "from sr_platform import cluster\n"
        "import ray\n"
        "with cluster.connected(local=True):\n"
        "    print(ray.cluster_resources()['CPU'] >= 4)\n"
        "print(ray.is_initialized())\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ended.stdout.split() == ["True", "False"]


def test_workers_of_a_local_ray_inherit_the_password_that_the_uri_does_not_show_them():
    code = (
        "from sr_platform import cluster\n"
        "import os, ray\n"
        "look = ray.remote(num_cpus=0.1)(lambda: {k: v for k, v in os.environ.items() if k.startswith('MLFLOW_T')})\n"
        "with cluster.connected(local=True):\n"
        "    print(ray.get(look.remote(), timeout=60))\n"
    )
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_T")}
    given = {**inherited, "MLFLOW_TRACKING_URI": "http://user:p%40ss@mlflow:5000"}
    shown = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    assert ast.literal_eval(shown.stdout) == {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "MLFLOW_TRACKING_USERNAME": "user",
        "MLFLOW_TRACKING_PASSWORD": "p@ss",
    }

"""Storage that fails now and then, a lost tracking server, lost workers and drivers: nothing of a training is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from mlflow import MlflowClient

from pipelines.training.request import read_record
from sr_platform.checkpoints import list_checkpoints, open_checkpoint
from sr_platform.folders import LISTING_NAME, published_digest, read_listing
from sr_platform.model_registry import resolve_model
from sr_platform.storage import open_storage

NUM_UPDATES = 60
FLAGS = ["--size-px", "32", "--global-batch", "4", "--stage", "align", "--align.num-updates", str(NUM_UPDATES)]
FLAGS += ["--align.warmup-updates", "4", "--log-every-updates", "2", "--checkpoint-every-updates", "4"]
FLAGS += ["--keep-checkpoints", "2", "--keep-every-updates", "20", "--max-failures", "20", "--num-workers", "2"]
FLAGS += ["--validation.num-pictures", "1", "--validation.every-updates", "20", "--validation.num-inference-steps", "2"]
SECRETS = ("the-secret-of-storage", "the-password-of-tracking")


@pytest.fixture
def unsteady(faulty_s3: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """An S3 server that spoils every tenth request, and a secret in the environment that nobody may tell."""
    server = faulty_s3(seed=11, rate=0.1)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS[0])
    return server


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_an_unsteady_s3_and_a_lost_tracking_server_worker_and_driver_cost_no_update_no_metric_and_no_picture(
    local_ray,
    mlflow_server,
    unsteady,
    training,
    undisturbed,
    trained_weights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri.replace("://", f"://trainer:{SECRETS[1]}@"))
    # Its nodes find the credentials in this process's environment, as those of a real one do in theirs.
    cluster = request.getfixturevalue("cluster")
    job = training(cluster, FLAGS, out=f"{unsteady.uri}/train")
    suffer(job, mlflow_server)
    print(f"injected: {dict(unsteady.injected)}")
    assert {fault for _, fault in unsteady.injected} >= {"500", "503", "reset", "lost"}
    calm = undisturbed(FLAGS)
    client, run_id = MlflowClient(mlflow_server.uri), read_record(job.out)["run_id"]
    assert_account(account(client, run_id), account(MlflowClient(calm.tracking_uri), calm.run_id))
    expected = trained_weights(calm.model_uri)
    assert_registered(client, f"{job.out}/models/align", trained_weights, expected, tmp_path / "cache")
    assert_nothing_left_over(job.out, job.checkpoints, unsteady)
    assert_no_secret_told(everything_told(job, client, run_id))


def suffer(job: Any, server: Any) -> None:
    """The tracking server is killed, then a worker while it is away; it comes back, and then the driver is killed."""
    job.start()
    job.reach(8)
    server.kill()
    lost = job.update
    job.reach(lost + 12)
    waiting = open_checkpoint(job.checkpoints).meta["account"]["pending_log"]
    # Training is ahead of the newest checkpoint by two intervals at most.
    assert {entry["step"] for entry in waiting if entry["key"] == "train/loss"} >= set(range(lost + 9, lost + 13))
    job.kill("worker")
    job.reach(job.update + 4)
    assert job.update < NUM_UPDATES
    server.start()
    job.reach(job.update + 4)
    assert job.update < NUM_UPDATES
    job.kill("driver")
    job.end()


def account(client: MlflowClient, run_id: str) -> dict[str, Any]:
    """What MLflow knows of a training and what must not depend on its losses; all of it belongs to the only stage."""
    parent = client.get_run(run_id)
    (stage,) = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{run_id}'")
    assert (parent.info.status, stage.info.status) == ("FINISHED", "FINISHED")
    keys = ("train/loss", "train/lr", "train/loss_smoothed", "train/updates", "validation/psnr")
    curves: dict[str, Any] = {key: curve(client, stage.info.run_id, key) for key in keys}
    images = [Path(file.path).name for file in client.list_artifacts(stage.info.run_id, "images")]
    # key+step+20+timestamp+...: once as it is and once small; again where a restarted worker made it again.
    return curves | {"pictures": {tuple(name.split("+")[:3]) for name in images if name.endswith(".png")}}


def curve(client: MlflowClient, run_id: str, key: str) -> dict[int, set[float]]:
    """Update -> all that was logged for it: twice where a restarted worker came by again, but never two values."""
    values: dict[int, set[float]] = {}
    for metric in client.get_metric_history(run_id, key):
        values.setdefault(metric.step, set()).add(metric.value)
    return values


def assert_account(actual: dict[str, Any], calm: dict[str, Any]) -> None:
    assert actual == calm
    for key in ("train/loss", "train/lr"):
        assert list(actual[key]) == list(range(1, NUM_UPDATES + 1))
        assert all(len(values) == 1 for values in actual[key].values())
    assert {step for _, _, step in actual["pictures"]} == {"20", "40", "60"}


def assert_registered(
    client: MlflowClient, model_uri: str, weights: Any, expected: dict[str, Any], cache: Path
) -> None:
    version = client.get_model_version_by_alias("faithdiff-nano", "candidate")
    assert version.source == version.tags["model_uri"] == model_uri
    assert version.tags["model_digest"] == published_digest(model_uri)
    actual = weights(resolve_model("models:/faithdiff-nano@candidate", cache).path)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def assert_nothing_left_over(out: str, checkpoints: str, server: Any) -> None:
    """Every file belongs to a checkpoint that counts, to the model, to a picture, or is the record of the runs."""
    assert list_checkpoints(checkpoints) == [20, 40, 56, 60]
    storage, wanted = open_storage(out), {"run.json"}
    wanted |= {f"models/align/{name}" for name in (*read_listing(f"{out}/models/align").files, LISTING_NAME)}
    for update in list_checkpoints(checkpoints):
        folder = f"checkpoints/align/update_{update:08d}"
        parts = json.loads(storage.read_bytes(f"{folder}/checkpoint.json"))["files"]
        wanted |= {f"{folder}/{name}" for name in ("checkpoint.json", *(part["name"] for part in parts))}
    wanted |= {f"validation/align/s0-0/update_{update:08d}.png" for update in (20, 40, 60)}
    assert set(storage.list()) == wanted
    bucket = out.removeprefix("s3://").partition("/")[0]
    s3 = boto3.client("s3", endpoint_url=f"http://{server.target}")
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)


def assert_no_secret_told(told: dict[str, bytes]) -> None:
    leaks = [name for name, text in told.items() for secret in SECRETS if secret.encode() in text]
    assert leaks == [], f"of {len(told)} files"


def everything_told(job: Any, client: MlflowClient, run_id: str) -> dict[str, bytes]:
    """Name -> content of whatever people read: output, Ray's logs, what lies in storage, what MLflow shows."""
    logs = Path(job.cluster.head_node.get_logs_dir_path())
    files = [job.log_path, *(path for path in logs.rglob("*") if path.is_file())]
    storage = open_storage(job.out)
    names = [name for name in storage.list() if name.endswith((".json", ".md"))]
    run = json.dumps(client.get_run(run_id).to_dictionary())
    return {
        **{str(path): path.read_bytes() for path in files},
        **dict(zip(names, storage.read_all(names), strict=True)),
        "run": run.encode(),
    }

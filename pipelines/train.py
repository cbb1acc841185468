"""Prepared dataset -> trained, registered model: stage 1 (alignment module), then stage 2 (everything but the VAE).

    python pipelines/train.py train_nano.yaml --data out/shards --out out/train
    python pipelines/train.py export --source out/train/checkpoints/unified --to FaithDiff.bin
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform:."}}' -- \\
        python pipelines/train.py train_nano.yaml --data /abs/shards --out /abs/train

In : a prepared dataset (pipelines/prepare.py) and a model to start from.
Out: `out/models/<stage>/` in diffusers' layout with a model card, `out/checkpoints/<stage>/update_*`, an MLflow run
with a nested run per stage, and a version of `registered_model` in the registry that carries `alias`.

Relative paths are taken from the current directory of this process; under `ray job submit` that is a temporary copy
of the working directory, so give absolute paths or s3:// there. Every node must see `out`. The same command again
goes on where an interrupted run stopped, on as many workers as it is given; another recipe needs another `out`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faithdiff.errors import InputError
from pipelines.training.recipe import Stage, TrainConfig
from sr_platform import cluster
from sr_platform.config import load_config, run_job
from sr_platform.errors import ConfigError
from sr_platform.folders import folder_exists, published_digest
from sr_platform.mlflow_client import without_credentials
from sr_platform.observability import configure_logging
from sr_platform.ownership import owned
from sr_platform.tracking import Tracking, tracking_uri

# export, request and stages import PyTorch and diffusers, for which neither --help nor a wrong flag should wait.
if TYPE_CHECKING:
    from pipelines.training.request import Request

logger = logging.getLogger("pipelines.train")


@dataclass(frozen=True)
class TrainResult:
    """What a training left behind."""

    model_uri: str
    """Folder of the last stage's model."""
    registered_uri: str
    """models:/name/version in the registry."""
    tracking_uri: str
    run_id: str
    metrics: dict[Stage, dict[str, float]]
    """Last metrics of each stage that ran in this process."""


def main(argv: Sequence[str]) -> None:
    if argv and argv[0] == "export":
        from pipelines.training import export

        export.main(argv[1:])
        return
    cfg = load_config(TrainConfig, argv, job="train", description=__doc__ or "", commands=("export",))
    configure_logging()
    print(summary(train(cfg)))


def train(cfg: TrainConfig) -> TrainResult:
    """Runs the stages of `cfg` on the connected Ray, the cluster of RAY_ADDRESS, or a local one.

    Raises:
        RequestError, InputError: the request cannot be done as asked; nothing was written.
        FloatingPointError: a loss or gradient was not finite; the message names the samples.
    """
    from pipelines.training.request import check_request, check_resources
    from pipelines.training.stages import recorded_run

    request = check_request(cfg)
    cfg = request.cfg
    default_path = tracking_path(cfg)
    workers_cpus = math.ceil(cfg.num_workers * cfg.cpus_per_worker)
    # The driver of Ray Train waits in an actor of its own.
    with cluster.connected(num_cpus=max(4, workers_cpus + 1)):
        check_resources(cfg)
        runs = Tracking.open(default_path=default_path, experiment=cfg.experiment)
        with owned(cfg.out), recorded_run(runs, request) as record:
            return run_stages(request, runs, record)


def tracking_path(cfg: TrainConfig) -> Path:
    """The folder of the MLflow database where no server is named."""
    if "://" not in cfg.out:
        return Path(cfg.out)
    if tracking_uri(Path()).startswith("sqlite:"):
        raise ConfigError(f"out: {cfg.out} cannot hold MLflow's SQLite file; set MLFLOW_TRACKING_URI, or give a folder")
    return Path()


def run_stages(request: Request, runs: Tracking, record: dict[str, Any]) -> TrainResult:
    """Each stage starts from the model of the one before; the last model is registered."""
    from pipelines.training.export import model_digest
    from pipelines.training.request import model_uri
    from pipelines.training.stages import deliver, run_stage

    cfg, model, digest = request.cfg, request.model, request.model_digest
    metrics: dict[Stage, dict[str, float]] = {}
    logs = []
    for stage in cfg.stages:
        model_out = model_uri(cfg.out, stage)
        if folder_exists(model_out):
            logger.info("stage %s is complete already: %s", stage, model_out)
            runs.finish(record["stage_run_ids"][stage])
        else:
            metrics[stage], log = run_stage(request, runs, record, stage, model, digest)
            logs.append(log)
        model, digest = model_out, model_digest(model_out)
    for log in logs:
        deliver(log)
    run_id, folder_digest = record["run_id"], published_digest(model)
    version = runs.register_model(
        model, name=cfg.registered_model, alias=cfg.alias, run_id=run_id, tags=request.tags, digest=folder_digest
    )
    return TrainResult(model, f"models:/{cfg.registered_model}/{version}", runs.uri, run_id, metrics)


def summary(result: TrainResult) -> str:
    """What a person wants to know at the end."""
    lines = ["", "training is done"]
    lines += [f"  stage {stage}: last loss {values['train/loss']:.4f}" for stage, values in result.metrics.items()]
    lines += [
        f"  model      {result.model_uri}",
        f"  registered {result.registered_uri}",
        f"  run        {result.run_id}",
    ]
    shown_uri = without_credentials(result.tracking_uri)
    if shown_uri.startswith("sqlite:"):
        lines.append(f"  look at it mlflow ui --backend-store-uri {shown_uri}")
    else:
        lines.append(f"  look at it {shown_uri}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(main, user_errors=(InputError,))

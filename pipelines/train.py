"""Prepared dataset -> trained, registered model: stage 1 (alignment module), then stage 2 (everything but the VAE).

    python pipelines/train.py train_nano.yaml --data out/shards --out out/train
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform:."}}' -- \\
        python pipelines/train.py train_nano.yaml --data /abs/shards --out /abs/train

In : a prepared dataset (pipelines/prepare.py) and a model to start from.
Out: `out/models/<stage>/` in diffusers' layout with a model card, `out/checkpoints/<stage>/update_*`, an MLflow run
with a nested run per stage, and a version of `registered_model` in the registry that carries `alias`.

Relative paths are taken from the current directory of this process; under `ray job submit` that is a temporary copy
of the working directory, so give absolute paths or s3:// there. Every node must see `out`. The same command again
goes on where an interrupted run stopped; another recipe needs another `out`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from faithdiff import bundle
from faithdiff.errors import InputError
from pipelines.training.inputs import StoredInputs, find_stored_inputs
from pipelines.training.lineage import lineage_tags
from pipelines.training.model_card import CARD_NAME, model_card
from pipelines.training.recipe import Stage, TrainConfig
from sr_platform import cluster
from sr_platform.config import load_config, run_job
from sr_platform.errors import ConfigError, InputDataError
from sr_platform.observability import configure_logging
from sr_platform.sample_reader import SampleReader
from sr_platform.shards import Manifest, read_manifest
from sr_platform.storage import open_storage
from sr_platform.tracking import RunLog, Tracking, resolve_model

logger = logging.getLogger("pipelines.train")

_RUN_FILE = "run.json"


@dataclass(frozen=True)
class TrainResult:
    """What a training left behind."""

    model_path: Path
    """Folder of the last stage's model."""
    model_uri: str
    """models:/name/version in the registry."""
    tracking_uri: str
    run_id: str
    metrics: dict[Stage, dict[str, float]]
    """Last metrics of each stage that ran in this process."""


@dataclass(frozen=True)
class Request:
    """A checked request: nothing has been written yet."""

    cfg: TrainConfig
    manifest: Manifest
    model: str
    """Folder, preset or hub id to start from."""
    model_version: str
    identity: str
    """Digest of everything that decides the result; an `out` belongs to one identity."""
    stored: StoredInputs
    """What the dataset holds ready for the model."""

    @property
    def tags(self) -> dict[str, str]:
        return lineage_tags(
            manifest=self.manifest,
            data_uri=self.cfg.data,
            recipe_digest=self.cfg.digest,
            base_model=self.model_version,
        )


def main(argv: Sequence[str]) -> None:
    cfg = load_config(TrainConfig, argv, job="train", description=__doc__ or "")
    configure_logging()
    print(summary(train(cfg)))


def train(cfg: TrainConfig) -> TrainResult:
    """Runs the stages of `cfg` on the connected Ray, the cluster of RAY_ADDRESS, or a local one.

    Raises:
        RequestError, InputError: the request cannot be done as asked; nothing was written.
    """
    request = check_request(cfg)
    cfg = request.cfg
    workers_cpus = math.ceil(cfg.num_workers * cfg.cpus_per_worker)
    # The driver of Ray Train waits in an actor of its own.
    with cluster.connected(num_cpus=max(4, workers_cpus + 1)):
        check_resources(cfg)
        cfg.out.mkdir(parents=True, exist_ok=True)
        runs = Tracking.open(default_path=cfg.out, experiment=cfg.experiment)
        with recorded_run(runs, cfg.out, request) as record:
            return run_stages(request, runs, record)


def check_request(cfg: TrainConfig) -> Request:
    """`cfg` with absolute paths, after everything was checked that can be before Ray starts."""
    cache = cfg.data_cache and cfg.data_cache.expanduser().resolve()
    paths = {"data": absolute_uri(cfg.data), "out": cfg.out.expanduser().resolve(), "data_cache": cache}
    cfg = cfg.model_copy(update=paths)
    manifest = read_manifest(cfg.data)
    check_shards(cfg.data, manifest)
    if cfg.out.exists() and not cfg.out.is_dir():
        raise ConfigError(f"out: {cfg.out} is a file; give a folder")
    model = resolve_model(cfg.model)
    folder = bundle.find_folder(model.path)
    bundle.check_folder(folder)
    identity = hashlib.sha256(f"{cfg.digest} {manifest.digest}".encode()).hexdigest()
    earlier = read_record(cfg.out)
    if earlier and earlier["identity"] != identity:
        raise ConfigError(f"out: {cfg.out} holds a training by another recipe, data or model; give another folder")
    path = str(Path(model.path).resolve()) if Path(model.path).is_dir() else model.path
    stored = find_stored_inputs(SampleReader(cfg.data), path, size_px=cfg.size_px)
    return Request(cfg, manifest, path, model.version, identity, stored)


def check_shards(uri: str, manifest: Manifest) -> None:
    """Raises InputDataError where a shard is missing or cut off; workers would find out much later."""
    if manifest.num_samples == 0:
        raise InputDataError(f"train: {uri} holds no samples; prepare it from more or larger pictures")
    sizes = open_storage(uri).sizes("shards/")
    wrong = [shard.name for shard in manifest.shards if sizes.get(shard.name) != shard.size_bytes]
    if wrong:
        raise InputDataError(
            f"train: {len(wrong)} of {len(manifest.shards)} shards of {uri} are missing or cut off, "
            f"first {wrong[0]}; prepare the dataset again"
        )


def check_resources(cfg: TrainConfig) -> None:
    """Raises ConfigError where the cluster could never start the workers; Ray itself would wait for ever."""
    import ray

    available = ray.cluster_resources()
    wanted = {"CPU": cfg.num_workers * cfg.cpus_per_worker, "GPU": float(cfg.num_workers if cfg.use_gpu else 0)}
    for resource, amount in wanted.items():
        if amount > available.get(resource, 0):
            raise ConfigError(
                f"num_workers: {cfg.num_workers} workers need {amount:g} {resource}s and the cluster has "
                f"{available.get(resource, 0):g}; lower num_workers or change use_gpu or cpus_per_worker"
            )


def run_stages(request: Request, runs: Tracking, record: dict[str, Any]) -> TrainResult:
    """Each stage starts from the model of the one before; the last model is registered."""
    cfg, model, metrics = request.cfg, request.model, dict[Stage, dict[str, float]]()
    for stage in cfg.stages:
        model_out = cfg.out / "models" / stage
        if model_out.is_dir():
            logger.info("stage %s is complete already: %s", stage, model_out)
        else:
            metrics[stage] = run_stage(request, runs, record, stage, model, model_out)
        write_card(request, stage, model_out)
        model = str(model_out)
    version = runs.register_folder(
        Path(model), name=cfg.registered_model, alias=cfg.alias, run_id=record["run_id"], tags=request.tags
    )
    return TrainResult(Path(model), f"models:/{cfg.registered_model}/{version}", runs.uri, record["run_id"], metrics)


def run_stage(
    request: Request, runs: Tracking, record: dict[str, Any], stage: Stage, model: str, model_out: Path
) -> dict[str, float]:
    """One Ray Train run, resumed from its last checkpoint after failures and after an earlier, interrupted job."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.training.updates import StageJob, train_loop_per_worker
    from sr_platform.checkpoints import checkpoint_config

    cfg = request.cfg
    with stage_run(runs, record, request, stage) as run_id:
        job = StageJob(
            train=cfg,
            stage=stage,
            model=model,
            model_out=model_out,
            model_version=f"{cfg.registered_model}-{stage}-{run_id[:8]}",
            tracking_uri=runs.uri,
            run_id=run_id,
            stored=request.stored,
        )
        trainer = TorchTrainer(
            train_loop_per_worker,
            train_loop_config=job.model_dump(mode="json"),
            torch_config=TorchConfig(backend="nccl" if cfg.use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=cfg.num_workers,
                use_gpu=cfg.use_gpu,
                resources_per_worker={"CPU": cfg.cpus_per_worker, **({"GPU": 1} if cfg.use_gpu else {})},
            ),
            run_config=RunConfig(
                name=stage,
                storage_path=str(cfg.out / "checkpoints"),
                failure_config=FailureConfig(max_failures=cfg.max_failures),
                checkpoint_config=checkpoint_config(keep=cfg.keep_checkpoints),
            ),
        )
        with progress_bar(RunLog(runs.uri, run_id), stage, cfg.last_update(stage)):
            metrics: dict[str, float] = trainer.fit().return_value
    return metrics


def write_card(request: Request, stage: Stage, model_out: Path) -> None:
    """Puts the model card beside the weights, where an earlier run has not done so."""
    path, cfg = model_out / CARD_NAME, request.cfg
    if path.exists():
        return
    trained = cfg.stages[: cfg.stages.index(stage) + 1]
    card = model_card(
        request.manifest,
        request.tags,
        name=f"{cfg.registered_model} ({stage})",
        stages={name: cfg.last_update(name) for name in trained},
        size_px=cfg.size_px,
    )
    partial = path.with_name(f".{CARD_NAME}.partial")
    partial.write_text(card, encoding="utf-8")
    partial.rename(path)


@contextmanager
def recorded_run(runs: Tracking, out: Path, request: Request) -> Iterator[dict[str, Any]]:
    """The parent run, opened again where `out` names it; `out/run.json` remembers runs for a resumed job."""
    record = read_record(out)
    if not record or not runs.resume(record["run_id"]):
        run_id = runs.start(
            f"train {request.cfg.registered_model}", params=request.cfg.model_dump(mode="json"), tags=request.tags
        )
        record = {"identity": request.identity, "run_id": run_id, "stage_run_ids": {}}
    write_record(out, record)
    with finished(runs, record["run_id"]):
        yield record


@contextmanager
def stage_run(runs: Tracking, record: dict[str, Any], request: Request, stage: Stage) -> Iterator[str]:
    """The nested run of a stage, opened again where the record names it."""
    cfg, known = request.cfg, record["stage_run_ids"]
    if stage not in known or not runs.resume(known[stage]):
        params = {"stage": stage, **cfg.stage_config(stage).model_dump(mode="json")}
        known[stage] = runs.start(stage, parent_run_id=record["run_id"], params=params, tags=request.tags)
        write_record(cfg.out, record)
    with finished(runs, known[stage]):
        yield known[stage]


@contextmanager
def finished(runs: Tracking, run_id: str) -> Iterator[None]:
    """Ends the run as finished, or as failed when the block raises."""
    try:
        yield
    except BaseException:
        runs.finish(run_id, failed=True)
        raise
    runs.finish(run_id)


@contextmanager
def progress_bar(log: RunLog, stage: Stage, num_updates: int) -> Iterator[None]:
    """A bar of updates that follows the run's own metrics, so it works on any cluster."""
    done = threading.Event()

    def follow(bar: Any) -> None:
        while not done.wait(1.0):
            latest = log.latest()
            if latest.get("train/updates", 0) != bar.n:
                bar.n = int(latest["train/updates"])
                bar.set_postfix_str(f"loss {latest['train/loss']:.4f}")

    with tqdm(total=num_updates, desc=f"stage {stage}", unit="update") as bar:
        thread = threading.Thread(target=follow, args=(bar,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        bar.n = num_updates


def read_record(out: Path) -> dict[str, Any]:
    path = out / _RUN_FILE
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def write_record(out: Path, record: dict[str, Any]) -> None:
    partial = out / f".{_RUN_FILE}.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.rename(out / _RUN_FILE)


def absolute_uri(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())


def summary(result: TrainResult) -> str:
    """What a person wants to know at the end."""
    lines = ["", "training is done"]
    lines += [f"  stage {stage}: last loss {values['train/loss']:.4f}" for stage, values in result.metrics.items()]
    lines += [f"  model      {result.model_path}", f"  registered {result.model_uri}", f"  run        {result.run_id}"]
    if result.tracking_uri.startswith("sqlite:"):
        lines.append(f"  look at it mlflow ui --backend-store-uri {result.tracking_uri}")
    else:
        lines.append(f"  look at it {result.tracking_uri}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(main, user_errors=(InputError,))

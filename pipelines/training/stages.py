"""A checked request -> stages on Ray Train, each under a nested MLflow run that an interrupted job finds again."""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from pipelines.training.recipe import Stage, TrainConfig
from pipelines.training.request import Request, read_record, record_start, write_record
from pipelines.training.stage_job import StageJob
from sr_platform.errors import ConfigError, InputDataError
from sr_platform.run_log import RunLog
from sr_platform.tracking import Tracking

_PATIENCE_S, _STAGE_END_PATIENCE_S = 600.0, 60.0

logger = logging.getLogger("pipelines.train")


def run_stage(
    request: Request, runs: Tracking, record: dict[str, Any], stage: Stage, model: str, model_digest: str
) -> tuple[dict[str, float], RunLog]:
    """One Ray Train run, resumed from its newest checkpoint after failures and after an earlier, interrupted job.

    Returns:
        The last metrics, and what the tracking server has not taken yet (`deliver`).

    Raises:
        FloatingPointError: a loss or gradient was not finite.
        RequestError: the data or the settings turned out to be of no use.
    """
    cfg, run_id = request.cfg, record["stage_run_ids"][stage]
    log = RunLog(runs.uri, run_id)
    # The next stage does not wait for a server that is away: what must be told is told at the end.
    with finished(dataclasses.replace(runs, patience_s=_STAGE_END_PATIENCE_S), run_id):
        record_start(cfg.out, record, stage, model_digest)
        job = stage_job(request, stage, model, model_digest, tracking_uri=runs.uri, run_id=run_id)
        with progress_bar(log, stage, cfg.last_update(stage)):
            result = fit(job)
            while "left_after" in result:
                logger.info("stage %s left a node after update %d", stage, result["left_after"])
                result = fit(job)
        log.restore(result["pending_log"])
        if "error" in result:
            raise (ConfigError if result["is_request_wrong"] else FloatingPointError)(result["error"])
    metrics: dict[str, float] = result["metrics"]
    return metrics, log


def deliver(log: RunLog) -> None:
    """Gives the tracking server what it had not taken when the worker ended, and waits for it a good while."""
    if not log.flush(_PATIENCE_S):
        logger.warning("tracking: %d entries of run %s were never taken", len(log.pending()), log.run_id)
    log.close()


def stage_job(
    request: Request, stage: Stage, model: str, model_digest: str, *, tracking_uri: str, run_id: str
) -> StageJob:
    """The stage of `request` that starts from `model`."""
    cfg = request.cfg
    return StageJob(
        train=cfg,
        stage=stage,
        stages_so_far=cfg.stages[: cfg.stages.index(stage) + 1],
        model=model,
        model_digest=model_digest,
        model_version=f"{cfg.registered_model}-{stage}-{run_id[:8]}",
        model_out=f"{cfg.out}/models/{stage}",
        checkpoints=f"{cfg.out}/checkpoints/{stage}",
        tracking_uri=tracking_uri,
        run_id=run_id,
        tags=request.tags,
        stored=request.stored,
    )


def fit(job: StageJob) -> dict[str, Any]:
    """What rank 0 of `train_loop_per_worker` returns. Raises InputDataError where a sample of the data is damaged."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.training.updates import train_loop_per_worker

    cfg = job.train
    with tempfile.TemporaryDirectory(prefix="ray_train_") as folder:
        trainer = TorchTrainer(
            train_loop_per_worker,
            train_loop_config=job.model_dump(mode="json"),
            torch_config=TorchConfig(backend="nccl" if cfg.use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=(cfg.min_workers, cfg.num_workers) if cfg.min_workers else cfg.num_workers,
                use_gpu=cfg.use_gpu,
                resources_per_worker={"CPU": cfg.cpus_per_worker, **({"GPU": 1} if cfg.use_gpu else {})},
            ),
            # Checkpoints are ours (sr_platform/checkpoints.py): Ray is told of none, and its folder stays empty.
            run_config=RunConfig(
                name=f"{job.stage}-{uuid.uuid4().hex[:8]}",
                storage_path=folder,
                failure_config=FailureConfig(max_failures=cfg.max_failures),
            ),
        )
        try:
            result: dict[str, Any] = trainer.fit().return_value
        except WorkerGroupError as error:
            damaged = [e for e in error.worker_failures.values() if isinstance(e, InputDataError)]
            raise (damaged[0] if damaged else error) from error
    return result


@contextmanager
def recorded_run(runs: Tracking, request: Request) -> Iterator[dict[str, Any]]:
    """The parent run and a nested one per stage, opened again where `out` names them.

    All are opened at the start, so that nothing between the stages needs the tracking server. `out/run.json` remembers
    them for a resumed job.
    """
    cfg = request.cfg
    record = read_record(cfg.out)
    if not record or not runs.resume(record["run_id"]):
        params = cfg.model_dump(mode="json")
        run_id = runs.start(f"train {cfg.registered_model}", params=params, tags=request.tags)
        starts = record.get("starts", {})
        record = {
            "identity": request.identity,
            "recipe": params,
            "run_id": run_id,
            "stage_run_ids": {},
            "starts": starts,
        }
    for stage in cfg.stages:
        known = record["stage_run_ids"]
        if stage not in known or not runs.resume(known[stage]):
            known[stage] = runs.start(
                stage, parent_run_id=record["run_id"], params=stage_params(cfg, stage), tags=request.tags
            )
    write_record(cfg.out, record)
    with finished(runs, record["run_id"]):
        yield record


def stage_params(cfg: TrainConfig, stage: Stage) -> dict[str, Any]:
    values = cfg.stage_config(stage).model_dump(mode="json")
    return {"stage": stage, **values, "trains": ", ".join(cfg.trained_parts(stage)), "deepspeed": cfg.deepspeed}


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
                bar.set_postfix_str(f"loss {latest.get('train/loss', math.nan):.4f}")

    with tqdm(total=num_updates, desc=f"stage {stage}", unit="update") as bar:
        thread = threading.Thread(target=follow, args=(bar,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        bar.n = num_updates

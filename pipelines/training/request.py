"""A training's configuration -> a checked request, before Ray starts and before anything is written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faithdiff import bundle
from pipelines.training.deepspeed_config import check_override
from pipelines.training.export import find_checkpoint, model_digest, weights_digest
from pipelines.training.inputs import StoredInputs, find_stored_inputs
from pipelines.training.lineage import lineage_tags
from pipelines.training.recipe import Stage, TrainConfig
from sr_platform.errors import ConfigError, InputDataError
from sr_platform.folders import folder_exists
from sr_platform.model_registry import local_path, resolve_model
from sr_platform.sample_reader import SampleReader
from sr_platform.shards import Manifest, read_manifest
from sr_platform.storage import open_storage
from sr_platform.tracking import flatten

_RUN_FILE = "run.json"


@dataclass(frozen=True)
class Request:
    """A checked request: nothing has been written yet."""

    cfg: TrainConfig
    """With absolute paths."""
    manifest: Manifest
    model: str
    """Folder, preset, hub id or models:/name/version to start from, as every node can find it."""
    model_version: str
    model_digest: str
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
            base_model_digest=self.model_digest,
        )


def check_request(cfg: TrainConfig) -> Request:
    """`cfg` with absolute paths, after everything was checked that can be before Ray starts.

    Raises:
        RequestError, InputError: the request cannot be done as asked.
    """
    cfg = with_absolute_paths(cfg)
    manifest = read_manifest(cfg.data)
    check_shards(cfg.data, manifest)
    if cfg.validation.num_pictures and cfg.validation.data is not None:
        check_shards(cfg.validation.data, read_manifest(cfg.validation.data))
    check_override(cfg)
    if "://" not in cfg.out and Path(cfg.out).exists() and not Path(cfg.out).is_dir():
        raise ConfigError(f"out: {cfg.out} is a file; give a folder")
    base = resolve_model(cfg.model)
    folder = bundle.find_folder(base.path)
    bundle.check_folder(folder)
    digest = weights_digest(folder)
    identity = hashlib.sha256(f"{cfg.digest} {manifest.digest} {digest}".encode()).hexdigest()
    record = read_record(cfg.out)
    check_identity(cfg, record, identity)
    model, first_digest = _name_for_workers(cfg.model, base.path, base.version), digest
    before = stage_before(cfg)
    if before is not None:
        model = model_uri(cfg.out, before)
        first_digest = model_digest(model)
    check_starts(cfg, record, first_digest)
    check_resume(cfg, first_digest)
    stored = find_stored_inputs(SampleReader(cfg.data), base.path, size_px=cfg.size_px)
    return Request(cfg, manifest, model, base.version, first_digest, identity, stored)


def check_identity(cfg: TrainConfig, record: dict[str, Any], identity: str) -> None:
    """Raises ConfigError where `out` holds a training by another recipe, data or model, and says what differs."""
    if not record or record["identity"] == identity:
        return
    there = TrainConfig.model_validate(record["recipe"])
    differing = sorted(
        key for key, value in flatten(cfg.deciding).items() if flatten(there.deciding).get(key, value) != value
    )
    what = f"by another recipe ({', '.join(differing)})" if differing else "by another recipe, data or model"
    raise ConfigError(f"out: {cfg.out} holds a training {what}; give another folder")


def stage_before(cfg: TrainConfig) -> Stage | None:
    """The last stage that is complete in `out` and comes before those of `cfg`, which go on from its model."""
    stages = cfg.model_copy(update={"stage": "both"}).stages
    earlier = stages[: stages.index(cfg.stages[0])]
    return next((stage for stage in reversed(earlier) if folder_exists(model_uri(cfg.out, stage))), None)


def check_starts(cfg: TrainConfig, record: dict[str, Any], first_digest: str) -> None:
    """Raises ConfigError where a stage in `out` started from another model than it would now."""
    starts, digest = record.get("starts", {}), first_digest
    for stage in cfg.stages:
        if stage in starts and starts[stage] != digest:
            raise ConfigError(
                f"out: stage {stage} in {cfg.out} started from another model than it would now, as other stages were "
                "trained before it; give another folder"
            )
        model = model_uri(cfg.out, stage)
        digest = model_digest(model) if folder_exists(model) else ""


def record_start(out: str, record: dict[str, Any], stage: Stage, digest: str) -> None:
    """Keeps in mind what model a stage starts from."""
    if record["starts"].get(stage) != digest:
        record["starts"][stage] = digest
        write_record(out, record)


def model_uri(out: str, stage: Stage) -> str:
    """Where a stage leaves its model."""
    return f"{out}/models/{stage}"


def _name_for_workers(given: str, path: str, version: str) -> str:
    """A registered model's version, which does not move as an alias does; else a folder or a preset's name."""
    if given.startswith("models:"):
        return f"models:/{version}"
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def with_absolute_paths(cfg: TrainConfig) -> TrainConfig:
    cache = cfg.data_cache and cfg.data_cache.expanduser().resolve()
    validation = cfg.validation.model_copy(update={"data": cfg.validation.data and absolute_uri(cfg.validation.data)})
    return cfg.model_copy(
        update={
            "data": absolute_uri(cfg.data),
            "out": absolute_uri(cfg.out),
            "data_cache": cache,
            "resume_from": cfg.resume_from and absolute_uri(cfg.resume_from),
            "validation": validation,
        }
    )


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


def check_resume(cfg: TrainConfig, model_digest: str) -> None:
    """Raises ConfigError where the checkpoint to resume from is none, or does not fit the first stage."""
    if cfg.resume_from is None:
        return
    stage, found = cfg.stages[0], find_checkpoint(cfg.resume_from)
    if found is None:
        raise ConfigError(
            f"resume_from: {cfg.resume_from} holds no complete checkpoint; give <out>/checkpoints/<stage>"
        )
    if found.meta["stage"] != stage:
        raise ConfigError(
            f"resume_from: {cfg.resume_from} is of stage {found.meta['stage']} and the first stage here is "
            f"{stage}; give --stage {found.meta['stage']}, or another checkpoint"
        )
    if found.meta["model_digest"] != model_digest:
        raise ConfigError(
            f"resume_from: {cfg.resume_from} started from {found.meta['model']}, whose weights are not those of "
            "this model; give that one"
        )
    if found.update >= cfg.last_update(stage):
        raise ConfigError(
            f"resume_from: {cfg.resume_from} is after update {found.update} and stage {stage} ends at "
            f"{cfg.last_update(stage)}; raise it, or use train.py export"
        )


def check_resources(cfg: TrainConfig) -> None:
    """Raises ConfigError where the cluster could never start the workers; Ray itself would wait for ever."""
    import ray

    available, num_workers = ray.cluster_resources(), cfg.min_workers or cfg.num_workers
    wanted = {"CPU": num_workers * cfg.cpus_per_worker, "GPU": float(num_workers if cfg.use_gpu else 0)}
    for resource, amount in wanted.items():
        if amount > available.get(resource, 0):
            raise ConfigError(
                f"num_workers: {num_workers} workers need {amount:g} {resource}s and the cluster has "
                f"{available.get(resource, 0):g}; lower num_workers or change use_gpu or cpus_per_worker"
            )


def read_record(out: str) -> dict[str, Any]:
    """What `out` remembers of its training: identity and the ids of its runs; {} for a fresh one."""
    storage = open_storage(out)
    return dict(json.loads(storage.read_bytes(_RUN_FILE))) if storage.exists(_RUN_FILE) else {}


def write_record(out: str, record: dict[str, Any]) -> None:
    open_storage(out).write_bytes_atomic(_RUN_FILE, (json.dumps(record, indent=2) + "\n").encode())


def absolute_uri(uri: str) -> str:
    """A local path, also of a file:// URI, or any other URI as it is."""
    path = local_path(uri)
    return uri if path is None else str(Path(path).expanduser().resolve())

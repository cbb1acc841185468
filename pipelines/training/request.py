"""A training's configuration -> a checked request, before Ray starts and before anything is written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faithdiff import bundle
from pipelines.training.export import find_checkpoint, weights_digest
from pipelines.training.inputs import StoredInputs, find_stored_inputs
from pipelines.training.lineage import lineage_tags
from pipelines.training.recipe import TrainConfig
from sr_platform.errors import ConfigError, InputDataError
from sr_platform.model_registry import resolve_model
from sr_platform.sample_reader import SampleReader
from sr_platform.shards import Manifest, read_manifest
from sr_platform.storage import open_storage

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
    if "://" not in cfg.out and Path(cfg.out).exists() and not Path(cfg.out).is_dir():
        raise ConfigError(f"out: {cfg.out} is a file; give a folder")
    model = resolve_model(cfg.model)
    folder = bundle.find_folder(model.path)
    bundle.check_folder(folder)
    digest = weights_digest(folder)
    identity = hashlib.sha256(f"{cfg.digest} {manifest.digest} {digest}".encode()).hexdigest()
    earlier = read_record(cfg.out)
    if earlier and earlier["identity"] != identity:
        raise ConfigError(f"out: {cfg.out} holds a training by another recipe, data or model; give another folder")
    check_resume(cfg)
    stored = find_stored_inputs(SampleReader(cfg.data), model.path, size_px=cfg.size_px)
    return Request(
        cfg, manifest, _name_for_workers(cfg.model, model.path, model.version), model.version, digest, identity, stored
    )


def _name_for_workers(given: str, path: str, version: str) -> str:
    """A registered model's version, which does not move as an alias does; else a folder or a preset's name."""
    if given.startswith("models:"):
        return f"models:/{version}"
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def with_absolute_paths(cfg: TrainConfig) -> TrainConfig:
    cache = cfg.data_cache and cfg.data_cache.expanduser().resolve()
    resume_from = cfg.resume_from and absolute_uri(cfg.resume_from)
    paths = {
        "data": absolute_uri(cfg.data),
        "out": absolute_uri(cfg.out),
        "data_cache": cache,
        "resume_from": resume_from,
    }
    return cfg.model_copy(update=paths)


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


def check_resume(cfg: TrainConfig) -> None:
    """Raises ConfigError where the checkpoint to resume from is none, or of another stage."""
    if cfg.resume_from is None:
        return
    found = find_checkpoint(cfg.resume_from)
    if found is None:
        raise ConfigError(
            f"resume_from: {cfg.resume_from} holds no complete checkpoint; give <out>/checkpoints/<stage>"
        )
    if found.meta["stage"] != cfg.stages[0]:
        raise ConfigError(
            f"resume_from: {cfg.resume_from} is of stage {found.meta['stage']} and the first stage here is "
            f"{cfg.stages[0]}; give --stage {found.meta['stage']}, or another checkpoint"
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
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())

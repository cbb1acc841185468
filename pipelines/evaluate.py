"""Model + data -> a report under a protocol: restored, scored, compared; the paper's tables, one recipe each.

    python pipelines/evaluate.py protocol_table1_nano.yaml --model nano --data photographs/ --report out/report
    python pipelines/evaluate.py protocol_table1.yaml --degradation level_III --model models:/faithdiff@candidate \\
        --data DIV2K_valid_HR --report out/table1_III --method SeeSR=outputs/seesr --method SUPIR=outputs/supir
    python pipelines/evaluate.py compare out/report out/other      are two reports comparable, and what differs
    python pipelines/evaluate.py sweep protocol_table1_nano.yaml --model nano --data photographs/   the tile stride

In : a recipe `protocol_*.yaml`, which holds everything that changes a number; a folder of pictures, or a prepared
     dataset; a model, folders with the outputs of other methods, or both.
Out: `report.md`, `report.html`, `scores.parquet` (a row per method, picture and metric), `report.json`, `figures/`,
     `pictures/<method>/`, and the same in a run of MLflow. The pictures that others restore are `pictures/lq/`.

The same command again goes on where a killed one stopped: restored pictures and scores are remembered in `cache/` by
model, picture and settings. A metric that cannot be computed is missing with its reason, never a number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faithdiff.errors import InputError
from sr_platform import cluster
from sr_platform.config import load_config, run_job
from sr_platform.errors import ConfigError
from sr_platform.folders import folder_exists
from sr_platform.model_registry import resolve_model
from sr_platform.observability import configure_logging
from sr_platform.ownership import owned
from sr_platform.storage import open_storage

# isort: split
# Ray reads its environment when it is imported, and `cluster` sets it.
from pipelines.evaluation import comparability, results, stride_sweep
from pipelines.evaluation.passes import Measured, inspect_pictures, measure_pictures
from pipelines.evaluation.pictures import EvaluationPicture, Place, data_digest, list_pictures, outputs_of
from pipelines.evaluation.protocol import EvaluateConfig, protocol_digest, resolved_protocol
from pipelines.evaluation.score_table import INPUT, OURS, REFERENCE
from pipelines.evaluation.scoring import NOT_APPLICABLE, describe
from pipelines.evaluation.track import log_report

logger = logging.getLogger("pipelines.evaluate")

_IDENTITY_NAME = "evaluation.json"


@dataclass(frozen=True)
class Model:
    """What restores, as every node finds it; all empty where nothing is restored."""

    uri: str = ""
    version: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Evaluation:
    """A report that was written."""

    report: str
    header: dict[str, Any]
    run_id: str
    means: str


def main(argv: Sequence[str]) -> None:
    commands = {"compare": comparability.main, "sweep": stride_sweep.main}
    if argv and argv[0] in commands:
        commands[argv[0]](argv[1:])
        return
    cfg = load_config(EvaluateConfig, argv, job="evaluate", description=__doc__ or "", commands=tuple(commands))
    configure_logging()
    result = evaluate(cfg)
    if result is not None:
        print(summary(result))


def evaluate(cfg: EvaluateConfig) -> Evaluation | None:
    """Evaluates on the connected Ray, the cluster of RAY_ADDRESS, or a local one; None after a dry run.

    Raises:
        RequestError, InputError: the request cannot be done as asked: each wrong picture, name or setting is named.
    """
    cfg = checked(cfg)
    pictures = list_pictures(cfg)
    found = {name: outputs_of(name, folder, [p.name for p in pictures]) for name, folder in cfg.methods.items()}
    outputs, unknown = {name: o for name, (o, _) in found.items()}, {name: u for name, (_, u) in found.items() if u}
    for name, files in unknown.items():
        logger.warning("method %s: %d pictures belong to none of the data's, first %s", name, len(files), files[0])
    model, weights = find_model(cfg.model), weight_digests(cfg)
    with cluster.connected(num_cpus=local_cpus(cfg)):
        digests = inspect_pictures(cfg, pictures)
        protocol = protocol_of(cfg, digests, weights)
        if cfg.dry_run:
            print(json.dumps({"protocol": protocol, "protocol_digest": protocol_digest(protocol)}, indent=2))
            return None
        with owned(cfg.report):
            remember_identity(cfg, protocol, model)
            measured = measure(cfg, pictures, outputs, model, weights)
            header = header_of(cfg, protocol, model, measured, unknown)
            results.write_scores(cfg.report, header, measured.scores)
            results.write_pages(cfg.report)
    run_id = log_report(cfg, header)
    with results.report_folder(cfg.report) as folder:
        table = results.read_score_table(folder)
    return Evaluation(cfg.report, header, run_id, "\n".join(results.means_table(table)))


def checked(cfg: EvaluateConfig) -> EvaluateConfig:
    """`cfg` with absolute places. Raises RequestError for what can be seen without looking at a picture."""
    if not cfg.report:
        raise ConfigError("report: required, and missing; give the folder or s3:// URI of the report")
    if not cfg.model and not cfg.method:
        raise ConfigError("model: there is nothing to evaluate; give --model, or --method name=folder, or both")
    for name, file in cfg.weight_files.items():
        if not Path(file).is_file():
            raise ConfigError(f"weights: {name}={file}: there is no such file; give another, or leave it out")
    methods = tuple(f"{name}={open_storage(folder).uri}" for name, folder in cfg.methods.items())
    weights = tuple(f"{name}={Path(file).resolve()}" for name, file in cfg.weight_files.items())
    report = open_storage(cfg.report).uri
    return cfg.model_copy(
        update={
            "data": open_storage(cfg.data).uri,
            "report": report,
            "cache": open_storage(cfg.cache or f"{report}/cache").uri,
            "method": methods,
            "weights": weights,
        }
    )


def find_model(uri: str) -> Model:
    """The model, looked up and digested; an alias becomes the version it names now."""
    if not uri:
        return Model()
    from pipelines.training.export import model_digest
    from pipelines.training.start_model import local_model

    if uri.startswith("models:"):
        version = resolve_model(uri).version
        return Model(f"models:/{version}", version, model_digest(uri))
    known = folder_exists(uri) or Path(uri).is_dir()
    absolute = open_storage(uri).uri if known else uri
    return Model(absolute, uri, model_digest(absolute if "://" in absolute else local_model(absolute)))


def weight_digests(cfg: EvaluateConfig) -> dict[str, str]:
    """sha256 of every file of weights that was given."""
    return {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in cfg.weight_files.items()}


def local_cpus(cfg: EvaluateConfig) -> int:
    """Logical CPUs of a Ray that the job starts itself."""
    return max(4, math.ceil((cfg.workers.restorers + cfg.workers.scorers) * cfg.workers.num_cpus) + 1)


def protocol_of(cfg: EvaluateConfig, digests: dict[str, str], weights: dict[str, str]) -> dict[str, Any]:
    """The resolved protocol. Raises ConfigError where it names other pictures than these."""
    digest, wanted = data_digest(digests), cfg.pictures.digest
    if wanted and wanted != digest:
        raise ConfigError(
            f"pictures.digest: the protocol means the pictures {wanted}, and {cfg.data} holds {digest} "
            f"({len(digests)} pictures); give those, or another protocol"
        )
    return resolved_protocol(
        cfg, data_digest=digest, num_pictures=len(digests), versions=results.versions(), weights=weights
    )


def remember_identity(cfg: EvaluateConfig, protocol: dict[str, Any], model: Model) -> None:
    """A report belongs to one protocol and model. Raises ConfigError where it holds, or was begun with, another."""
    storage = open_storage(cfg.report)
    identity = {"protocol_digest": protocol_digest(protocol), "model_digest": model.digest}
    if storage.exists(_IDENTITY_NAME):
        before = json.loads(storage.read_bytes(_IDENTITY_NAME))
        changed = [name for name, value in identity.items() if before.get(name) != value]
        if changed:
            raise ConfigError(
                f"report: {cfg.report} was begun with another {' and '.join(changed).replace('_digest', '')}; "
                "give another folder"
            )
    storage.write_bytes_atomic(_IDENTITY_NAME, (json.dumps(identity, indent=2) + "\n").encode())


def measure(
    cfg: EvaluateConfig,
    pictures: Sequence[EvaluationPicture],
    outputs: dict[str, dict[str, Place]],
    model: Model,
    weights: dict[str, str],
) -> Measured:
    """Restored and scored; scores in the order of methods, pictures and metrics, whoever was first."""
    measured = measure_pictures(
        cfg, pictures, outputs, model=model.uri, model_digest=model.digest, weights=weights, cache=cfg.cache
    )
    order = {name: place for place, name in enumerate([OURS, *cfg.methods, INPUT, REFERENCE])}
    scores = sorted(measured.scores, key=lambda score: order[score.method])
    return Measured(measured.pictures, scores)


def header_of(
    cfg: EvaluateConfig,
    protocol: dict[str, Any],
    model: Model,
    measured: Measured,
    unknown: dict[str, list[str]],
) -> dict[str, Any]:
    """report.json."""
    missing = sum(score.value is None and score.reason not in NOT_APPLICABLE for score in measured.scores)
    methods = list(dict.fromkeys(score.method for score in measured.scores))
    return {
        "protocol": protocol,
        "protocol_digest": protocol_digest(protocol),
        "model": {"uri": model.uri, "version": model.version, "digest": model.digest} if model.uri else {},
        "versions": results.versions(),
        "machine": results.machine(),
        "counts": {"pictures": len(measured.pictures), "scores": len(measured.scores), "missing_scores": missing},
        "methods": methods,
        "metrics": [describe(metric.name) for metric in cfg.metrics],
        "pictures": measured.pictures,
        "unknown_outputs": unknown,
    }


def summary(result: Evaluation) -> str:
    """What a person wants to know at the end."""
    counts = result.header["counts"]
    return "\n".join(
        [
            "",
            result.means,
            "",
            f"{counts['pictures']} pictures; {counts['missing_scores']} of {counts['scores']} scores are missing"
            f"{', each with its reason in report.md' if counts['missing_scores'] else ''}",
            f"  look first  {result.report}/report.html",
            f"  report      {result.report}/report.md",
            f"  protocol    {result.header['protocol_digest']}",
            f"  run         {result.run_id}",
        ]
    )


if __name__ == "__main__":
    run_job(main, user_errors=(InputError,))

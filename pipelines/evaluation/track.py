"""A report into MLflow: a run per report, with the protocol as parameters, means as metrics and files as artefacts.

The tags are what the gate (pipelines/promote.py) looks for: protocol, its digest, and the digest of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.evaluation import results
from pipelines.evaluation.figures import file_stem
from pipelines.evaluation.protocol import EvaluateConfig
from pipelines.evaluation.score_table import HEADER_NAME, SCORES_NAME, ScoreTable, read_score_table
from pipelines.evaluation.statistics import summarize
from sr_platform.mlflow_client import open_client, patiently
from sr_platform.storage import open_storage
from sr_platform.tracking import Tracking

PROTOCOL_TAG = "evaluation_protocol"
PROTOCOL_DIGEST_TAG = "evaluation_protocol_digest"
MODEL_WEIGHTS_TAG = "model_weights_digest"
"""Of the weights alone, wherever they lie; a registered version's own digest is of its whole folder."""
ARTIFACTS = (HEADER_NAME, SCORES_NAME, results.REPORT_NAME, "report.html")
_RUN_NAME = "run.json"


def log_report(cfg: EvaluateConfig, header: Mapping[str, Any]) -> str:
    """The id of the run of the report in `cfg.report`, which holds it now; a report has one run however often it comes.

    Raises:
        RequestError: the tracking server does not answer.
    """
    storage = open_storage(cfg.report)
    local = Path(storage.uri) if storage.is_local else Path.cwd()
    runs = Tracking.open(default_path=local, experiment=cfg.experiment)
    before = json.loads(storage.read_bytes(_RUN_NAME)) if storage.exists(_RUN_NAME) else {}
    run_id = str(before.get("run_id", ""))
    if before.get("uri") != runs.shown_uri or not runs.resume(run_id):
        run_id = runs.start(f"evaluate {cfg.name}", params=header["protocol"], tags=tags(cfg, header))
    with results.report_folder(cfg.report) as folder:
        metrics = means(read_score_table(folder))
        patiently(runs.uri, lambda: _log(open_client(runs.uri), run_id, metrics, folder))
    runs.finish(run_id)
    record = {"uri": runs.shown_uri, "run_id": run_id}
    storage.write_bytes_atomic(_RUN_NAME, (json.dumps(record, indent=2) + "\n").encode())
    return run_id


def tags(cfg: EvaluateConfig, header: Mapping[str, Any]) -> dict[str, str]:
    """Of a run: what was evaluated, and by which rules."""
    protocol, model = header["protocol"], header["model"]
    return {
        PROTOCOL_TAG: cfg.name,
        PROTOCOL_DIGEST_TAG: header["protocol_digest"],
        MODEL_WEIGHTS_TAG: model.get("digest", ""),
        "model_version": model.get("version", ""),
        "data_digest": protocol["pictures"]["digest"],
        "report": cfg.report,
    }


def means(table: ScoreTable) -> dict[str, float]:
    """ "eval/ours/psnr" and how many pictures it is a mean of; MLflow allows no "+" in names."""
    found: dict[str, float] = {}
    for method in table.methods:
        for metric in table.metrics:
            summary = summarize(table.scores(method, metric.name), num_resamples=1)
            name = f"eval/{file_stem(method)}/{file_stem(metric.name)}"
            found[f"{name}.pictures"] = float(summary.num_scored)
            if summary.mean is not None:
                found[name] = summary.mean
    return found


def _log(client: Any, run_id: str, metrics: Mapping[str, float], folder: Path) -> None:
    for name, value in metrics.items():
        client.log_metric(run_id, name, value)
    for name in ARTIFACTS:
        client.log_artifact(run_id, str(folder / name))
    client.log_artifacts(run_id, str(folder / results.FIGURES_NAME), results.FIGURES_NAME)

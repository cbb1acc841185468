"""The evaluation of a registered version, found in MLflow: the newest finished run of its weights under a protocol."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.evaluation.score_table import HEADER_NAME, SCORES_NAME, ScoreTable, read_score_table
from pipelines.evaluation.track import MODEL_WEIGHTS_TAG, PROTOCOL_TAG
from sr_platform.mlflow_client import at_start
from sr_platform.model_registry import version_tags

_MAX_RUNS = 1000
_FILES = (HEADER_NAME, SCORES_NAME)


@dataclass(frozen=True)
class Evidence:
    """One evaluation, as its run holds it."""

    run_id: str
    table: ScoreTable


def find_evidence(name: str, version: int, *, protocol: str, experiment: str) -> Evidence | None:
    """None where no finished run under `protocol` is of this version, or of other files with the same weights.

    Raises:
        RequestError: the registry does not answer, or has no such version.
        InputDataError: what the run holds is no report.
    """
    version_tags(name, version)
    uri = os.environ["MLFLOW_TRACKING_URI"]
    runs = at_start(uri, lambda client: _runs(client, experiment, protocol))
    own = next((run for run in runs if run.data.tags.get("model_version") == f"{name}/{version}"), None)
    if own is None and runs:
        from pipelines.training.export import model_digest  # diffusers takes seconds to import

        digest = model_digest(f"models:/{name}/{version}")
        own = next((run for run in runs if run.data.tags.get(MODEL_WEIGHTS_TAG) == digest), None)
    if own is None:
        return None
    run_id = own.info.run_id
    with tempfile.TemporaryDirectory(prefix="evidence-") as folder:
        at_start(uri, lambda client: [client.download_artifacts(run_id, file, folder) for file in _FILES])
        return Evidence(run_id, read_score_table(Path(folder)))


def _runs(client: Any, experiment: str, protocol: str) -> list[Any]:
    """Finished ones, the newest first."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    wanted = f"attributes.status = 'FINISHED' and tags.{PROTOCOL_TAG} = '{protocol}'"
    order = ["attributes.start_time DESC"]
    return list(client.search_runs([found.experiment_id], wanted, max_results=_MAX_RUNS, order_by=order))

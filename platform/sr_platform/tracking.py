"""MLflow: runs with their metrics, registered versions with aliases and lineage, and models by URI.

The tracking server is the one of MLFLOW_TRACKING_URI; without it, an SQLite file beside the output of the job.
A driver opens the runs (SQLite races when several processes create its tables) and rank 0 alone writes into them.

    runs = Tracking.open(default_path=out, experiment="faithdiff")
    parent = runs.start("train nano", params={...}, tags={...})
    RunLog(runs.uri, parent).log(step=10, metrics={"train/loss": 0.8})
    version = runs.register_folder(folder, name="faithdiff-nano", alias="candidate", run_id=parent, tags={...})
    resolve_model("models:/faithdiff-nano@candidate").path
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from sr_platform.errors import RequestError

MANIFEST_DIGEST_TAG = "manifest_digest"
_MODEL_URI = re.compile(r"^models:/+(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$")
_CACHE_PATH = Path.home() / ".cache" / "sr_platform" / "models"
_MAX_METRICS_PER_CALL = 1000
_MAX_PARAMS_PER_CALL = 100


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies and what it is called in reports and response headers."""

    path: str
    """A local folder, or the preset name that was given."""
    version: str
    """`name/3` of a registered model, a preset's name, or "folder"."""
    manifest_digest: str | None
    """Of the dataset it was trained on, where the registry knows it."""


@dataclass(frozen=True)
class Metric:
    key: str
    value: float
    step: int


def tracking_uri(default_path: Path) -> str:
    """MLFLOW_TRACKING_URI, or an SQLite file in `default_path`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{default_path.resolve() / 'mlflow.db'}"


def resolve_model(uri: str, cache_path: Path | None = None) -> ModelSource:
    """The model of `models:/name@alias` or `models:/name/3`, downloaded once; a preset name or a folder as it is.

    A version never changes, so a download in `cache_path` is used again.

    Raises:
        RequestError: not a model URI, or the registry has no such model, alias or version.
    """
    if not uri.startswith("models:"):
        path = unquote(urlparse(uri).path) if uri.startswith("file://") else uri
        return ModelSource(path, "folder" if Path(path).is_dir() else uri, None)
    match = _MODEL_URI.match(uri)
    if match is None:
        raise RequestError(f"model: got {uri!r}; a registered model is models:/name@alias or models:/name/3")
    if "MLFLOW_TRACKING_URI" not in os.environ:
        raise RequestError(
            f"model: {uri} is looked up in the registry of MLFLOW_TRACKING_URI, which is not set; "
            "set it to the tracking server, or to sqlite:////path/to/mlflow.db"
        )
    version = _find_version(_client(os.environ["MLFLOW_TRACKING_URI"]), uri, **match.groupdict())
    return ModelSource(
        path=str(_download(version, cache_path or _CACHE_PATH)),
        version=f"{version.name}/{version.version}",
        manifest_digest=version.tags.get(MANIFEST_DIGEST_TAG),
    )


class RunLog:
    """Writes metrics into a run that exists already. For rank 0: one writer per run."""

    def __init__(self, uri: str, run_id: str) -> None:
        self._client, self._run_id = _client(uri), run_id

    def log(self, metrics: Sequence[Metric]) -> None:
        """All of `metrics` in as few requests as the server takes."""
        from mlflow.entities import Metric as MlflowMetric

        now_ms = int(time.time() * 1000)
        entities = [MlflowMetric(m.key, m.value, now_ms, m.step) for m in metrics]
        for first in range(0, len(entities), _MAX_METRICS_PER_CALL):
            self._client.log_batch(self._run_id, metrics=entities[first : first + _MAX_METRICS_PER_CALL])

    def latest(self) -> dict[str, float]:
        """The last value of every metric of the run, by key."""
        return dict(self._client.get_run(self._run_id).data.metrics)


@dataclass(frozen=True)
class Tracking:
    """One experiment on one tracking server."""

    uri: str
    experiment_id: str

    @classmethod
    def open(cls, *, default_path: Path, experiment: str) -> Tracking:
        """The experiment, created where it does not exist. SQLite keeps its artefacts beside the database file."""
        uri = tracking_uri(default_path)
        client = _client(uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return cls(uri, found.experiment_id)
        location = None
        if uri.startswith("sqlite:"):
            # MLflow's own default is a folder of the current directory, which no other process would find.
            location = (Path(urlparse(uri).path[1:]).parent / "mlartifacts").resolve().as_uri()
        return cls(uri, client.create_experiment(experiment, artifact_location=location))

    def start(
        self, name: str, *, parent_run_id: str | None = None, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> str:
        """The id of a new, running run, nested under `parent_run_id`; nested parameters become dotted names."""
        from mlflow.entities import Param
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        client = _client(self.uri)
        nesting = {MLFLOW_PARENT_RUN_ID: parent_run_id} if parent_run_id else {}
        run_id: str = client.create_run(self.experiment_id, run_name=name, tags={**nesting, **tags}).info.run_id
        flat = [Param(key, str(value)) for key, value in flatten(params).items()]
        for first in range(0, len(flat), _MAX_PARAMS_PER_CALL):
            client.log_batch(run_id, params=flat[first : first + _MAX_PARAMS_PER_CALL])
        return run_id

    def resume(self, run_id: str) -> bool:
        """Sets an earlier run running again; False where the server does not know it."""
        from mlflow.exceptions import MlflowException

        try:
            _client(self.uri).update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if _is_missing(error):
                return False
            raise
        return True

    def finish(self, run_id: str, *, failed: bool = False) -> None:
        _client(self.uri).set_terminated(run_id, "FAILED" if failed else "FINISHED")

    def register_folder(
        self, folder: Path, *, name: str, alias: str, run_id: str, tags: Mapping[str, str], artifact: str = "model"
    ) -> str:
        """The new version of `name`: `folder` as an artefact of the run, with `tags`, and `alias` moved to it.

        One run gives one version: a second call for the same run returns the first one's version.
        """
        client = _client(self.uri)
        _create_registered_model(client, name)
        earlier = client.search_model_versions(f"name='{name}' and run_id='{run_id}'")
        if earlier:
            version = earlier[0]
        else:
            client.log_artifacts(run_id, str(folder), artifact_path=artifact)
            source = f"{client.get_run(run_id).info.artifact_uri}/{artifact}"
            version = client.create_model_version(name, source=source, run_id=run_id, tags=dict(tags))
        client.set_registered_model_alias(name, alias, version.version)
        return str(version.version)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _client(uri: str) -> Any:
    # MLflow takes seconds to import, and a preset name needs none of it.
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _create_registered_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _find_version(client: Any, uri: str, *, name: str, alias: str | None, version: str | None) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(name)
        if alias is not None:
            # MLflow answers a missing alias with the same error as a malformed request.
            if alias not in model.aliases:
                raise RequestError(f"model: {uri}: {name} has the aliases {sorted(model.aliases) or 'none'}; give one")
            version = model.aliases[alias]
        return client.get_model_version(name, str(version))
    except MlflowException as error:
        if not _is_missing(error):
            raise
        raise RequestError(
            f"model: {uri} is not in the registry; it has {_registered_names(client) or 'no models'}"
        ) from error


def _is_missing(error: Any) -> bool:
    return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")


def _registered_names(client: Any) -> str:
    return ", ".join(sorted(model.name for model in client.search_registered_models(max_results=20)))


def _download(version: Any, cache_path: Path) -> Path:
    """The local folder of a version; it appears under its name only when complete."""
    import mlflow.artifacts

    # Another server may have the same name and number for another model.
    identity = hashlib.sha256(f"{version.source} {version.run_id} {version.creation_timestamp}".encode()).hexdigest()
    target = cache_path / f"{version.name}-{version.version}-{identity[:12]}"
    if target.is_dir():
        return target
    cache_path.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache_path))
    try:
        downloaded = mlflow.artifacts.download_artifacts(
            artifact_uri=version.source, dst_path=str(partial), tracking_uri=os.environ["MLFLOW_TRACKING_URI"]
        )
        # Two downloads of one version may finish together; the folders are equal and the first one stays.
        if not target.is_dir():
            Path(downloaded).rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target

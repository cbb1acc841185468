"""MLflow for the driver of a job: runs with their parameters and tags, and versions of models in the registry.

The tracking server is the one of MLFLOW_TRACKING_URI; without it, an SQLite file beside the output of the job.
A driver opens the runs (SQLite races when several processes create its tables); rank 0 alone writes into them, with
run_log.RunLog. A server that is lost on the way is waited for; one that cannot be reached at the start is an error.

    runs = Tracking.open(default_path=out, experiment="faithdiff")
    parent = runs.start("train nano", params={...}, tags={...})
    version = runs.register_model("s3://b/model", name="faithdiff-nano", alias="candidate", run_id=parent, ...)
    runs.finish(parent)
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

from sr_platform.errors import InputDataError, TrackingError
from sr_platform.mlflow_client import (
    PATIENCE_S,
    START_PATIENCE_S,
    at_start,
    is_missing,
    open_client,
    patiently,
    public_uri,
)
from sr_platform.model_registry import MODEL_DIGEST_TAG, MODEL_URI_TAG, local_path

_START_TAG = "start_id"
_MAX_PARAMS_PER_CALL = 100

logger = logging.getLogger(__name__)

T = TypeVar("T")


def tracking_uri(default_path: Path) -> str:
    """MLFLOW_TRACKING_URI without a server's password, or an SQLite file in `default_path`."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return public_uri(given) if given else f"sqlite:///{default_path.resolve() / 'mlflow.db'}"


@dataclass(frozen=True)
class Tracking:
    """One experiment on one tracking server."""

    uri: str
    experiment_id: str
    patience_s: float = PATIENCE_S
    """How long every call waits for a server that is away, before it raises TrackingError."""

    @classmethod
    def open(cls, *, default_path: Path, experiment: str) -> Tracking:
        """The experiment, created where it does not exist. SQLite keeps its artefacts beside the database file.

        Raises:
            RequestError: the server does not answer within about 20 s, or the URI is none that MLflow knows.
        """
        uri = tracking_uri(default_path)
        return cls(uri, at_start(uri, lambda client: _experiment_id(client, uri, experiment)))

    def start(
        self, name: str, *, parent_run_id: str | None = None, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> str:
        """The id of a new, running run, nested under `parent_run_id`; nested parameters become dotted names."""
        from mlflow.entities import Param
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        start_id = uuid.uuid4().hex
        nesting = {MLFLOW_PARENT_RUN_ID: parent_run_id} if parent_run_id else {}
        marks = {**nesting, **tags, _START_TAG: start_id}

        def create(client: Any) -> str:
            # The answer to an earlier attempt may have been lost, and its run would seem to run for ever.
            found = client.search_runs([self.experiment_id], f"tags.{_START_TAG} = '{start_id}'", max_results=1)
            run = found[0] if found else client.create_run(self.experiment_id, run_name=name, tags=marks)
            return str(run.info.run_id)

        def log_params(client: Any) -> None:
            for first in range(0, len(flat), _MAX_PARAMS_PER_CALL):
                client.log_batch(run_id, params=flat[first : first + _MAX_PARAMS_PER_CALL], synchronous=True)

        run_id, flat = self._call(create), [Param(key, str(value)) for key, value in flatten(params).items()]
        self._call(log_params)
        return run_id

    def resume(self, run_id: str) -> bool:
        """Sets an earlier run running again; False where the server does not know it."""
        from mlflow.exceptions import MlflowException

        try:
            self._call(lambda client: client.update_run(run_id, status="RUNNING"))
        except MlflowException as error:
            if is_missing(error):
                return False
            raise
        return True

    def finish(self, run_id: str, *, failed: bool = False) -> None:
        """Ends a run. What made it fail counts more than a lost server: then it waits 20 s and only warns."""
        if not failed:
            self._call(lambda client: client.set_terminated(run_id, "FINISHED"))
            return
        try:
            self._call(lambda client: client.set_terminated(run_id, "FAILED"), START_PATIENCE_S)
        except TrackingError as error:
            logger.warning("%s; run %s stays marked as running", error, run_id)

    def register_model(
        self, uri: str, *, name: str, alias: str, run_id: str, digest: str, tags: Mapping[str, str]
    ) -> str:
        """The new version of `name`, with `alias` moved to it; the model's files are where `uri` says.

        A model in s3:// stays there, and one in a local folder too when the registry is an SQLite file: whoever can
        read the registry can read them. To a server a local folder is uploaded, as the run's artefact `model`.
        `digest` (sha256, hexadecimal) and the place become tags. One run gives one version: a second call for the
        same run returns the first one's version.

        Raises:
            InputDataError: `uri` is neither s3:// nor an existing folder.
        """
        self._call(lambda client: _create_registered_model(client, name))
        version = self._call(lambda client: _find_version_of_run(client, name, run_id))
        if version is None:
            source = self._place(uri, run_id)
            told = {**tags, MODEL_URI_TAG: source, MODEL_DIGEST_TAG: digest}
            version = self._call(lambda client: _create_version(client, name, source, run_id, told))
        self._call(lambda client: client.set_registered_model_alias(name, alias, version))
        return version

    def _place(self, uri: str, run_id: str) -> str:
        """Where everybody who reads the registry finds the model, which is uploaded only where it must be."""
        if uri.startswith("s3://"):
            return uri.rstrip("/")
        path = Path(local_path(uri) or "").resolve()
        if local_path(uri) is None or not path.is_dir():
            raise InputDataError(f"model: {uri} is not a folder; give a folder, or s3://bucket/prefix")
        if self.uri.startswith("sqlite:"):
            return path.as_uri()
        # File by file, so that a lost server costs one file and not all of them.
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            self._upload(run_id, file, Path("model") / file.parent.relative_to(path))
        return f"{self._call(lambda client: client.get_run(run_id).info.artifact_uri)}/model"

    def _upload(self, run_id: str, file: Path, artifact_folder: Path) -> None:
        self._call(lambda client: client.log_artifact(run_id, str(file), artifact_folder.as_posix()))

    def _call(self, call: Callable[[Any], T], patience_s: float | None = None) -> T:
        return patiently(self.uri, lambda: call(open_client(self.uri)), patience_s or self.patience_s)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _experiment_id(client: Any, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if uri.startswith("sqlite:"):
        # MLflow's own default is a folder of the current directory, which no other process would find.
        location = (Path(urlparse(uri).path[1:]).parent / "mlartifacts").resolve().as_uri()
    return str(client.create_experiment(name, artifact_location=location))


def _create_registered_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _find_version_of_run(client: Any, name: str, run_id: str) -> str | None:
    found = client.search_model_versions(f"name='{name}' and run_id='{run_id}'")
    return str(found[0].version) if found else None


def _create_version(client: Any, name: str, source: str, run_id: str, tags: Mapping[str, str]) -> str:
    # The answer to an earlier attempt may have been lost.
    earlier = _find_version_of_run(client, name, run_id)
    return earlier or str(client.create_model_version(name, source=source, run_id=run_id, tags=dict(tags)).version)

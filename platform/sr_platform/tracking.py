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

import hashlib
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
    reason,
    without_credentials,
)
from sr_platform.model_registry import MODEL_DIGEST_TAG, MODEL_URI_TAG, local_path

_START_TAG = "start_id"
_MAX_PARAMS_PER_CALL = 100
_MAX_PARAM_CHARACTERS = 6000
_MAX_TAG_CHARACTERS = 8000
_DIGEST_CHARACTERS = 12
_DELETED = "deleted"

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

    @property
    def shown_uri(self) -> str:
        """`uri` for people and files: without the password that a database needs."""
        return without_credentials(self.uri)

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
        """The id of a new, running run, nested under `parent_run_id`; nested parameters become dotted names.

        Of parameters above 6,000 and tags above 8,000 characters, MLflow's limits, the start and a digest are kept.
        """
        from mlflow.entities import Param
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        start_id = uuid.uuid4().hex
        nesting = {MLFLOW_PARENT_RUN_ID: parent_run_id} if parent_run_id else {}
        marks = {**nesting, **_fitting(tags), _START_TAG: start_id}

        def create(client: Any) -> str:
            # The answer to an earlier attempt may have been lost, and its run would seem to run for ever.
            found = client.search_runs([self.experiment_id], f"tags.{_START_TAG} = '{start_id}'", max_results=1)
            run = found[0] if found else client.create_run(self.experiment_id, run_name=name, tags=marks)
            return str(run.info.run_id)

        def log_params(client: Any) -> None:
            for first in range(0, len(flat), _MAX_PARAMS_PER_CALL):
                client.log_batch(run_id, params=flat[first : first + _MAX_PARAMS_PER_CALL], synchronous=True)

        texts = {key: shortened(str(value), _MAX_PARAM_CHARACTERS) for key, value in flatten(params).items()}
        run_id, flat = self._call(create), [Param(key, text) for key, text in texts.items()]
        self._call(log_params)
        return run_id

    def resume(self, run_id: str) -> bool:
        """Sets an earlier run running again; False where the server does not know it, or it was deleted there."""
        from mlflow.exceptions import MlflowException

        def set_running(client: Any) -> bool:
            if client.get_run(run_id).info.lifecycle_stage == _DELETED:
                return False
            client.update_run(run_id, status="RUNNING")
            return True

        try:
            return self._call(set_running)
        except MlflowException as error:
            if is_missing(error):
                return False
            raise

    def finish(self, run_id: str, *, failed: bool = False) -> None:
        """Ends a run. What was done, or what made it fail, counts more than a server that does not note it: it warns.

        It waits for a lost server as every call does, but 20 s only where the run failed.
        """
        from mlflow.exceptions import MlflowException

        status, patience_s = ("FAILED", START_PATIENCE_S) if failed else ("FINISHED", self.patience_s)
        try:
            self._call(lambda client: client.set_terminated(run_id, status), patience_s)
        except (TrackingError, MlflowException) as error:
            logger.warning("tracking: run %s is not marked as %s: %s", run_id, status, reason(error, self.uri))

    def register_model(
        self, uri: str, *, name: str, alias: str, run_id: str, digest: str, tags: Mapping[str, str]
    ) -> str:
        """The new version of `name`, with `alias` moved to it; the model's files are where `uri` says.

        A model in s3:// stays there, and one in a local folder too when the registry is an SQLite file: whoever can
        read the registry can read them. To a server a local folder is uploaded, as the run's artefact `model-<digest>`.
        `digest` (sha256, hexadecimal) and the place become tags. One run and digest give one version: a second call
        with the same returns the first one's version.

        Raises:
            InputDataError: `uri` is neither s3:// nor an existing folder.
        """
        self._call(lambda client: _create_registered_model(client, name))
        version = self._call(lambda client: _find_version(client, name, run_id, digest))
        if version is None:
            source = self._place(uri, run_id, digest)
            told = {**_fitting(tags), MODEL_URI_TAG: source, MODEL_DIGEST_TAG: digest}
            version = self._call(lambda client: _create_version(client, name, source, run_id, told))
        self._call(lambda client: client.set_registered_model_alias(name, alias, version))
        return version

    def _place(self, uri: str, run_id: str, digest: str) -> str:
        """Where everybody who reads the registry finds the model, which is uploaded only where it must be."""
        if uri.startswith("s3://"):
            return uri.rstrip("/")
        path = Path(local_path(uri) or "").resolve()
        if local_path(uri) is None or not path.is_dir():
            raise InputDataError(f"model: {uri} is not a folder; give a folder, or s3://bucket/prefix")
        if self.uri.startswith("sqlite:"):
            return path.as_uri()
        # Another model of the same run must not replace files of this one.
        artifact = f"model-{digest[:_DIGEST_CHARACTERS]}"
        # File by file, so that a lost server costs one file and not all of them.
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            self._upload(run_id, file, Path(artifact) / file.parent.relative_to(path))
        return f"{self._call(lambda client: client.get_run(run_id).info.artifact_uri)}/{artifact}"

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


def shortened(text: str, max_characters: int) -> str:
    """`text`, or its start with the length and sha256 of the whole where it is longer."""
    if len(text) <= max_characters:
        return text
    end = f"... ({len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()})"
    return text[: max_characters - len(end)] + end


def _fitting(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: shortened(value, _MAX_TAG_CHARACTERS) for key, value in tags.items()}


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


def _find_version(client: Any, name: str, run_id: str, digest: str) -> str | None:
    found = client.search_model_versions(f"name='{name}' and run_id='{run_id}'")
    return next((str(version.version) for version in found if version.tags.get(MODEL_DIGEST_TAG) == digest), None)


def _create_version(client: Any, name: str, source: str, run_id: str, tags: Mapping[str, str]) -> str:
    # The answer to an earlier attempt may have been lost.
    earlier = _find_version(client, name, run_id, tags[MODEL_DIGEST_TAG])
    return earlier or str(client.create_model_version(name, source=source, run_id=run_id, tags=dict(tags)).version)

"""A model by its URI -> a local folder: `models:/name@alias` and `models:/name/3` come from MLflow's registry.

    resolve_model("models:/faithdiff-nano@champion").path
    give_alias("faithdiff-nano", "champion", 3, tags={"gate": "passed"})

The registry is that of MLFLOW_TRACKING_URI. Versions in s3:// are fetched with the credentials of the environment,
and those in a local folder are used where they lie.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from sr_platform.errors import RequestError
from sr_platform.mlflow_client import START_PATIENCE_S, at_start, is_missing, patiently, public_uri
from sr_platform.storage import open_storage

MANIFEST_DIGEST_TAG = "manifest_digest"
MODEL_DIGEST_TAG = "model_digest"
MODEL_URI_TAG = "model_uri"
_MODEL_URI = re.compile(r"^models:/+(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$")
_CACHE_PATH = Path.home() / ".cache" / "sr_platform" / "models"


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies and what it is called in reports and response headers."""

    path: str
    """A local folder, or the preset name that was given."""
    version: str
    """`name/3` of a registered model, a preset's name, or "folder"."""
    manifest_digest: str | None
    """Of the dataset it was trained on, where the registry knows it."""


def resolve_model(uri: str, cache_path: Path | None = None) -> ModelSource:
    """The model of `models:/name@alias` or `models:/name/3`, downloaded once; a preset name or a folder as it is.

    A version never changes, so a download in `cache_path` is used again.

    Raises:
        RequestError: not a model URI, the registry does not answer, it has no such model, alias or version, or the
            files of the version are gone.
    """
    match = _match(uri)
    if match is None:
        path = local_path(uri) or uri
        return ModelSource(path, "folder" if Path(path).is_dir() else uri, None)
    registry_uri = _registry_uri(uri)
    version = at_start(registry_uri, lambda client: _find_version(client, uri, **match.groupdict()))
    return ModelSource(
        path=str(_fetch(version, public_uri(registry_uri), cache_path or _CACHE_PATH)),
        version=f"{version.name}/{version.version}",
        manifest_digest=version.tags.get(MANIFEST_DIGEST_TAG),
    )


def find_version(uri: str) -> str:
    """What `resolve_model` would call the model's version now; asks the registry and fetches nothing. Raises as it."""
    match = _match(uri)
    if match is None:
        path = local_path(uri) or uri
        return "folder" if Path(path).is_dir() else uri
    version = at_start(_registry_uri(uri), lambda client: _find_version(client, uri, **match.groupdict()))
    return f"{version.name}/{version.version}"


def alias_version(name: str, alias: str) -> int | None:
    """The version that an alias of a registered model names; None where it names none.

    Raises:
        RequestError: the registry does not answer, or has no such model.
    """
    aliases = at_start(_registry_uri(name), lambda client: _find_model(client, name)).aliases
    return int(aliases[alias]) if alias in aliases else None


def version_tags(name: str, version: int) -> dict[str, str]:
    """The tags of a version. Raises RequestError where the registry does not answer, or has no such version."""
    uri = f"models:/{name}/{version}"
    found = at_start(_registry_uri(uri), lambda client: _find_version(client, uri, name, None, str(version)))
    return dict(found.tags)


def tag_version(name: str, version: int, tags: Mapping[str, str]) -> None:
    """Sets tags of a version. Raises as `version_tags` does."""
    version_tags(name, version)

    def set_tags(client: Any) -> None:
        for key, value in tags.items():
            client.set_model_version_tag(name, str(version), key, value)

    at_start(_registry_uri(name), set_tags)


def give_alias(name: str, alias: str, version: int, tags: Mapping[str, str]) -> None:
    """Tags a version and moves an alias to it, in this order: whoever finds the alias finds the tags.

    Raises:
        RequestError: as `version_tags`.
    """
    tag_version(name, version, tags)
    at_start(_registry_uri(name), lambda client: client.set_registered_model_alias(name, alias, str(version)))


def local_path(uri: str) -> str | None:
    """The path of a file:// URI or of a path; None of any other URI."""
    if uri.startswith("file:"):
        return unquote(urlparse(uri).path)
    return None if "://" in uri or uri.startswith("mlflow-artifacts:") else uri


def _match(uri: str) -> re.Match[str] | None:
    """The parts of a registered model's URI; None for a preset or a folder."""
    if not uri.startswith("models:"):
        return None
    match = _MODEL_URI.match(uri)
    if match is None:
        raise RequestError(f"model: got {uri!r}; a registered model is models:/name@alias or models:/name/3")
    return match


def _registry_uri(wanted: str) -> str:
    if "MLFLOW_TRACKING_URI" not in os.environ:
        raise RequestError(
            f"model: {wanted} is looked up in the registry of MLFLOW_TRACKING_URI, which is not set; "
            "set it to the tracking server, or to sqlite:////path/to/mlflow.db"
        )
    return os.environ["MLFLOW_TRACKING_URI"]


def _find_model(client: Any, name: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if not is_missing(error):
            raise
        raise RequestError(
            f"model: {name} is not in the registry; it has {_registered_names(client) or 'no models'}"
        ) from error


def _find_version(client: Any, uri: str, name: str, alias: str | None, version: str | None) -> Any:
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
        if not is_missing(error):
            raise
        raise RequestError(
            f"model: {uri} is not in the registry; it has {_registered_names(client) or 'no models'}"
        ) from error


def _registered_names(client: Any) -> str:
    return ", ".join(sorted(model.name for model in client.search_registered_models(max_results=20)))


def _fetch(version: Any, registry_uri: str, cache_path: Path) -> Path:
    """The local folder of a version; in the cache it appears under its name only when complete."""
    if (path := local_path(version.source)) is not None:
        if not Path(path).is_dir():
            raise RequestError(
                f"model: models:/{version.name}/{version.version} lies in {path}, which is not here; "
                "use the machine that registered it, or register the model from s3:// storage"
            )
        return Path(path)
    # Another server may have the same name and number for another model.
    identity = hashlib.sha256(f"{version.source} {version.run_id} {version.creation_timestamp}".encode()).hexdigest()
    target = cache_path / f"{version.name}-{version.version}-{identity[:12]}"
    if target.is_dir():
        return target
    cache_path.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache_path))
    try:
        downloaded = _download(version.source, registry_uri, partial)
        # Two downloads of one version may finish together; the folders are equal and the first one stays.
        if not target.is_dir():
            downloaded.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _download(source: str, registry_uri: str, folder: Path) -> Path:
    """The folder, in `folder`, that holds everything below `source`."""
    if not source.startswith("s3://"):
        import mlflow.artifacts

        def download() -> str:
            return str(
                mlflow.artifacts.download_artifacts(
                    artifact_uri=source, dst_path=str(folder), tracking_uri=registry_uri
                )
            )

        return Path(patiently(registry_uri, download, START_PATIENCE_S))
    here, there = open_storage(folder / "model"), open_storage(source)
    names = there.list()
    if not names:
        raise RequestError(f"model: {source} of the registry holds no files; register the model again")
    for name in names:
        here.write_chunks(name, there.read_chunks(name))
    return folder / "model"

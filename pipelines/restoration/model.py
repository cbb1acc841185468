"""The model of a run, found once by the driver, so that an alias that moves meanwhile changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sr_platform.model_registry import resolve_model

if TYPE_CHECKING:
    from faithdiff import FaithDiffPipeline
    from pipelines.restoration.recipe import RestoreWorkers


@dataclass(frozen=True)
class Model:
    """`uri` names one and the same model for every worker; `version` tells it from every other."""

    uri: str
    version: str
    manifest_digest: str | None = None


def find_model(uri: str) -> Model:
    """The model at a preset's name, a folder, or models:/name@alias.

    Raises:
        RequestError, InputError: there is none, or it is incomplete.
    """
    if uri.startswith("models:"):
        source = resolve_model(uri)
        return Model(f"models:/{source.version}", source.version, source.manifest_digest)
    # Here, because it imports torch.
    from pipelines.training.export import model_digest

    name = uri.rstrip("/").rpartition("/")[2]
    return Model(uri, f"{name}@{model_digest(uri)[:16]}")


def load_pipeline(model: Model, workers: RestoreWorkers) -> FaithDiffPipeline:
    """On the device of `workers`. Raises InputError, RequestError when it cannot be loaded here."""
    import torch

    from faithdiff import FaithDiffPipeline
    from pipelines.training.start_model import local_model

    return FaithDiffPipeline.from_pretrained(
        local_model(model.uri),
        dtype=getattr(torch, workers.dtype),
        device="cuda" if workers.num_gpus > 0 else "cpu",
        model_version=model.version,
    )

"""One stage as the workers of Ray Train get it: everything that they need and nothing of the driver's process."""

from __future__ import annotations

from typing import Any

from pipelines.training.inputs import StoredInputs
from pipelines.training.recipe import Stage, StageConfig, TrainConfig
from sr_platform.config import StrictConfig


class StageJob(StrictConfig):
    """Paths are absolute: a worker's current directory is one of Ray's."""

    train: TrainConfig
    stage: Stage
    stages_so_far: tuple[Stage, ...]
    """What the model has gone through when this stage ends, in order."""
    model: str
    """Model to start from: a preset, a folder, a folder in storage, or models:/name/version."""
    model_digest: str
    model_version: str
    """What the trained model calls itself in reports."""
    model_out: str
    """URI of the trained model's folder, which appears only when complete."""
    checkpoints: str
    """URI of the stage's checkpoints."""
    tracking_uri: str
    run_id: str
    """MLflow run of this stage, which exists already."""
    tags: dict[str, str]
    """Lineage, for the model's card and for checkpoints."""
    stored: StoredInputs = StoredInputs()
    """What the dataset holds ready for the model."""

    @property
    def config(self) -> StageConfig:
        return self.train.stage_config(self.stage)

    @property
    def resume_from(self) -> str | None:
        """The checkpoint that a fresh run of this stage goes on from."""
        return self.train.resume_from if self.stage == self.train.stages[0] else None

    @property
    def lineage(self) -> dict[str, Any]:
        """What a checkpoint says about itself, so that it can become a model without this run."""
        return {
            "stage": self.stage,
            "model": self.model,
            "model_digest": self.model_digest,
            "model_version": self.model_version,
            "architecture": self.train.architecture.model_dump(mode="json"),
            "tags": self.tags,
            "recipe": self.train.model_dump(mode="json"),
        }

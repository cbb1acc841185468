"""Last checkpoint of a stage -> its model as a folder in storage, with the card that says what it is."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pipelines.training.export import pipeline_of
from pipelines.training.model_card import CARD_NAME, model_card
from pipelines.training.stage_job import StageJob
from pipelines.training.start_model import local_model
from sr_platform.checkpoints import CheckpointReader
from sr_platform.folders import publish_folder
from sr_platform.shards import read_manifest


def write_model(job: StageJob, reader: CheckpointReader, metrics: dict[str, float]) -> str:
    """Publishes the whole model, in fp32, at `job.model_out`: what was trained, and all else from where it started.

    Returns:
        The digest of the folder.
    """
    pipeline = pipeline_of(reader, local_model(job.model), job.train.export)
    pipeline.model_version = job.model_version
    # On the disk where it is to lie, if that is a disk: publishing is then a rename.
    beside = None if "://" in job.model_out else Path(job.model_out).parent
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".model-", dir=beside) as folder:
        staged = Path(folder) / "model"
        pipeline.save_pretrained(staged)
        card = model_card(
            read_manifest(job.train.data),
            job.tags,
            name=f"{job.train.registered_model} ({job.stage})",
            stages={stage: job.train.last_update(stage) for stage in job.stages_so_far},
            size_px=job.train.size_px,
            metrics=metrics,
        )
        (staged / CARD_NAME).write_text(card, encoding="utf-8")
        return publish_folder(staged, job.model_out, may_move=True)

"""Resources of the stages; nothing here changes a byte of the output."""

from __future__ import annotations

from typing import Annotated

import pydantic

from sr_platform.config import StrictConfig


class WorkersConfig(StrictConfig):
    """Who works, and how many at once."""

    num_cpus: Annotated[float, pydantic.Field(gt=0)] = 0.66
    """Logical CPUs of each task and actor; below one, so that a core has work while another shard is handed out."""
    filter_num_gpus: pydantic.NonNegativeFloat = 0.0
    """GPUs, or a fraction of one, for each task that filters, where a source has a quality threshold."""
    caption_actors: pydantic.PositiveInt = 1
    """Processes that hold the captioning model, or talk to the captioning endpoint."""
    caption_num_gpus: pydantic.NonNegativeFloat = 0.0
    """GPUs, or a fraction of one, for each captioning process."""
    caption_batch_size: pydantic.PositiveInt = 8
    """Pictures per call of the captioning model."""
    encode_actors: pydantic.PositiveInt = 1
    """Processes that hold the VAE and the text encoders, where the recipe encodes."""
    encode_num_gpus: pydantic.NonNegativeFloat = 0.0
    """GPUs, or a fraction of one, for each encoding process."""

    def for_shards(self, num_shards: int) -> WorkersConfig:
        """With no more actors than there are shards to work on."""
        caption, encode = min(self.caption_actors, num_shards), min(self.encode_actors, num_shards)
        return self.model_copy(update={"caption_actors": caption, "encode_actors": encode})

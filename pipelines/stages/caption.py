"""Stage 4: gives every crop its caption.  ingest > filter > crop > [caption] > degrade > write

In : crops; `caption` may hold the text that lay beside the picture.
Out: the same rows with `caption` filled; one that stays empty is a problem, never written silently.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import PurePosixPath
from typing import Annotated, Literal

import pyarrow as pa
import pydantic
import ray.data

from pipelines.stages.sample import Sample, WorkersConfig, map_shards, read_table, to_table
from sr_platform.config import StrictConfig


class CaptionConfig(StrictConfig):
    """Who describes the pictures."""

    mode: Literal["text", "llava"] = "text"
    """text: what lies beside the picture, else its file name; llava: a LLaVA model looks at every crop."""
    model: str = ""
    """Folder or hub id of the LLaVA model; for mode llava only."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the LLaVA model."""
    device: str = "cpu"
    """Where the LLaVA model runs: cpu or cuda."""
    temperature: pydantic.PositiveFloat = 0.2
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.7
    max_new_tokens: pydantic.PositiveInt = 512

    @pydantic.model_validator(mode="after")
    def _model_belongs_to_llava(self) -> CaptionConfig:
        if (self.mode == "llava") != bool(self.model):
            raise ValueError(
                "mode llava needs a model, and mode text none; set caption.mode and caption.model together"
            )
        return self


def check_captioner(cfg: CaptionConfig) -> None:
    """Raises InputError when the model is none, before any work is begun."""
    if cfg.mode == "llava":
        from faithdiff.captions import check_llava

        check_llava(cfg.model)


class TextCaption:
    """Takes the caption from beside the picture, else says what the file name says, and nothing it does not know."""

    def __call__(self, table: pa.Table) -> pa.Table:
        return to_table([sample if sample.problem else self.describe(sample) for sample in read_table(table)])

    def describe(self, sample: Sample) -> Sample:
        """The sample with its caption."""
        caption = sample.caption or caption_from_name(sample.source)
        return dataclasses.replace(sample, caption=caption)


class LlavaCaption:
    """Lets a LLaVA model describe every crop; the model is loaded once, when the actor starts."""

    def __init__(self, cfg: CaptionConfig, *, seed: int, batch_size: int) -> None:
        # Here, because transformers takes seconds to import and mode text needs none of it.
        import torch

        from faithdiff.captions import LlavaCaptioner, SamplingSettings, clean_caption

        self.clean_caption = clean_caption
        sampling = SamplingSettings(cfg.temperature, cfg.top_p, cfg.max_new_tokens)
        dtype = getattr(torch, cfg.dtype)
        self.captioner = LlavaCaptioner.from_pretrained(cfg.model, dtype=dtype, device=cfg.device, sampling=sampling)
        self.seed, self.batch_size = seed, batch_size

    def __call__(self, table: pa.Table) -> pa.Table:
        samples = read_table(table)
        usable = [index for index, sample in enumerate(samples) if not sample.problem]
        for start in range(0, len(usable), self.batch_size):
            batch = usable[start : start + self.batch_size]
            for index, described in zip(batch, self.describe([samples[i] for i in batch]), strict=True):
                samples[index] = described
        return to_table(samples)

    def describe(self, samples: list[Sample]) -> list[Sample]:
        """The samples with their captions, from one call of the model."""
        pictures, keys = [sample.hq_pixels() for sample in samples], [sample.key for sample in samples]
        texts = [self.clean_caption(text) for text in self.captioner(pictures, keys=keys, seed=self.seed)]
        return [
            dataclasses.replace(sample, caption=text)
            if text
            else sample.rejected("empty caption", "the model said nothing")
            for sample, text in zip(samples, texts, strict=True)
        ]


def caption_from_name(source: str) -> str:
    """ "old/red_motorcycle-2.jpg" -> "A photograph: red motorcycle"; a name without words -> "A photograph"."""
    words = re.findall(r"[A-Za-z]{3,}", PurePosixPath(source).stem)
    return f"A photograph: {' '.join(words).lower()}" if words else "A photograph"


def caption_stage(ds: ray.data.Dataset, cfg: CaptionConfig, workers: WorkersConfig, *, seed: int) -> ray.data.Dataset:
    if cfg.mode == "text":
        return map_shards(ds, TextCaption().__call__, num_cpus=workers.num_cpus)
    return map_shards(
        ds,
        LlavaCaption,
        num_cpus=workers.num_cpus,
        num_gpus=workers.caption_num_gpus or None,
        fn_constructor_kwargs={"cfg": cfg, "seed": seed, "batch_size": workers.caption_batch_size},
        compute=ray.data.ActorPoolStrategy(size=workers.caption_actors),
    )

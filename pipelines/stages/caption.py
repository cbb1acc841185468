"""Gives every crop its caption.  ingest > filter > crop > [caption] > degrade > encode > write

In : crops; `caption` may hold the text that lay beside the picture.
Out: the same rows with `caption` filled; one that stays empty is a problem, never written silently.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import pyarrow as pa
import pydantic
import ray.data

from faithdiff.caption_text import NUM_OPENING_WORDS, SamplingSettings, clean_caption
from pipelines.stages.caption_endpoint import EMPTY_ATTEMPTS, CaptionEndpoint, EndpointConfig
from pipelines.stages.sample import Sample, map_shards, read_table, to_table
from pipelines.stages.workers import WorkersConfig
from sr_platform.config import StrictConfig

log = logging.getLogger(__name__)

NOT_CONTENT = {"device", "endpoint"}
"""Settings that say how a caption is come by, not what it says: a run goes on after they change."""

_LONGEST_SHARD_S = 3600.0


class CaptionConfig(StrictConfig):
    """Who describes the pictures."""

    mode: Literal["text", "llava", "endpoint"] = "text"
    """text: what lies beside the picture, else its file name; llava: a LLaVA model here; endpoint: one elsewhere."""
    model: str = ""
    """Folder or hub id of the LLaVA model, or the endpoint's name for its model; empty for mode text."""
    reuse_existing: bool = True
    """Keep the caption that lies beside a picture; False: the model describes every crop."""
    temperature: pydantic.PositiveFloat = 0.2
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.7
    max_new_tokens: pydantic.PositiveInt = 512
    opening_words: pydantic.NonNegativeInt = NUM_OPENING_WORDS
    """Words that the model always begins with, and that are left out: LLaVA's "The image features"; 0 for none."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the LLaVA model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the LLaVA model runs; auto: on the GPU that the captioning process was given, else on the CPU."""
    max_side_px: pydantic.PositiveInt = 672
    """Longer side of the largest picture that is sent to an endpoint; larger ones are shrunk to it."""
    endpoint: EndpointConfig = EndpointConfig()

    @pydantic.model_validator(mode="after")
    def _model_belongs_to_mode(self) -> CaptionConfig:
        if (self.mode != "text") != bool(self.model):
            raise ValueError(
                "modes llava and endpoint need a model, and mode text none; set caption.mode and caption.model together"
            )
        if (self.mode == "endpoint") != bool(self.endpoint.base_url):
            raise ValueError(
                "mode endpoint needs an address, and no other mode; "
                "set caption.mode and caption.endpoint.base_url together"
            )
        return self

    def sampling(self) -> SamplingSettings:
        return SamplingSettings(self.temperature, self.top_p, self.max_new_tokens)

    def clean(self, text: str) -> str:
        """The caption in what the model said; empty when there is none."""
        return clean_caption(text, num_opening_words=self.opening_words)

    def longest_shard_s(self) -> float:
        """How long the stage may work on one shard before the pipeline counts as stuck; 0: as any other stage."""
        waiting_s = self.endpoint.give_up_after_s if self.mode == "endpoint" else 0.0
        return 0.0 if self.mode == "text" else _LONGEST_SHARD_S + waiting_s


def check_captioner(cfg: CaptionConfig) -> None:
    """Raises InputError or RequestError when the model or the endpoint cannot be used, before any work is begun."""
    if cfg.mode == "llava":
        from faithdiff.captions import check_llava

        check_llava(cfg.model)
    if cfg.mode == "endpoint":
        _endpoint(cfg).check()


class TextCaption:
    """Takes the caption from beside the picture, else says what the file name says, and nothing it does not know."""

    def __call__(self, table: pa.Table) -> pa.Table:
        return to_table([sample if sample.problem else self.describe(sample) for sample in read_table(table)])

    def describe(self, sample: Sample) -> Sample:
        """The sample with its caption."""
        return dataclasses.replace(sample, caption=sample.caption.strip() or caption_from_name(sample.source))


class LlavaCaption:
    """Lets a LLaVA model describe the crops; the model is loaded once, when the actor starts."""

    def __init__(self, cfg: CaptionConfig, *, seed: int, batch_size: int) -> None:
        # Here, because transformers takes seconds to import and the other modes need none of it.
        import torch

        from faithdiff.captions import LlavaCaptioner

        found = "cuda" if torch.cuda.is_available() else "cpu"
        self.captioner = LlavaCaptioner.from_pretrained(
            cfg.model,
            dtype=getattr(torch, cfg.dtype),
            device=found if cfg.device == "auto" else cfg.device,
            sampling=cfg.sampling(),
        )
        self.cfg, self.seed, self.batch_size = cfg, seed, batch_size

    def __call__(self, table: pa.Table) -> pa.Table:
        samples = read_table(table)
        asked = to_ask(samples, reuse_existing=self.cfg.reuse_existing)
        for attempt in range(EMPTY_ATTEMPTS):
            for start in range(0, len(asked), self.batch_size):
                batch = asked[start : start + self.batch_size]
                for index, text in zip(batch, self.describe([samples[i] for i in batch], attempt), strict=True):
                    samples[index] = dataclasses.replace(samples[index], caption=text)
            asked = [index for index in asked if not samples[index].caption]
        for index in asked:
            samples[index] = without_caption(samples[index])
        return to_table(samples)

    def describe(self, samples: Sequence[Sample], attempt: int) -> list[str]:
        """Their captions, from one call of the model; empty where it said nothing."""
        again = f" again {attempt}" if attempt else ""
        pictures, keys = [sample.hq_pixels() for sample in samples], [sample.key + again for sample in samples]
        texts = self.captioner(pictures, keys=keys, seed=self.seed)
        return [self.cfg.clean(text) for text in texts]


class EndpointCaption:
    """Lets an endpoint describe the crops; waits for it while it fails."""

    def __init__(self, cfg: CaptionConfig, *, seed: int) -> None:
        self.cfg, self.seed, self.endpoint = cfg, seed, _endpoint(cfg)

    def __call__(self, table: pa.Table) -> pa.Table:
        samples = read_table(table)
        asked = to_ask(samples, reuse_existing=self.cfg.reuse_existing)
        pictures, keys = [samples[index].hq_pixels() for index in asked], [samples[index].key for index in asked]
        answers = self.endpoint.ask(pictures, keys=keys, seed=self.seed)
        for index, answer in zip(asked, answers, strict=True):
            if answer.refusal:
                samples[index] = samples[index].rejected("caption refused", answer.refusal)
            elif answer.caption:
                samples[index] = dataclasses.replace(samples[index], caption=answer.caption)
            else:
                samples[index] = without_caption(samples[index])
        return to_table(samples)


def to_ask(samples: Sequence[Sample], *, reuse_existing: bool) -> list[int]:
    """Which samples the model has to describe: usable ones, without those whose caption is kept."""
    usable = [index for index, sample in enumerate(samples) if not sample.problem]
    asked = [index for index in usable if not (reuse_existing and samples[index].caption.strip())]
    log.info("caption: %d captions kept, %d crops to describe", len(usable) - len(asked), len(asked))
    return asked


def without_caption(sample: Sample) -> Sample:
    """The sample on its way to quarantine."""
    return sample.rejected("empty caption", f"the model said nothing, {EMPTY_ATTEMPTS} times")


def caption_from_name(source: str) -> str:
    """ "old/red_motorcycle-2.jpg" -> "A photograph: red motorcycle"; a name without words -> "A photograph"."""
    words = re.findall(r"[A-Za-z]{3,}", PurePosixPath(source).stem)
    return f"A photograph: {' '.join(words).lower()}" if words else "A photograph"


def caption_stage(ds: ray.data.Dataset, cfg: CaptionConfig, workers: WorkersConfig, *, seed: int) -> ray.data.Dataset:
    if cfg.mode == "text":
        return map_shards(ds, TextCaption().__call__, name="caption", num_cpus=workers.num_cpus)
    # Ray Data ends a pipeline in which nothing moved for two minutes; a model may take longer, and an outage does.
    context = ds.context
    if 0 < context.execution_no_progress_timeout_s < cfg.longest_shard_s():
        context.execution_no_progress_timeout_s = cfg.longest_shard_s()
    kwargs: dict[str, Any] = {"cfg": cfg, "seed": seed}
    if cfg.mode == "llava":
        kwargs["batch_size"] = workers.caption_batch_size
    return map_shards(
        ds,
        LlavaCaption if cfg.mode == "llava" else EndpointCaption,
        name="caption",
        num_cpus=workers.num_cpus,
        num_gpus=workers.caption_num_gpus or None,
        fn_constructor_kwargs=kwargs,
        compute=ray.data.ActorPoolStrategy(size=workers.caption_actors),
    )


def _endpoint(cfg: CaptionConfig) -> CaptionEndpoint:
    return CaptionEndpoint(
        cfg.endpoint, model=cfg.model, sampling=cfg.sampling(), max_side_px=cfg.max_side_px, clean=cfg.clean
    )

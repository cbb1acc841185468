"""Stage 6, optional: what the frozen models make of hq and caption.  crop > caption > degrade > [encode] > write

In : captioned crops of exactly the size that training cuts: another crop has other latents.
Out: the same rows plus `latents`, the bytes of a `faithdiff.encodings.Encoding`, with which training needs neither
VAE nor text encoders. They depend on the crop, its caption and the model alone; on a GPU also on its kind.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import pyarrow as pa
import ray.data

from pipelines.stages.sample import Sample, map_shards, read_table, to_table
from pipelines.stages.workers import WorkersConfig
from sr_platform.config import StrictConfig


class EncodeConfig(StrictConfig):
    """Whose VAE and text encoders look at the samples."""

    model: str = ""
    """The model that will be trained: a preset, a folder or a hub id; empty: samples are not encoded."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the text encoders and of their embeddings; the VAE and its latents are always float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where the process sees one."""
    text: bool = True
    """Encode captions too: half a megabyte per sample at SDXL's size in float32, half of it in the others."""


def check_encoder(cfg: EncodeConfig) -> dict[str, str]:
    """Digests of the weights of VAE and text encoders, for the plan: the model's name alone could mix two models.

    Empty where nothing is encoded.

    Raises:
        InputError: the model is none; found before any work is begun.
    """
    if not cfg.model:
        return {}
    from faithdiff.bundle import load_encoders
    from faithdiff.encodings import encoder_digests

    return dict(vars(encoder_digests(load_encoders(cfg.model), text=cfg.text)))


class Encode:
    """Encodes samples one by one; the models are loaded once, when the actor starts."""

    def __init__(self, cfg: EncodeConfig) -> None:
        # Here, because torch and diffusers take seconds to import and most recipes encode nothing.
        import torch

        from faithdiff.bundle import load_encoders
        from faithdiff.encodings import FrozenEncoders

        device = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, cfg.dtype)
        self.encoders = FrozenEncoders(load_encoders(cfg.model), dtype=dtype, device=device, text=cfg.text)

    def __call__(self, table: pa.Table) -> pa.Table:
        return to_table([sample if sample.problem else self.encode(sample) for sample in read_table(table)])

    def encode(self, sample: Sample) -> Sample:
        """The sample with its latents."""
        encoding = self.encoders.encode(sample.hq_pixels(), sample.caption)
        return dataclasses.replace(sample, latents=encoding.to_bytes())


def encode_stage(ds: ray.data.Dataset, cfg: EncodeConfig, workers: WorkersConfig, *, seed: int) -> ray.data.Dataset:
    """`seed` is what every stage gets; nothing is drawn here, because training draws from the stored posterior."""
    if not cfg.model:
        return ds
    return map_shards(
        ds,
        Encode,
        name="encode",
        num_cpus=workers.num_cpus,
        num_gpus=workers.encode_num_gpus or None,
        fn_constructor_kwargs={"cfg": cfg},
        compute=ray.data.ActorPoolStrategy(size=workers.encode_actors),
    )

"""Batch -> what the network sees: latents, noise, text embeddings, all from models that are never trained.

Where the dataset holds what these models give (`pipelines/stages/encode.py`), they are not even kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from faithdiff.bundle import load_encoders
from faithdiff.encodings import Encoding, encoder_digests
from faithdiff.errors import InputError
from faithdiff.loss import NoiseDraws, noise_for, upload
from faithdiff.precision import move
from faithdiff.text import PromptEmbeds, encode_prompts
from pipelines.training.batches import ENCODED_SUFFIX, HQ_SUFFIX, Batch, Samples
from sr_platform.config import StrictConfig
from sr_platform.errors import InputDataError

_VAE_SCALE = 8


class StoredInputs(StrictConfig):
    """What of the network's inputs is read from the dataset instead of computed, and which weights made it."""

    vae_digest: str = ""
    """Of the VAE whose latents are read; empty: the VAE computes them."""
    text_digest: str = ""
    """Of the text encoders whose embeddings are read; empty: they compute them."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The members that the inputs of the network are made of, besides lq and json."""
        pictures = () if self.vae_digest else (HQ_SUFFIX,)
        return pictures + ((ENCODED_SUFFIX,) if self.vae_digest or self.text_digest else ())


@dataclass(frozen=True)
class NetworkInputs:
    """The arguments of `FaithDiffForTraining`, on its device."""

    latents: Tensor
    draws: NoiseDraws
    conditions: dict[str, Tensor]


def find_stored_inputs(reader: Samples, model: str, *, size_px: int) -> StoredInputs:
    """What training `model` on crops of `size_px` can read from the dataset; latents of another size it cannot.

    Every sample of a dataset is encoded alike, so the first one tells.

    Raises:
        InputDataError: the dataset was encoded by other weights than the model's.
    """
    if ENCODED_SUFFIX not in reader.suffixes(0):
        return StoredInputs()
    encoding = _read(reader[0][ENCODED_SUFFIX])
    fits = encoding.mean.shape[-2:] == (size_px // _VAE_SCALE, size_px // _VAE_SCALE)
    found = StoredInputs(vae_digest=encoding.digests.vae if fits else "", text_digest=encoding.digests.text)
    actual = encoder_digests(load_encoders(model), text=bool(found.text_digest))
    parts = (("VAE", found.vae_digest, actual.vae), ("text encoders", found.text_digest, actual.text))
    for part, digest, expected in parts:
        if digest not in ("", expected):
            raise InputDataError(
                f"train: the dataset was encoded by other {part} than those of {model} ({digest[:12]}, not "
                f"{expected[:12]}); prepare it with encode.model={model}, or without encode.model"
            )
    return found


class FrozenModels:
    """The VAE and the text encoders, on `device`, without gradients, as far as `stored` does not replace them.

    The VAE stays in fp32: its latents are what is learnt, and bf16 would round them to three digits.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        noise_offset: float,
        stored: StoredInputs | None = None,
    ) -> None:
        self.stored = stored or StoredInputs()
        self.device, self.dtype, self.seed, self.noise_offset = device, dtype, seed, noise_offset
        self.scaling_factor: float = pipeline.vae.config.scaling_factor
        self.num_train_timesteps: int = pipeline.scheduler.config.num_train_timesteps
        self.vae = None if self.stored.vae_digest else _frozen(pipeline.vae, device, torch.float32)
        self.tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
        text_encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
        self.text_encoders = [_frozen(encoder, device, dtype) for encoder in text_encoders]
        if self.stored.text_digest:
            # Of all texts only the empty one, of dropped captions, lies with no sample.
            text = self._encode_text([""])
            self.no_text = PromptEmbeds(text.prompt_embeds[0].cpu(), text.pooled_prompt_embeds[0].cpu())
            self.text_encoders = []

    @torch.no_grad()
    def encode(self, batch: Batch) -> NetworkInputs:
        """Latents are a sample of the VAE's posterior x its scaling factor, drawn as the noise is."""
        encodings = self._encodings(batch)
        mean, std = self._posterior(batch, encodings)
        _, channels, height, width = mean.shape
        draws = noise_for(
            self.seed,
            batch.samples,
            (channels, height, width),
            noise_offset=self.noise_offset,
            num_train_timesteps=self.num_train_timesteps,
        ).to(self.device)
        text = self._stored_text(batch, encodings) if self.stored.text_digest else self._encode_text(batch.captions)
        return NetworkInputs(
            latents=(mean + std * draws.posterior_noise) * self.scaling_factor,
            draws=draws,
            conditions={
                "lq": upload(batch.lq, self.device),
                "prompt_embeds": text.prompt_embeds,
                "pooled_prompt_embeds": text.pooled_prompt_embeds,
                "time_ids": upload(batch.time_ids, self.device),
            },
        )

    def _encodings(self, batch: Batch) -> list[Encoding]:
        """What lies with the samples, checked against what it was taken for when training began."""
        if batch.encoded is None:
            return []
        encodings = [_read(data) for data in batch.encoded]
        for sample, encoding in zip(batch.samples, encodings, strict=True):
            made_by = encoding.digests
            if self.stored.vae_digest not in ("", made_by.vae) or self.stored.text_digest not in ("", made_by.text):
                raise InputDataError(
                    f"train: sample number {sample} was encoded by other models than the first one of the dataset; "
                    "prepare it again"
                )
        return encodings

    def _posterior(self, batch: Batch, encodings: Sequence[Encoding]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, C, h, w], unscaled."""
        if self.vae is not None:
            assert batch.hq is not None
            posterior = self.vae.encode(upload(batch.hq, self.device)).latent_dist
            return posterior.mean, posterior.std
        chosen = [(e.mean[int(flip)], e.std[int(flip)]) for e, flip in zip(encodings, batch.flips, strict=True)]
        mean, std = (upload(torch.stack(tensors), self.device) for tensors in zip(*chosen, strict=True))
        return mean, std

    def _stored_text(self, batch: Batch, encodings: Sequence[Encoding]) -> PromptEmbeds:
        """The embeddings that lie with the samples, or of no text where the caption was dropped."""
        tokens, pooled = [], []
        for encoding, is_dropped in zip(encodings, batch.dropped, strict=True):
            text = self.no_text if is_dropped else encoding
            assert text.prompt_embeds is not None
            assert text.pooled_prompt_embeds is not None
            tokens.append(text.prompt_embeds.to(self.dtype))
            pooled.append(text.pooled_prompt_embeds.to(self.dtype))
        return PromptEmbeds(
            upload(torch.stack(tokens), self.device),
            upload(torch.stack(pooled), self.device),
        )

    def _encode_text(self, captions: Sequence[str]) -> PromptEmbeds:
        return encode_prompts(captions, *self.tokenizers, *self.text_encoders)


def _frozen(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    move(model, device=device, dtype=dtype)
    return model.eval().requires_grad_(False)


def _read(data: bytes) -> Encoding:
    try:
        return Encoding.from_bytes(data)
    except InputError as error:
        raise InputDataError(f"train: {error}") from error

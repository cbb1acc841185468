"""What the frozen models make of a sample, as a file: training that has it needs neither VAE nor text encoders.

In : hq uint8 RGB [H, W, 3] and its caption.
Out: an `Encoding`, in bytes a safetensors file of

    mean, std               float32 [2, C, H/8, W/8]   the VAE's posterior of hq and of its mirror image, unscaled
    prompt_embeds           [77, D1 + D2]              in the text encoders' dtype; absent without text
    pooled_prompt_embeds    [P]                        likewise

and one entry of metadata: the digests of the weights that made it. The mirror image has a posterior of its own,
because training flips pictures and a flipped latent is not the latent of the flipped picture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from faithdiff.errors import InputError
from faithdiff.precision import move
from faithdiff.text import encode_prompts

# One entry, because safetensors writes several in an order that changes from run to run.
_METADATA_KEY = "faithdiff"
_HEADER_LENGTH_BYTES = 8


@dataclass(frozen=True)
class EncoderDigests:
    """Which weights made an encoding."""

    vae: str
    text: str = ""
    """Of both text encoders; empty where captions were not encoded."""


@dataclass(frozen=True)
class Encoding:
    """One sample's encodings; index 0 of `mean` and `std` is the picture, index 1 its mirror image."""

    mean: Tensor
    std: Tensor
    prompt_embeds: Tensor | None
    pooled_prompt_embeds: Tensor | None
    digests: EncoderDigests

    def to_bytes(self) -> bytes:
        """A safetensors file; equal encodings give equal bytes."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return safetensors.torch.save(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items() if tensor is not None},
            metadata={_METADATA_KEY: json.dumps(vars(self.digests), sort_keys=True)},
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Encoding:
        """What `to_bytes` wrote.

        Raises:
            InputError: it is not such a file, or a damaged one.
        """
        try:
            tensors: dict[str, Tensor | None] = dict(safetensors.torch.load(data))
            digests = EncoderDigests(**json.loads(_metadata(data)[_METADATA_KEY]))
            if not {"mean", "std"} <= tensors.keys() <= set(_TENSORS):
                raise ValueError(f"it holds {', '.join(sorted(tensors))}")
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"encodings: {len(data)} bytes are no file of the encode stage ({error}); prepare the dataset again"
            ) from error
        return cls(**dict.fromkeys(_TENSORS) | tensors, digests=digests)  # type: ignore[arg-type]


_TENSORS = ("mean", "std", "prompt_embeds", "pooled_prompt_embeds")


class FrozenEncoders:
    """The VAE, always in fp32, and the text encoders, in `dtype`, of `bundle.load_encoders(...)` in fp32.

    Samples are encoded one at a time and, on a CPU, on one thread: more of either changes the last bits, and an
    encoding must depend on its sample alone. Another kind of processor may still round differently.
    """

    def __init__(
        self, components: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device | str, text: bool = True
    ) -> None:
        self.digests = encoder_digests(components, text=text)
        self.device, self.text = torch.device(device), text
        self.vae = components["vae"].eval().requires_grad_(False)
        move(self.vae, device=device, dtype=torch.float32)
        self.text_encoders = [components["text_encoder"], components["text_encoder_2"]] if text else []
        self.tokenizers = [components["tokenizer"], components["tokenizer_2"]]
        for encoder in self.text_encoders:
            move(encoder.eval().requires_grad_(False), device=device, dtype=dtype)

    @torch.no_grad()
    def encode(self, hq: NDArray[np.uint8], caption: str) -> Encoding:
        """The encoding of one sample, on the CPU.

        Raises:
            FloatingPointError: a number is not finite: the weights are broken, or `dtype` is too narrow for them.
        """
        with _repeatable_arithmetic():
            pixels = torch.from_numpy(np.stack([hq, hq[:, ::-1]])).to(self.device)
            posterior = self.vae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0).latent_dist
            text = encode_prompts(caption, *self.tokenizers, *self.text_encoders) if self.text else None
        tensors = [posterior.mean, posterior.std]
        tensors += [text.prompt_embeds[0], text.pooled_prompt_embeds[0]] if text else []
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise FloatingPointError("encodings: VAE or text encoders give numbers that are not finite; try float32")
        mean, std, prompt_embeds, pooled = (*(tensor.cpu() for tensor in tensors), None, None)[:4]
        return Encoding(mean, std, prompt_embeds, pooled, self.digests)


def encoder_digests(components: Mapping[str, Any], *, text: bool = True) -> EncoderDigests:
    """Of a model's components as they were loaded, in fp32."""
    text_encoders = (components["text_encoder"], components["text_encoder_2"])
    return EncoderDigests(weights_digest(components["vae"]), weights_digest(*text_encoders) if text else "")


def weights_digest(*modules: nn.Module) -> str:
    """sha256 over names, shapes and fp32 values of all weights: the same for a copy stored in half precision.

    That holds for weights that half precision can hold; give modules as they were loaded, before any rounding.
    """
    digest = hashlib.sha256()
    for number, module in enumerate(modules):
        for name, tensor in sorted(module.state_dict().items()):
            if tensor.is_floating_point():
                digest.update(f"{number} {name} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


@contextmanager
def _repeatable_arithmetic() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(threads)


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file in memory; the library reads it from files on disk only."""
    length = int.from_bytes(data[:_HEADER_LENGTH_BYTES], "little")
    header = json.loads(data[_HEADER_LENGTH_BYTES : _HEADER_LENGTH_BYTES + length])
    return dict(header["__metadata__"])

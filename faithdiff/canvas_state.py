"""A restoration between two steps, as bytes: another process goes on from it and comes to the same picture."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from faithdiff.errors import InputError
from faithdiff.request import RestorationRequest

_NAMES = {"latents", "step", "fingerprint"}


@dataclass(frozen=True)
class CanvasState:
    """`latents` [1, 4, H, W] fp32 on the CPU after `step` steps; `fingerprint` says of what (`fingerprint_of`)."""

    step: int
    latents: Tensor
    fingerprint: str

    def to_bytes(self) -> bytes:
        """A safetensors file; equal states give equal bytes."""
        return safetensors.torch.save(
            {
                "latents": self.latents.detach().float().cpu().contiguous(),
                "step": torch.tensor(self.step),
                "fingerprint": torch.frombuffer(bytearray.fromhex(self.fingerprint), dtype=torch.uint8),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> CanvasState:
        """What `to_bytes` wrote.

        Raises:
            InputError: it is no such file, or a damaged one.
        """
        try:
            tensors = safetensors.torch.load(data)
            if tensors.keys() != _NAMES or tensors["latents"].dtype != torch.float32:
                raise ValueError(f"it holds {', '.join(sorted(tensors))}")
            return cls(int(tensors["step"]), tensors["latents"], tensors["fingerprint"].numpy().tobytes().hex())
        except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
            raise InputError(
                f"canvas state: {len(data)} bytes are no saved restoration ({error}); start the picture again"
            ) from error


def fingerprint_of(lq_rgb: np.ndarray, request: RestorationRequest, model_version: str) -> str:
    """sha256 of everything a restoration depends on: the picture, every setting of the request, the model's version."""
    digest = hashlib.sha256()
    about = {"shape": lq_rgb.shape, "dtype": str(lq_rgb.dtype), "model_version": model_version}
    digest.update(json.dumps(about).encode())
    digest.update(np.ascontiguousarray(lq_rgb).data)
    for field in dataclasses.fields(request):
        digest.update(f"\n{field.name}=".encode())
        _add(digest, getattr(request, field.name))
    return digest.hexdigest()


def _add(digest: Any, value: object) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _add(digest, getattr(value, field.name))
    else:
        digest.update(repr(value).encode())

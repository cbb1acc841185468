"""Half precision that never returns a black picture: what is not finite is computed again in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from faithdiff.breaks import no_breaks


@contextmanager
def as_float32(module: nn.Module) -> Iterator[None]:
    """Runs `module` in fp32 inside the block and gives it its dtype back: fp16 -> fp32 -> fp16 loses nothing.

    Nothing pauses inside the block: whoever had the next turn would find a model in the wrong precision.
    """
    dtype = next(module.parameters()).dtype
    move(module, dtype=torch.float32)
    try:
        with no_breaks():
            yield
    finally:
        move(module, dtype=dtype)


def move(module: nn.Module, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
    """`module.to(...)` past diffusers' override, which warns at every conversion of a model."""
    # Weights made in inference mode could never be trained again.
    with torch.inference_mode(False):
        nn.Module.to(module, device=device, dtype=dtype)


def finite_or_float32(module: nn.Module, compute: Callable[[torch.dtype], Tensor], *, what: str) -> Tensor:
    """`compute(dtype)` in the module's dtype, and again in fp32 where the result is not finite. Waits for the device.

    Raises:
        FloatingPointError: the result is not finite in fp32 either.
    """
    dtype = next(module.parameters()).dtype
    result = compute(dtype)
    if not torch.isfinite(result).all() and dtype != torch.float32:
        with as_float32(module):
            result = compute(torch.float32)
    if not torch.isfinite(result).all():
        raise FloatingPointError(f"{what}: the result is not finite even in fp32; the weights or the input are broken")
    return result

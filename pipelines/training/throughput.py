"""What an update costs in floating-point operations, and how many a device gives: perf/tflops, perf/share_of_peak.

Operations are those of matrix products and convolutions, as everywhere; a product of n x n matrices is 2 n^3 of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_MATRIX_SIZE = {"cuda": 8192, "cpu": 1024}
_MEASURE_S = 0.5


def flops_per_sample(module: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Forward and backward operations of one sample; `inputs` are the arguments of `module`, whose losses [B] return.

    Runs on tensors without data, in seconds and next to no memory at any size. Frozen parameters cost no gradients, and
    recomputation by gradient checkpointing is not counted: it is not progress. Call it before `initialize`, which may
    share parameters out between ranks.
    """
    state = {name: _like(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    with _without_checkpointing(module), FlopCounterMode(display=False) as counter:
        losses = torch.func.functional_call(module, state, _on_meta(inputs))
        losses.sum().backward()
    return int(counter.get_total_flops()) // max(1, losses.numel())


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of large matrix products here and now, measured for half a second; waits for the device."""
    size = _MATRIX_SIZE["cuda" if device.type == "cuda" else "cpu"]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = left @ right  # the first one loads kernels
    best_s, deadline_s = float("inf"), time.monotonic() + _MEASURE_S
    while time.monotonic() < deadline_s:
        best_s = min(best_s, _seconds(left, right, product))
    return 2 * size**3 / best_s


def _seconds(left: Tensor, right: Tensor, product: Tensor) -> float:
    """Of one product, when several follow each other."""
    repeats = 10 if left.is_cuda else 1
    if left.is_cuda:
        torch.cuda.synchronize(left.device)
    start_s = time.perf_counter()
    for _ in range(repeats):
        torch.mm(left, right, out=product)
    if left.is_cuda:
        torch.cuda.synchronize(left.device)
    return (time.perf_counter() - start_s) / repeats


def _like(tensor: Tensor) -> Tensor:
    """A tensor without data, which wants a gradient if `tensor` does."""
    return torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)


def _on_meta(value: Any) -> Any:
    """`value` without data: a tensor, a container of them, or something with a `to` of its own."""
    if isinstance(value, tuple):
        return tuple(_on_meta(item) for item in value)
    if isinstance(value, dict):
        return {key: _on_meta(item) for key, item in value.items()}
    return value.to("meta") if hasattr(value, "to") else value


@contextmanager
def _without_checkpointing(module: nn.Module) -> Iterator[None]:
    owners: list[Any] = [child for child in module.modules() if getattr(child, "gradient_checkpointing", False)]
    for owner in owners:
        owner.gradient_checkpointing = False
    try:
        yield
    finally:
        for owner in owners:
            owner.gradient_checkpointing = True

"""How many samples fit: the largest micro-batch whose forward and backward pass goes into memory, measured.

On a GPU sizes are tried out with random inputs. On a CPU, where too much would end the process or slow the machine
down, two and four samples (or one and two groups that go together) are measured, and the rest is a straight line.
"""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import torch.distributed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from faithdiff.loss import FaithDiffForTraining, noise_for
from faithdiff.text import NUM_TOKENS
from pipelines.training.deepspeed_config import BUCKET_NUMEL, zero_stage
from pipelines.training.recipe import TrainConfig
from pipelines.training.start_model import DTYPES
from sr_platform.errors import ConfigError

logger = logging.getLogger(__name__)

_RESERVE = 0.08
"""Share of the memory left alone: fragmentation, kernels' work space, collectives."""


def fitting_micro_batch(
    module: FaithDiffForTraining,
    cfg: TrainConfig,
    *,
    device: torch.device,
    world_size: int,
    multiple_of: int = 1,
    limit_bytes: int | None = None,
) -> int:
    """The largest multiple of `multiple_of` up to `cfg.max_micro_batch` and a rank's share that fits on every rank.

    Call it on all ranks, before `initialize`, with everything else that stays on the device there already; the module
    comes back as it was. What the optimiser will hold is added by calculation. `limit_bytes` stands in for the free
    memory.

    Raises:
        ConfigError: not even `multiple_of` samples fit on some rank; on all ranks alike.
    """
    share = math.ceil(cfg.global_batch / world_size)
    largest = max(1, min(cfg.max_micro_batch, share) // multiple_of)
    with _placed(module, device, DTYPES[cfg.precision]):
        free_bytes = _free_bytes(device) if limit_bytes is None else limit_bytes
        budget_bytes = free_bytes * (1 - _RESERVE) - optimizer_bytes(module, cfg, world_size)
        pass_bytes = _pass_bytes(module, cfg.size_px, device, multiple_of)
        # Pictures are restored between updates: copies of the weights need room, but not beside large micro-batches.
        smallest_bytes = pass_bytes(multiple_of) + _validation_bytes(module, cfg)
        is_enough = smallest_bytes <= budget_bytes
        count = largest_fitting(lambda count: is_enough and pass_bytes(count * multiple_of) <= budget_bytes, largest)
    found = torch.tensor(count, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
    micro_batch = int(found) * multiple_of
    needed = f"{multiple_of} need {smallest_bytes / 2**30:.2f} GiB of {max(0.0, budget_bytes) / 2**30:.2f} GiB"
    if micro_batch == 0:
        unit = "one sample does" if multiple_of == 1 else f"{multiple_of} samples do"
        raise ConfigError(
            f"probe_memory: even {unit} not fit: {needed} beside optimiser and weights on this worker; set "
            "gradient_checkpointing or offload_optimizer, raise zero_stage or num_workers, or lower size_px"
        )
    logger.info("probe_memory: micro-batches of up to %d samples of %d px fit; %s", micro_batch, cfg.size_px, needed)
    return micro_batch


def largest_fitting(fits: Callable[[int], bool], largest: int) -> int:
    """The largest count of 1 .. `largest` that fits, 0 for none; few trials, and few that do not fit."""
    good, trial = 0, 1
    while trial <= largest and fits(trial):
        good, trial = trial, max(trial + 1, min(2 * trial, largest))
    bad = min(trial, largest + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def optimizer_bytes(module: FaithDiffForTraining, cfg: TrainConfig, world_size: int) -> int:
    """What DeepSpeed and the moving average keep on a rank's device besides weights, gradients and activations."""
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    stage, is_half = zero_stage(cfg), cfg.precision != "fp32"
    state = 0 if cfg.offload_optimizer else (12 if is_half or stage else 8) * trained
    average = 4 * trained if cfg.average_decay and not cfg.offload_optimizer else 0
    sums = 4 * trained if is_half and not cfg.offload_optimizer else 0
    buckets = 2 * 4 * min(BUCKET_NUMEL, trained) if stage else 0
    shared = average // world_size + state // (world_size if stage else 1) + sums // (world_size if stage >= 2 else 1)
    return shared + buckets


def _validation_bytes(module: FaithDiffForTraining, cfg: TrainConfig) -> int:
    """The copy of the weights with which pictures are restored (validation.py), as they are now."""
    if not cfg.validation.num_pictures:
        return 0
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def random_inputs(
    module: FaithDiffForTraining, num_samples: int, *, size_px: int, device: torch.device
) -> tuple[Any, ...]:
    """Arguments of `module` for crops of `size_px`, as `FrozenModels.encode` gives them, without any meaning."""
    config, side = module.unet.config, size_px // module.lq_encoder.downscale
    time_width = 6 * config.addition_time_embed_dim
    shape = (int(config.in_channels), side, side)
    conditions = {
        "lq": torch.rand(num_samples, 3, size_px, size_px) * 2 - 1,
        "prompt_embeds": torch.randn(num_samples, NUM_TOKENS, config.cross_attention_dim),
        "pooled_prompt_embeds": torch.randn(num_samples, config.projection_class_embeddings_input_dim - time_width),
        "time_ids": torch.full((num_samples, 6), float(size_px)),
    }
    return (
        torch.randn(num_samples, *shape, device=device),
        noise_for(0, range(num_samples), shape).to(device),
        {name: value.to(device) for name, value in conditions.items()},
    )


def _pass_bytes(
    module: FaithDiffForTraining, size_px: int, device: torch.device, multiple_of: int
) -> Callable[[int], float]:
    """Samples -> bytes that a forward and backward pass needs at its peak; infinite where it does not fit.

    Samples come in multiples of `multiple_of`.
    """

    def run(num_samples: int) -> None:
        try:
            module(*random_inputs(module, num_samples, size_px=size_px, device=device)).mean().backward()
        finally:
            for parameter in module.parameters():
                parameter.grad = None

    if device.type == "cuda":
        return lambda num_samples: _cuda_peak_bytes(run, num_samples, device)
    # One sample would mislead: its peak is where the last gradients are, that of many where all activations are.
    few = max(2, multiple_of)
    few_bytes, twice_bytes = (_LiveBytes.peak_of(run, num_samples) for num_samples in (few, 2 * few))
    return lambda num_samples: few_bytes + (num_samples - few) * (twice_bytes - few_bytes) / few


def _cuda_peak_bytes(run: Callable[[int], None], num_samples: int, device: torch.device) -> float:
    """Beside the weights, which are there already."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        run(num_samples)
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        torch.cuda.empty_cache()


def _free_bytes(device: torch.device) -> int:
    """What this process may still take; on a CPU its share of what the machine's training processes may."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class _LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations make and somebody still holds, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._seen: dict[int, weakref.finalize[Any, Any]] = {}

    @classmethod
    def peak_of(cls, run: Callable[[int], None], num_samples: int) -> int:
        with cls() as mode:
            run(num_samples)
        return mode.peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._seen:
            self.live += storage.nbytes()
            self._seen[key] = weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, num_bytes: int) -> None:
        del self._seen[key]
        self.live -= num_bytes


@contextmanager
def _placed(module: FaithDiffForTraining, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """`module` on `device`, its parameters in `dtype`, for a while; its own tensors come back untouched."""
    own = [(tensor, tensor.data) for tensor in [*module.parameters(), *module.buffers()]]
    try:
        for tensor, data in own:
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            tensor.data = data.to(device, dtype if is_parameter else data.dtype)
        yield
    finally:
        for tensor, data in own:
            tensor.data = data

"""What training changes: fp32 weights, AdamW's moments, the moving average, in whatever way ZeRO shares them out.

    state = TrainState(engine, average_decay=0.9999)
    state.average_step(update)                      # after every update
    writer.save(update, state.snapshot(), meta)     # sr_platform.checkpoints: files
    state.load(reader)                              # written by any number of ranks, in any ZeRO stage and precision

A parameter is taken as flat here, and each rank owns one range of its elements: the fragment. Together the fragments of
all ranks cover every trained parameter exactly once. Frozen parameters are no part of the state, and neither is the
learning rate, which the caller sets as a function of the update.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn

from sr_platform.errors import InputDataError

if TYPE_CHECKING:
    from sr_platform.checkpoints import CheckpointReader

WEIGHT, EXP_AVG, EXP_AVG_SQ, AVERAGE = "weight", "exp_avg", "exp_avg_sq", "average"

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_HOST_CHUNK_ELEMENTS = 2**28


@dataclass(frozen=True)
class Fragment:
    """What one rank owns of one parameter."""

    start: int
    """First element in the flattened parameter."""
    tensors: dict[str, Tensor]
    """Kind -> flat fp32 tensor, all of one length: views of what the optimiser works on, or copies in a snapshot."""


@dataclass(frozen=True)
class Snapshot:
    """A rank's fragments on the CPU, as they were at one update."""

    fragments: dict[str, Fragment]
    shapes: dict[str, tuple[int, ...]]
    """Of every trained parameter, whatever this rank owns of it."""
    steps: Tensor
    loss_scaler: dict[str, float]
    """State of fp16's dynamic loss scale; empty in other precisions."""
    copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Until the copies have arrived; the tensors mean nothing before."""
        if self.copied is not None:
            self.copied.synchronize()

    @property
    def optimizer_steps(self) -> int:
        """Steps that AdamW has taken, after `wait`; fewer than updates where fp16 skipped some."""
        return int(self.steps.item())


class TrainState:
    """The state of one DeepSpeed engine around `torch.optim.AdamW`, in ZeRO 0 to 3, with or without offload to the CPU.

    Create it right after the engine. The average starts as the weights, and moves at updates that are multiples of
    `average_every_updates`; with `average_decay=0` there is none.
    """

    def __init__(self, engine: Any, *, average_decay: float = 0.0, average_every_updates: int = 1) -> None:
        self._engine, self._max_decay, self._average_every = engine, average_decay, average_every_updates
        named = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named.items()}
        masters = dict(_rounded_with_masters(engine))
        found = {name: _place(engine, p, masters.get(p, p)) for name, p in named.items()}
        places = {name: place for name, place in found.items() if place is not None}
        self._adam_states = _adam_states(engine, [place.flat for place in places.values()])
        self._held = {name: _fragment(engine, place) for name, place in places.items()}
        is_shared_out = all(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in named.values())
        owned = self._held if is_shared_out else _own_shares(self._held)
        self.fragments = {
            name: Fragment(
                part.start, {**part.tensors, **({AVERAGE: part.tensors[WEIGHT].clone()} if self._max_decay else {})}
            )
            for name, part in owned.items()
        }
        self._is_cuda = any(part.tensors[WEIGHT].is_cuda for part in owned.values())
        self._copied: torch.cuda.Event | None = None
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._buffers_user: weakref.ref[Snapshot] | None = None
        if self._is_cuda:
            self._copy_stream = torch.cuda.Stream()
            engine.basic_optimizer.register_step_pre_hook(lambda *_: self._wait_for_copies())

    def average_step(self, update: int) -> None:
        """Takes the weights after `update` (counted from 1) into the average; waits for nothing."""
        if not self._max_decay or update % self._average_every or not self.fragments:
            return
        self._wait_for_copies()  # no optimiser step has, where fp16 skipped it
        parts = [part.tensors for part in self.fragments.values()]
        weights, averages = [part[WEIGHT] for part in parts], [part[AVERAGE] for part in parts]
        torch._foreach_lerp_(averages, weights, 1 - average_decay(update, self._max_decay))

    def snapshot(self) -> Snapshot:
        """Copies of all fragments.

        On a GPU this returns at once: the copies run beside the next forward and backward pass, and the next optimiser
        step, which would change what is copied, comes after them on the GPU. Host memory is that of the snapshot before
        where nobody refers to it any more: let its write end first.
        """
        target = self._host_tensors()
        steps = torch.empty((), pin_memory=self._is_cuda)
        if self._is_cuda:
            self._copy_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._copy_stream):
                self._copy(target, steps)
                self._copied = self._copy_stream.record_event()
        else:
            self._copy(target, steps)
        fragments = {name: Fragment(part.start, target[name]) for name, part in self.fragments.items()}
        snapshot = Snapshot(fragments, self.shapes, steps, _loss_scaler_state(self._engine), self._copied)
        self._buffers_user = weakref.ref(snapshot)
        return snapshot

    def load(self, reader: CheckpointReader) -> None:
        """Takes over the state of a checkpoint; all ranks must call it together. It reads only what this rank holds.

        Without an average in the checkpoint the average starts as its weights.

        Raises:
            InputDataError: the checkpoint is of other parameters, or its files cannot be read.
        """
        self._check_same_parameters(reader)
        self._wait_for_copies()
        wanted = [(name, kind, part.start, t) for name, part in self._held.items() for kind, t in part.tensors.items()]
        if self._max_decay:
            kind = AVERAGE if AVERAGE in reader.kinds else WEIGHT
            wanted += [(name, kind, part.start, part.tensors[AVERAGE]) for name, part in self.fragments.items()]
        values = reader.read_many([(name, kind, start, tensor.numel()) for name, kind, start, tensor in wanted])
        for (_, _, _, tensor), value in zip(wanted, values, strict=True):
            tensor.copy_(value)
        for adam_state in self._adam_states:
            adam_state["step"].fill_(reader.optimizer_steps)
        _set_loss_scaler_state(self._engine, reader.loss_scaler)
        _refresh_model(self._engine)

    def _copy(self, target: dict[str, dict[str, Tensor]], steps: Tensor) -> None:
        for name, part in self.fragments.items():
            for kind, tensor in part.tensors.items():
                target[name][kind].copy_(tensor, non_blocking=True)
        # A parameter that never had a gradient has taken no step, and its moments are 0: any count does for it.
        counts = [adam_state["step"] for adam_state in self._adam_states]
        steps.copy_(torch.stack(counts).max() if counts else torch.zeros(()), non_blocking=True)

    def _host_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Room for all fragments on the CPU, page-locked for a GPU, which takes seconds to get: it is used again."""
        is_in_use = self._buffers_user is not None and self._buffers_user() is not None
        if is_in_use or not self._buffers:
            sizes = [t.numel() for part in self.fragments.values() for t in part.tensors.values()]
            room = _carve(sizes, pin_memory=self._is_cuda)
            self._buffers = {n: {k: next(room) for k in part.tensors} for n, part in self.fragments.items()}
        return self._buffers

    def _wait_for_copies(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def _check_same_parameters(self, reader: CheckpointReader) -> None:
        names = sorted(n for n in reader.shapes.keys() | self.shapes if reader.shapes.get(n) != self.shapes.get(n))
        if names:
            name = names[0]
            raise InputDataError(
                f"checkpoint: {reader.uri} differs in {len(names)} parameters from what is trained here, first {name}: "
                f"{reader.shapes.get(name, 'not there')} instead of {self.shapes.get(name, 'not trained')}; "
                "train the same parts of the same model, or give another checkpoint"
            )


def average_decay(update: int, max_decay: float) -> float:
    """min((1 + s) / (10 + s), max_decay) with s = update - 1, and 0 up to the first: the average starts as the weights.

    Source: FaithDiff/training_utils.py EMAModel.get_decay @ f11af6c; there it runs every 100th step only and is not
    corrected for that.
    """
    step = update - 1
    return 0.0 if step <= 0 else min((1 + step) / (10 + step), max_decay)


class _Place(NamedTuple):
    """Where this rank's optimiser keeps a range of a parameter."""

    flat: Tensor
    """The fp32 tensor that AdamW was given."""
    offset: int
    """Of the range in `flat`."""
    start: int
    """Of the range in the parameter."""
    numel: int


def _place(engine: Any, parameter: Any, master: Tensor) -> _Place | None:
    """None when this rank's optimiser has nothing of the parameter; `master` is what it has without ZeRO."""
    optimizer: Any = engine.optimizer
    if hasattr(parameter, "ds_id"):  # ZeRO 3; shares are of one size, so the last ones run past the parameter's end
        group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = torch.distributed.get_rank(parameter.ds_process_group) * share
        numel = min(share, parameter.ds_numel - start)
        return _Place(optimizer.fp32_partitioned_groups_flat[group], offset, start, numel) if numel > 0 else None
    if hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2
        if (mapping := parameter._hp_mapping) is None:
            return None
        flat = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
        of_flat, of_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Place(flat, of_flat.start, of_parameter.start, of_flat.numel)
    return _Place(master, 0, 0, parameter.numel())


def _rounded_with_masters(engine: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The network's parameters with their fp32 weights, where ZeRO 0 keeps both (fp16, bf16)."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups"):
        for rounded, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from zip(rounded, masters, strict=True)


def _adam_states(engine: Any, flats: list[Tensor]) -> list[dict[str, Tensor]]:
    """AdamW's state of each tensor, made as its first step would make it where there is none yet."""
    optimizer: torch.optim.AdamW = engine.basic_optimizer
    is_step_on_device = bool(optimizer.defaults["fused"] or optimizer.defaults["capturable"])
    for flat in flats:
        adam_state = optimizer.state[flat]
        if not adam_state:
            device = flat.device if is_step_on_device else "cpu"
            adam_state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            adam_state |= {EXP_AVG: torch.zeros_like(flat), EXP_AVG_SQ: torch.zeros_like(flat)}
        elif engine.global_steps == 0:
            # Without ZeRO DeepSpeed takes a step with zero gradients to make the state; it is no step of training.
            adam_state["step"].zero_()
    return list({id(flat): optimizer.state[flat] for flat in flats}.values())


def _fragment(engine: Any, place: _Place) -> Fragment:
    adam_state = engine.basic_optimizer.state[place.flat]
    whole = {WEIGHT: place.flat.detach(), EXP_AVG: adam_state[EXP_AVG], EXP_AVG_SQ: adam_state[EXP_AVG_SQ]}
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in whole.values()), "no flat fp32 weights to keep"
    return Fragment(place.start, {k: t.view(-1).narrow(0, place.offset, place.numel) for k, t in whole.items()})


def _own_shares(held: dict[str, Fragment]) -> dict[str, Fragment]:
    """What this rank is to write of parameters that every rank holds whole: an equal share of each."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shares = {}
    for name, part in held.items():
        numel = part.tensors[WEIGHT].numel()
        start, end = (min(-(-numel // world_size) * r, numel) for r in (rank, rank + 1))
        if start < end:
            shares[name] = Fragment(start, {kind: tensor[start:end] for kind, tensor in part.tensors.items()})
    return shares


def _carve(sizes: list[int], *, pin_memory: bool) -> Iterator[Tensor]:
    """An fp32 tensor of each size, out of a few large ones: page-locked memory is given in powers of two."""
    left, chunk = sum(sizes), torch.empty(0)
    for size in sizes:
        if size > chunk.numel():
            chunk = torch.empty(max(size, min(_HOST_CHUNK_ELEMENTS, left)), pin_memory=pin_memory)
        yield chunk[:size]
        chunk, left = chunk[size:], left - size


def _loss_scaler(engine: Any) -> Any:
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)


def _loss_scaler_state(engine: Any) -> dict[str, float]:
    scaler = _loss_scaler(engine) if engine.fp16_enabled() else None
    return {field: value for field in _SCALER_FIELDS if (value := getattr(scaler, field, None)) is not None}


def _set_loss_scaler_state(engine: Any, values: Mapping[str, float]) -> None:
    if engine.fp16_enabled():
        for field in values.keys() & _SCALER_FIELDS:
            setattr(_loss_scaler(engine), field, values[field])


@torch.no_grad()
def _refresh_model(engine: Any) -> None:
    """Rounds the optimiser's weights into the network's, on all ranks."""
    optimizer = engine.optimizer
    for parameter, master in _rounded_with_masters(engine):
        parameter.copy_(master)
    if hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3, as at the end of its step
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()

"""The finite guard on real gloo ranks: a bad sample on one rank moves no weight and no moment on any."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from pipelines.training.guard import FiniteGuard, clip_and_skip_on_device

NUM_UPDATES = 7
FAULTS = {2: "nan", 4: "inf", 5: "gradient"}
"""What goes wrong in which update, with one sample of one rank."""


class Net(nn.Module):
    """Predicts from inputs; the loss of a sample is what the test asks for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        dtype = self.body.weight.dtype
        prediction: Tensor = self.head(torch.relu(self.body(inputs.to(dtype))))
        return prediction.float().abs().mean(dim=1)


def engine_for(precision: str, zero_stage: int, initial_power: int = 4) -> Any:
    """A small engine as `initialize` makes it: two groups, fused AdamW, fp32 sums."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    net = Net()
    optimizer = torch.optim.AdamW(
        [{"params": net.body.parameters(), "lr": 1e-2}, {"params": net.head.parameters(), "lr": 1e-3}], fused=True
    )
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
    }
    if zero_stage:
        settings["gradient_clipping"] = 1.0
    else:
        clip_and_skip_on_device(optimizer, 1.0)
    if precision != "fp32":
        settings |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
        settings[precision] = {"enabled": True}
    if precision == "fp16":
        get_accelerator().is_fp16_supported = lambda: True
        settings["fp16"] |= {"loss_scale": 0, "initial_scale_power": initial_power, "hysteresis": 1}
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def spoil(losses: Tensor, fault: str) -> Tensor:
    """One sample's loss of the micro-batch."""
    if fault == "gradient":  # a finite loss with an infinite gradient
        losses.register_hook(lambda gradient: gradient * torch.tensor([1.0, torch.inf]))
        return losses
    return torch.cat([losses[:1], losses[1:] * 0 + float(fault)])


def one_update(engine: Any, guard: FiniteGuard, update: int, fault: str) -> None:
    rank = torch.distributed.get_rank()
    for micro_step in range(2):
        generator = torch.Generator().manual_seed(100 * update + 10 * micro_step + rank)
        losses = engine(torch.randn(2, 6, generator=generator))
        if fault and (rank, micro_step) == (1, 0):
            losses = spoil(losses, fault)
        engine.backward(guard.poisoned(losses.mean()))
        engine.step()
    guard.updated(update)


def state_of(engine: Any) -> list[Tensor]:
    """This rank's share of weights, of the optimiser's weights and of its moments."""
    # Under ZeRO 3 a parameter's own storage comes and goes.
    tensors = [getattr(parameter, "ds_tensor", parameter).detach() for parameter in engine.module.parameters()]
    for parameter, state in engine.basic_optimizer.state.items():
        tensors += [parameter.detach(), *state.values()]
    return [tensor.clone() for tensor in tensors]


def train(precision: str, zero_stage: int) -> dict[str, Any]:
    """On each rank: updates of which some are bad; returns what the guard found and which moved any state."""
    engine = engine_for(precision, zero_stage)
    guard = FiniteGuard(engine)
    moved, found = [], []
    for update in range(1, NUM_UPDATES + 1):
        before = state_of(engine)
        one_update(engine, guard, update, FAULTS.get(update, ""))
        after = state_of(engine)
        if len(before) != len(after) or not all(map(torch.equal, before, after)):
            moved.append(update)
        if update in (3, NUM_UPDATES):
            found.append(guard.check())
    is_finite = all(bool(tensor.isfinite().all()) for tensor in state_of(engine))
    norm = float(engine.get_global_grad_norm())
    engine.destroy()
    return {"moved": moved, "found": found, "is_finite": is_finite, "norm": norm}


CASES = [("fp32", 0), *((precision, stage) for precision in ("fp32", "bf16", "fp16") for stage in (1, 2, 3))]


@pytest.mark.parametrize(("precision", "zero_stage"), CASES)
def test_a_bad_sample_on_one_rank_moves_nothing_on_any(two_ranks: Any, precision: str, zero_stage: int) -> None:
    for result in two_ranks(train, precision, zero_stage):
        assert result["moved"] == [1, 3, 6, 7]
        # In fp16 a gradient that overflows is the loss scale's business.
        assert result["found"] == ([[2], [4]] if precision == "fp16" else [[2], [4, 5]])
        assert result["is_finite"]
        assert 0 < result["norm"] < 100


def overflow(zero_stage: int) -> list[str]:
    """On each rank: updates that overflow without end; returns the error."""
    engine = engine_for("fp16", zero_stage, initial_power=3)
    guard = FiniteGuard(engine, loss_scale_floor=2.0)
    errors = []
    for update in range(1, 10):
        try:
            one_update(engine, guard, update, "gradient")
        except FloatingPointError as error:
            errors.append(str(error))
            break
    engine.destroy()
    return errors


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_training_ends_on_all_ranks_when_the_fp16_loss_scale_falls_below_its_floor(
    two_ranks: Any, zero_stage: int
) -> None:
    # 8 -> 4 -> 2 -> 1
    for (error,) in two_ranks(overflow, zero_stage):
        assert error == (
            "train: the fp16 loss scale fell to 1 at update 3, below the floor loss_scale.floor=2: gradients have "
            "collapsed; use precision bf16, or lower the learning rate"
        )


def test_a_finite_loss_passes_as_it_is(two_ranks: Any) -> None:
    assert two_ranks(poison) == [[(2.0, 3.0), (True, True), (True, True)]] * 2


def poison() -> list[tuple[Any, Any]]:
    engine = engine_for("fp32", 1)
    guard, results = FiniteGuard(engine), []
    for value in (2.0, torch.inf, torch.nan):
        leaf = torch.tensor(1.0, requires_grad=True)
        loss = guard.poisoned(leaf * 3 - 1 if value == 2.0 else leaf * 3 + value)
        loss.backward()
        assert leaf.grad is not None
        is_bad = value != 2.0
        results.append((loss.isnan().item(), leaf.grad.isnan().item()) if is_bad else (loss.item(), leaf.grad.item()))
    engine.destroy()
    return results

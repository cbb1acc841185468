"""Finite guard: no update with a loss or gradient that is not a number reaches the weights, and it is known which.

A loss that is not finite makes all its gradients NaN (`FiniteGuard.poisoned`), those make the global gradient norm
NaN on every rank, and an update with such a norm is skipped on all of them, weights and moments untouched: by
DeepSpeed under ZeRO 1 to 3, by `clip_and_skip_on_device` under ZeRO 0. In fp16 a skipped update is how the loss scale
finds its place; there only the loss itself and the scale's floor tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor


class FiniteGuard:
    """Watches one engine. Losses and what was skipped stay on the device until `check`."""

    def __init__(self, engine: Any, *, loss_scale_floor: float = 1.0) -> None:
        """`loss_scale_floor` is for fp16: the smallest scale with which training goes on."""
        self.engine, self.loss_scale_floor = engine, loss_scale_floor
        self._is_loss_finite = torch.ones((), dtype=torch.bool, device=engine.device)
        self._updates: list[int] = []
        self._flags: list[Tensor] = []
        if engine.fp16_enabled():
            # The guard looks at the floor; DeepSpeed's own would stop the run with an error that names nothing.
            engine.optimizer.loss_scaler.min_scale = 0.0

    def poisoned(self, loss: Tensor) -> Tensor:
        """`loss` for the backward pass: itself, or one whose every gradient is NaN where it is not finite."""
        is_finite = torch.isfinite(loss.detach()).all()
        self._is_loss_finite &= is_finite
        return loss * torch.where(is_finite, 1.0, torch.nan)

    def updated(self, update: int) -> None:
        """Takes note of update number `update`, whose last `engine.step()` has just been.

        Raises:
            FloatingPointError: fp16's loss scale has fallen below the floor; on all ranks alike.
        """
        found_inf = getattr(self.engine.basic_optimizer, "found_inf", None)
        if found_inf is None:
            is_skipped = torch.full_like(self._is_loss_finite, not self.engine.was_step_applied())
        else:
            is_skipped = found_inf.bool()
        self._updates.append(update)
        self._flags.append(torch.stack([~self._is_loss_finite, is_skipped]))
        self._is_loss_finite = torch.ones_like(self._is_loss_finite)
        self._check_loss_scale(update)

    def check(self) -> list[int]:
        """Updates since the last check that were skipped because of a loss or gradient that was not finite.

        Called by all ranks together; waits for the device. In fp16 an update that only the loss scale made overflow
        is not among them.
        """
        if not self._flags:
            return []
        flags = torch.stack(self._flags).to(torch.uint8)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        rows: Sequence[tuple[int, int]] = flags.tolist()
        is_fp16 = self.engine.fp16_enabled()
        wrong = [is_loss_wrong if is_fp16 else is_skipped for is_loss_wrong, is_skipped in rows]
        found = [update for update, is_wrong in zip(self._updates, wrong, strict=True) if is_wrong]
        self._updates, self._flags = [], []
        return found

    def _check_loss_scale(self, update: int) -> None:
        if not self.engine.fp16_enabled():
            return
        scale = float(self.engine.optimizer.loss_scale)
        if scale < self.loss_scale_floor:
            raise FloatingPointError(
                f"train: the fp16 loss scale fell to {scale:g} at update {update}, below the floor "
                f"loss_scale.floor={self.loss_scale_floor:g}: gradients have collapsed; "
                "use precision bf16, or lower the learning rate"
            )


def clip_and_skip_on_device(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """Before each step of a fused `optimizer`: clips its gradients, and skips it when their norm is not finite.

    What DeepSpeed does in its ZeRO stages and leaves out where it hands gradients to the optimiser as they are.
    The norm is left for `engine.get_global_grad_norm()`.
    """

    def clip(optimizer: Any, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer._global_grad_norm = norm
        optimizer.found_inf = (~torch.isfinite(norm)).float()

    optimizer.register_step_pre_hook(clip)

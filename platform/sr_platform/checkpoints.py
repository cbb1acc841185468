"""Train state on Ray and DeepSpeed: save and commit, restore after a failure, retention, weights for export.

Every rank writes its own part; Ray merges the parts into one folder per update, `<storage>/<run>/update_00000100/`.
Frozen parameters are left out: they are those of the model that the run started from.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
from torch import Tensor

_TAG = "train_state"
_AVERAGE_FILE = "average_rank_{rank:05d}.pt"


def checkpoint_config(*, keep: int) -> ray.train.CheckpointConfig:
    """The `keep` newest checkpoints stay, older ones are deleted once a newer one is committed."""
    return ray.train.CheckpointConfig(num_to_keep=keep)


def save_train_state(
    engine: Any, *, update: int, metrics: dict[str, float], average: ParameterAverage | None = None
) -> None:
    """Saves weights, moments, learning-rate position and `update`, and returns once the checkpoint counts.

    Ray knows a checkpoint only after its controller has looked; a worker that dies before that would start from the
    one before. All ranks must call this together.
    """
    folder = Path(tempfile.mkdtemp(prefix="train_state_"))
    try:
        engine.save_checkpoint(str(folder), tag=_TAG, client_state={"update": update}, exclude_frozen_parameters=True)
        if average is not None:
            torch.save(average.fragments, folder / _AVERAGE_FILE.format(rank=engine.global_rank))
        ray.train.report(
            {"update": update, **metrics},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"update_{update:08d}",
        )
        ray.train.get_all_reported_checkpoints(consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def restore_train_state(engine: Any, *, average: ParameterAverage | None = None) -> int:
    """The number of updates done: 0 in a fresh run, else the last committed checkpoint is loaded into `engine`."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        # Not strict: frozen parameters are not in the file.
        path, client_state = engine.load_checkpoint(folder, tag=_TAG, load_module_strict=False)
        assert path is not None, f"no {_TAG} in {checkpoint.path}"
        if average is not None:
            name = _AVERAGE_FILE.format(rank=engine.global_rank)
            average.load(torch.load(Path(folder) / name, map_location="cpu", weights_only=True))
    return int(client_state["update"])


def consolidated_parameters(engine: Any, average: ParameterAverage | None = None) -> dict[str, Tensor]:
    """Every trained parameter whole, fp32 on the CPU, by its name in the module; {} on ranks other than 0.

    From the fp32 master weights that the optimiser keeps, or from `average`. Frozen parameters are not included:
    they are in the run's precision here, and exact in the model that the run started from. All ranks must call it.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    whole: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if average is not None:
            value = average.whole(name, parameter)
        else:
            value = safe_get_full_fp32_param(parameter)
            # Without ZeRO in fp32 there are no separate masters.
            value = parameter.detach() if value is None else value
        if engine.global_rank == 0:
            whole[name] = value.to(device="cpu", dtype=torch.float32, copy=True)
    return whole


class ParameterAverage:
    """Exponential moving average of the trained parameters, updated after every update.

    Each rank averages the fragment of the fp32 master weights that its optimiser owns (ZeRO 0 to 2), so an average
    costs memory once per cluster and no communication until it is read.
    """

    def __init__(self, engine: Any, max_decay: float) -> None:
        self._masters = _owned_masters(engine)
        self.max_decay = max_decay
        self.fragments = {name: master.detach().clone() for name, master in self._masters.items()}

    def step(self, update: int) -> None:
        """Takes in the weights after `update` (counted from 1)."""
        shadows = list(self.fragments.values())
        if shadows:
            torch._foreach_lerp_(shadows, list(self._masters.values()), 1 - average_decay(update, self.max_decay))

    def whole(self, name: str, parameter: Tensor) -> Tensor:
        """The average of one parameter, gathered from all ranks."""
        mapping = getattr(parameter, "_hp_mapping", None)
        if not hasattr(parameter, "_hp_mapping"):
            return self.fragments[name]
        gathered = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if mapping is not None:
            address = mapping.lp_fragment_address
            gathered.narrow(0, address.start, address.numel).copy_(self.fragments[name])
        torch.distributed.all_reduce(gathered)
        return gathered.reshape(parameter.shape)

    def load(self, fragments: dict[str, Tensor]) -> None:
        """Restores what another process of this rank saved."""
        assert fragments.keys() == self.fragments.keys(), fragments.keys() ^ self.fragments.keys()
        for name, fragment in fragments.items():
            self.fragments[name].copy_(fragment)


def average_decay(update: int, max_decay: float) -> float:
    """min((1 + s) / (10 + s), max_decay) with s = update - 1, and 0 up to the first: the average starts as the weights.

    Source: FaithDiff/training_utils.py EMAModel.get_decay @ f11af6c; there it runs every 100th step only and is not
    corrected for that.
    """
    step = update - 1
    return 0.0 if step <= 0 else min((1 + step) / (10 + step), max_decay)


def _owned_masters(engine: Any) -> dict[str, Tensor]:
    """fp32 weights that this rank's optimiser updates, by parameter name: a flat fragment each, or the parameter."""
    owned: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if not hasattr(parameter, "_hp_mapping"):
            assert parameter.dtype == torch.float32, f"{name} has no fp32 master weights"
            owned[name] = parameter.data
        elif parameter._hp_mapping is not None:
            owned[name] = parameter._hp_mapping.get_hp_fragment()
    return owned

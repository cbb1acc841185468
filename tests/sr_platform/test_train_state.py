"""Train state: every ZeRO stage, precision and number of ranks leaves it to every other.

Tiny networks in real DeepSpeed engines, on 1, 2 and 4 ranks in processes that run this file as a program. What ends up
in checkpoints is compared: between clusters, and with plain PyTorch.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sr_platform import train_state
from sr_platform.checkpoint_writer import CheckpointWriter
from sr_platform.checkpoints import CheckpointReader, open_checkpoint
from sr_platform.errors import InputDataError
from sr_platform.train_state import AVERAGE, EXP_AVG, EXP_AVG_SQ, WEIGHT, TrainState, average_decay

CUT, LAST = 3, 6
KINDS = {WEIGHT, EXP_AVG, EXP_AVG_SQ, AVERAGE}
GLOBAL_BATCH = 4
MAX_DECAY = 0.5

SETTINGS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero0-bf16": {"stage": 0, "precision": "bf16", "sums": None},
    "zero1-bf16": {"stage": 1, "precision": "bf16"},
    "zero2-bf16": {"stage": 2, "precision": "bf16"},
    # Nothing stays gathered, and the optimiser works on several groups.
    "zero3-bf16": {
        "stage": 3,
        "precision": "bf16",
        "zero": {"stage3_param_persistence_threshold": 0, "sub_group_size": 10},
    },
    "zero1-fp16": {"stage": 1, "precision": "fp16"},
    "zero2-fp16": {"stage": 2, "precision": "fp16"},
    "zero3-fp16": {"stage": 3, "precision": "fp16"},
    # The first gradients overflow.
    "zero2-fp16-high": {"stage": 2, "precision": "fp16", "scale_power": 20},
    "zero2-offload": {"stage": 2, "offload": True, "fused": True},
    "zero3-bf16-offload": {"stage": 3, "precision": "bf16", "offload": True},
}
"""Settings of engines, by name."""

# What goes on elsewhere, as (where it was cut off, where it goes on): each stage is left and entered.
ROADS = [
    ("zero0", "zero2"),
    ("zero2", "zero3"),
    ("zero3", "zero1"),
    ("zero1", "zero0"),
    ("zero1-bf16", "zero3-bf16"),
    ("zero3-bf16", "zero2-bf16"),
    ("zero2-bf16", "zero0-bf16"),
    ("zero0-bf16", "zero1-bf16"),
    ("zero3-fp16", "zero1-fp16"),
    ("zero1-fp16", "zero2-fp16"),
    ("zero2-fp16", "zero3-fp16"),
    ("zero2-offload", "zero0"),
    ("zero2", "zero2-offload"),
    ("zero2-bf16", "zero3-bf16-offload"),
    ("zero3-bf16-offload", "zero2-bf16"),
]
FAR_ROADS = ROADS[:8]


@dataclasses.dataclass(frozen=True)
class Leg:
    """A piece of training: from a checkpoint, or from the start, to the last update."""

    settings: str
    out: str
    start: str = ""


class Net(nn.Module):
    """Odd sizes, two learning rates, one frozen layer, one parameter that most ranks own nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.frozen = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.frozen(self.head(torch.relu(self.body(inputs))) * self.scale).float().square().mean()


def make_net() -> tuple[Net, list[dict[str, Any]]]:
    torch.manual_seed(0)
    net = Net().bfloat16().float()  # DeepSpeed makes its fp32 weights of rounded ones: here they are the same
    slow = [*net.head.parameters(), net.scale]
    return net, [{"params": list(net.body.parameters()), "peak": 1e-2}, {"params": slow, "peak": 1e-3}]


def set_learning_rate(groups: list[dict[str, Any]], update: int) -> None:
    for group in groups:
        group["lr"] = group["peak"] / update


def batch_of(update: int) -> Tensor:
    return torch.randn(GLOBAL_BATCH, 5, generator=torch.Generator().manual_seed(update))


def make_engine(
    *,
    stage: int,
    precision: str = "fp32",
    sums: str | None = "fp32",
    zero: dict[str, Any] | None = None,
    offload: bool = False,
    fused: bool | None = None,
    scale_power: int = 8,
) -> Any:
    """A fresh engine."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    net, groups = make_net()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // torch.distributed.get_world_size(),
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": sums}
    if precision == "fp16":
        config["fp16"] |= {"initial_scale_power": scale_power, "loss_scale_window": 2, "hysteresis": 1}
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    # Without ZeRO DeepSpeed takes a step with zero gradients as it starts, in which weights would decay.
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=fused)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def run(leg: Leg) -> None:
    """Trains a leg. Checkpoints: one as it starts, at CUT, and at the end, whose meta holds the losses."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    engine = make_engine(**SETTINGS[leg.settings])
    state = TrainState(engine, average_decay=MAX_DECAY)
    writer = CheckpointWriter(leg.out, rank=rank, world_size=world_size, attempt="a", keep=9, commit_timeout_s=60)
    first = 0
    if leg.start:
        reader = open_checkpoint(leg.start, CUT)
        assert reader is not None
        state.load(reader)
        first = reader.update
    writer.save(first, state.snapshot(), {})
    losses = []
    dtype = next(engine.module.parameters()).dtype
    for update in range(first + 1, LAST + 1):
        set_learning_rate(engine.optimizer.param_groups, update)
        loss = engine(batch_of(update).chunk(world_size)[rank].to(dtype))
        engine.backward(loss)
        engine.step()
        state.average_step(update)
        losses.append(loss.detach())
        if update in (CUT, LAST):
            mean = torch.stack(losses)
            torch.distributed.all_reduce(mean)
            writer.save(update, state.snapshot(), {"losses": (mean / world_size).tolist()})
    writer.close()
    engine.destroy()


def allow_fp16(patch: pytest.MonkeyPatch) -> None:
    """DeepSpeed refuses fp16 on CPUs, where PyTorch has it."""
    from deepspeed.accelerator import get_accelerator

    patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


def train_on(groups: list[tuple[int, list[Leg]]], folder: Path) -> None:
    """Trains the legs in processes of their own: (world size, legs) one after the other."""
    text = json.dumps([(world_size, [dataclasses.asdict(leg) for leg in legs]) for world_size, legs in groups])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), text]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def main() -> None:
    """Imports what the ranks need once, and forks them."""
    for name in ("deepspeed", "torch._dynamo", "torch.utils.cpp_extension"):
        importlib.import_module(name)
    gc.freeze()  # DeepSpeed collects garbage whenever it starts an engine, of all that is imported too
    folder, text = sys.argv[1:]
    for number, (world_size, legs) in enumerate(json.loads(text)):
        ranks = []
        for rank in range(world_size):
            if not (process := os.fork()):
                become_rank(rank, world_size, f"{folder}/store-{number}", [Leg(**values) for values in legs])
            ranks.append(process)
        failed = [rank for rank in ranks if os.waitpid(rank, 0)[1]]
        if failed:
            sys.exit(f"{len(failed)} of {world_size} ranks failed")


def become_rank(rank: int, world_size: int, store: str, legs: list[Leg]) -> None:
    status = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        allow_fp16(pytest.MonkeyPatch())
        for leg in legs:
            run(leg)
        status = 0
    except Exception:  # noqa: BLE001 - told to the parent
        traceback.print_exc()
    finally:
        os._exit(status)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs: <world size>/<settings> undisturbed, <a>to<b>/<settings>-<settings> gone on."""
    root = tmp_path_factory.mktemp("runs")

    def undisturbed(world_size: int) -> list[Leg]:
        return [Leg(name, f"{root}/{world_size}/{name}") for name in SETTINGS]

    def gone_on(a: int, b: int, roads: list[tuple[str, str]]) -> list[Leg]:
        return [Leg(to, f"{root}/{a}to{b}/{start}-{to}", f"{root}/{a}/{start}") for start, to in roads]

    same = [(name, name) for name in SETTINGS]
    groups = [
        (1, [*undisturbed(1), *gone_on(1, 1, same)]),
        (2, [*undisturbed(2), *gone_on(2, 2, same), *gone_on(1, 2, ROADS)]),
        (1, gone_on(2, 1, ROADS)),
        (4, gone_on(2, 4, FAR_ROADS)),
    ]
    train_on(groups, root)
    return root


def opened(folder: Path, update: int) -> CheckpointReader:
    reader = open_checkpoint(str(folder), update)
    assert reader is not None
    assert reader.kinds == KINDS
    return reader


def state_at(folder: Path, update: int) -> dict[tuple[str, str], Tensor]:
    reader = opened(folder, update)
    return {(name, kind): reader.tensor(name, kind) for name in reader.shapes for kind in sorted(KINDS)}


def assert_equal(actual: Path, expected: Path, update: int) -> None:
    """Bit by bit, everything but the files' cut."""
    states = [state_at(folder, update) for folder in (actual, expected)]
    assert states[0].keys() == states[1].keys()
    assert [key for key, tensor in states[0].items() if not torch.equal(tensor, states[1][key])] == []
    readers = [opened(folder, update) for folder in (actual, expected)]
    assert len({(r.optimizer_steps, json.dumps(r.loss_scaler, sort_keys=True)) for r in readers}) == 1


def assert_close(actual: dict[tuple[str, str], Tensor], expected: dict[tuple[str, str], Tensor], rtol: float) -> None:
    """Relative to the largest value of each tensor."""
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (actual[key] - tensor).abs().max() <= rtol * tensor.abs().max(), key


def reference() -> dict[tuple[str, str], Tensor]:
    """The same training in plain PyTorch."""
    net, groups = make_net()
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in named.items()}
    for update in range(1, LAST + 1):
        set_learning_rate(optimizer.param_groups, update)
        optimizer.zero_grad()
        net(batch_of(update)).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        for name, parameter in named.items():
            average[name].lerp_(parameter.detach(), 1 - average_decay(update, MAX_DECAY))
    kinds = {
        name: {WEIGHT: p.detach(), AVERAGE: average[name], **{k: optimizer.state[p][k] for k in (EXP_AVG, EXP_AVG_SQ)}}
        for name, p in named.items()
    }
    return {(name, kind): kinds[name][kind] for name in kinds for kind in sorted(KINDS)}


def tolerance(settings: str) -> float:
    return 3e-2 if "16" in settings else 1e-5


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", [name for name in SETTINGS if tolerance(name) < 1e-4])
def test_in_fp32_training_ends_where_plain_pytorch_does(runs: Path, name: str, world_size: int) -> None:
    assert_close(state_at(runs / str(world_size) / name, LAST), reference(), 1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_training_starts_from_exact_weights_and_nothing_else(runs: Path, name: str, world_size: int) -> None:
    folder = runs / str(world_size) / name
    weights = dict(make_net()[0].named_parameters())
    for (parameter, kind), tensor in state_at(folder, 0).items():
        expected = weights[parameter] if kind in (WEIGHT, AVERAGE) else torch.zeros_like(tensor)
        assert torch.equal(tensor, expected), (parameter, kind)
    assert opened(folder, 0).optimizer_steps == 0


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_goes_on_in_the_same_way_ends_bit_for_bit_as_the_undisturbed(
    runs: Path, name: str, world_size: int
) -> None:
    gone_on, undisturbed = runs / f"{world_size}to{world_size}" / f"{name}-{name}", runs / str(world_size) / name
    assert_equal(gone_on, undisturbed, CUT)
    assert_equal(gone_on, undisturbed, LAST)


@pytest.mark.parametrize(
    ("a", "b", "start", "to"),
    [(a, b, *road) for a, b, roads in ((1, 2, ROADS), (2, 1, ROADS), (2, 4, FAR_ROADS)) for road in roads],
)
def test_a_run_goes_on_with_other_ranks_and_another_stage(runs: Path, a: int, b: int, start: str, to: str) -> None:
    gone_on, undisturbed = runs / f"{a}to{b}" / f"{start}-{to}", runs / str(a) / start
    # Nothing is lost on the way, be it from one bf16 run to another.
    assert_equal(gone_on, undisturbed, CUT)
    assert_close(state_at(gone_on, LAST), state_at(undisturbed, LAST), tolerance(to))
    losses, expected = opened(gone_on, LAST).meta["losses"], opened(undisturbed, LAST).meta["losses"][CUT:]
    # What the network computes with was rounded anew from the weights.
    assert losses == pytest.approx(expected, rel=tolerance(to))


def test_the_loss_scale_and_skipped_steps_are_part_of_the_state(runs: Path) -> None:
    for stage in (1, 2, 3):
        reader = opened(runs / "1" / f"zero{stage}-fp16", LAST)
        assert reader.optimizer_steps == LAST
        assert reader.loss_scaler["cur_iter"] == LAST
        assert reader.loss_scaler["cur_scale"] > 2**8
    reader = opened(runs / "1" / "zero2-fp16-high", LAST)
    assert 0 < reader.optimizer_steps < LAST
    assert reader.loss_scaler["cur_scale"] < 2**20
    assert opened(runs / "1" / "zero2-bf16", LAST).loss_scaler == {}


def test_ranks_write_nothing_twice(runs: Path) -> None:
    trained_bytes = 4 * len(KINDS) * sum(p.numel() for p in make_net()[0].parameters() if p.requires_grad)
    for name in SETTINGS:
        folder = runs / "2" / name / f"update_{LAST:08d}"
        table = json.loads((folder / "checkpoint.json").read_text())
        assert 4 * sum(piece[3] for file in table["files"] for piece in file["pieces"]) == trained_bytes
        assert len(table["files"]) == 2, name


@pytest.fixture
def state(lone_process_group: None) -> Iterator[TrainState]:
    engine = make_engine(stage=2, precision="bf16")
    yield TrainState(engine, average_decay=0.9, average_every_updates=2)
    engine.destroy()


def test_the_average_moves_only_at_multiples_of_its_interval(state: TrainState) -> None:
    part = state.fragments["scale"].tensors
    part[WEIGHT].fill_(2.0)
    state.average_step(3)
    assert part[AVERAGE].item() == 1.0
    state.average_step(4)
    assert part[AVERAGE].item() == pytest.approx(1 + (1 - average_decay(4, 0.9)))


def test_a_snapshot_keeps_its_values_and_its_memory_is_used_again_after_it(state: TrainState) -> None:
    weight = state.fragments["scale"].tensors[WEIGHT]
    first = state.snapshot()
    weight.fill_(2.0)
    second = state.snapshot()
    kept = [snapshot.fragments["scale"].tensors[WEIGHT] for snapshot in (first, second)]
    assert [tensor.item() for tensor in kept] == [1.0, 2.0]
    place = kept[1].data_ptr()
    del first, second
    gc.collect()
    assert state.snapshot().fragments["scale"].tensors[WEIGHT].data_ptr() == place


def test_a_snapshot_is_the_same_in_pieces_of_memory(state: TrainState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_state, "_HOST_CHUNK_ELEMENTS", 40)
    for part in state.fragments.values():
        for tensor in part.tensors.values():
            tensor.normal_()
    copies = state.snapshot().fragments
    assert copies.keys() == state.fragments.keys()
    for name, part in state.fragments.items():
        assert all(torch.equal(copies[name].tensors[kind], tensor) for kind, tensor in part.tensors.items())


def test_a_checkpoint_without_an_average_starts_it_with_its_weights(
    lone_process_group: None, state: TrainState, tmp_path: Path
) -> None:
    engine = make_engine(stage=0)
    plain = TrainState(engine)
    plain.fragments["scale"].tensors[WEIGHT].fill_(3.0)
    writer = CheckpointWriter(str(tmp_path), rank=0, world_size=1, attempt="a", keep=1)
    writer.save(1, plain.snapshot(), {})
    writer.close()
    reader = open_checkpoint(str(tmp_path))
    assert reader is not None
    assert reader.kinds == {WEIGHT, EXP_AVG, EXP_AVG_SQ}
    state.load(reader)
    assert state.fragments["scale"].tensors[AVERAGE].item() == 3.0


def test_a_checkpoint_of_other_parameters_is_refused(
    lone_process_group: None, state: TrainState, tmp_path: Path
) -> None:
    writer = CheckpointWriter(str(tmp_path), rank=0, world_size=1, attempt="a", keep=1)
    snapshot = state.snapshot()
    fragments = {name: part for name, part in snapshot.fragments.items() if name != "scale"}
    shapes = {name: shape for name, shape in snapshot.shapes.items() if name != "scale"}
    writer.save(1, dataclasses.replace(snapshot, fragments=fragments, shapes=shapes), {})
    writer.close()
    reader = open_checkpoint(str(tmp_path))
    assert reader is not None
    with pytest.raises(InputDataError, match=r"differs in 1 parameters .* first scale: not there instead of \(1,\)"):
        state.load(reader)


def test_the_average_warms_up_as_the_released_one(golden: Any) -> None:
    table = golden("case08_tables").about["ema_get_decay"]
    actual = {update: average_decay(int(update), 0.9999) for update in table}
    assert actual == pytest.approx(table)


if __name__ == "__main__":
    main()

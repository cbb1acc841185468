"""Train state on real Ray Train workers with DeepSpeed: two parameter groups, one frozen part, one failure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sr_platform import cluster
from sr_platform.checkpoints import average_decay, consolidated_parameters

assert cluster.REPOSITORY_PATH.is_dir()  # imported before Ray: it sets Ray's environment

from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: E402
from ray.train.torch import TorchConfig, TorchTrainer  # noqa: E402

from sr_platform.checkpoints import checkpoint_config  # noqa: E402

NUM_UPDATES = 8


def train(local_ray: None, path: Path, **config: Any) -> dict[str, Any]:
    """Trains a small network; returns what rank 0 saw: final weights, average, updates it started from."""

    def loop(config: dict[str, Any]) -> dict[str, Any]:
        import deepspeed
        import torch
        from torch import nn

        from sr_platform.checkpoints import (
            ParameterAverage,
            consolidated_parameters,
            restore_train_state,
            save_train_state,
        )

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.manual_seed(0)
        net = nn.ModuleDict({"body": nn.Linear(5, 7), "head": nn.Linear(7, 3), "frozen": nn.Linear(3, 1)})
        net["frozen"].requires_grad_(False)
        groups = [{"params": net["body"].parameters(), "lr": 1e-2}, {"params": net["head"].parameters(), "lr": 1e-3}]
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": config["zero_stage"]},
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = deepspeed.initialize(
            model=net, optimizer=torch.optim.AdamW(groups), config=settings, dist_init_required=False
        )
        average = ParameterAverage(engine, 0.5)
        first = restore_train_state(engine, average=average)
        for update in range(first + 1, config["num_updates"] + 1):
            generator = torch.Generator().manual_seed(100 * update + engine.global_rank)
            hidden = net["head"](torch.relu(net["body"](torch.randn(2, 5, generator=generator).to(engine_dtype(net)))))
            loss = net["frozen"](hidden).float().square().mean()
            engine.backward(loss)
            engine.step()
            average.step(update)
            if update % 3 == 0:
                save_train_state(engine, update=update, metrics={"loss": loss.item()}, average=average)
            if update == 4 and first == 0:
                os._exit(1)
        weights = consolidated_parameters(engine)
        averaged = consolidated_parameters(engine, average)
        assert (engine.global_rank == 0) == bool(weights)
        return {
            "first": first,
            "weights": {name: value.tolist() for name, value in weights.items()},
            "averaged": {name: value.tolist() for name, value in averaged.items()},
        }

    def engine_dtype(net: torch.nn.Module) -> torch.dtype:
        return next(net.parameters()).dtype

    trainer = TorchTrainer(
        loop,
        train_loop_config={"num_updates": NUM_UPDATES, **config},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="run",
            storage_path=str(path),
            failure_config=FailureConfig(max_failures=1),
            checkpoint_config=checkpoint_config(keep=1),
        ),
    )
    returned: dict[str, Any] = trainer.fit().return_value
    return returned


def reference() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same training in one process of plain PyTorch: weights, and their average."""
    torch.manual_seed(0)
    body, head, frozen = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3), torch.nn.Linear(3, 1)
    groups = [{"params": body.parameters(), "lr": 1e-2}, {"params": head.parameters(), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups)
    named = {f"body.{n}": p for n, p in body.named_parameters()} | {f"head.{n}": p for n, p in head.named_parameters()}
    average = {name: parameter.detach().clone() for name, parameter in named.items()}
    for update in range(1, NUM_UPDATES + 1):
        parts = [torch.randn(2, 5, generator=torch.Generator().manual_seed(100 * update + rank)) for rank in (0, 1)]
        loss = frozen(head(torch.relu(body(torch.cat(parts))))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, parameter in named.items():
            average[name].lerp_(parameter.detach(), 1 - average_decay(update, 0.5))
    return {name: parameter.detach() for name, parameter in named.items()}, average


@pytest.mark.ray
def test_a_run_that_lost_its_workers_ends_with_the_weights_of_an_undisturbed_one(local_ray, tmp_path: Path) -> None:
    result = train(local_ray, tmp_path, zero_stage=2)
    assert result["first"] == 3
    weights, average = reference()
    assert result["weights"].keys() == weights.keys()
    for name, expected in weights.items():
        torch.testing.assert_close(torch.tensor(result["weights"][name]), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.tensor(result["averaged"][name]), average[name], rtol=1e-5, atol=1e-6)
    checkpoints = [entry.name for entry in (tmp_path / "run").iterdir() if entry.name.startswith("update_")]
    assert checkpoints == ["update_00000006"]


def test_in_bf16_the_consolidated_weights_are_the_fp32_masters(lone_process_group) -> None:
    import deepspeed

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 1))
    net[1].requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in net[0].named_parameters(prefix="0")}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(net[0].parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings, dist_init_required=False)
    engine.backward(engine(torch.ones(4, 5, dtype=torch.bfloat16)).float().mean())
    engine.step()
    after = consolidated_parameters(engine)
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert parameter.dtype == torch.float32
        # One step of AdamW moves a weight by about the learning rate, far less than bf16 can show.
        moved = (parameter - before[name].bfloat16().float()).abs()
        assert 0 < moved.max() < 1.5e-4


def test_the_average_warms_up_as_the_released_one(golden) -> None:
    table = golden("case08_tables").about["ema_get_decay"]
    actual = {update: average_decay(int(update), 0.9999) for update in table}
    assert actual == pytest.approx(table)

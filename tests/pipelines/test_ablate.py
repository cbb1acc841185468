"""The sweep of the paper's ablations: with a training that only writes what MLflow would hold of it, and for real."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from faithdiff import FaithDiffPipeline
from faithdiff.parts import PARTS
from pipelines import ablate
from pipelines.ablate import PAPER_ROWS, AblateConfig, PlannedRow
from pipelines.train import TrainResult, train
from pipelines.training.comparison import Account, StageAccount, comparison_records, comparison_table, difference_curve
from pipelines.training.recipe import ArchitectureConfig, Stage, TrainConfig
from pipelines.training.start_model import load_model, trainable_module
from sr_platform.checkpoint_writer import CheckpointWriter
from sr_platform.config import load_config
from sr_platform.errors import ConfigError
from sr_platform.run_log import Metric, RunLog
from sr_platform.tracking import Tracking
from sr_platform.train_state import Fragment, Snapshot

ROWS = ("full", "last_features", "separate")


class FakeTraining:
    """`train(cfg)` that opens the same runs as the real one and logs a loss that depends on the recipe alone."""

    def __init__(self) -> None:
        self.trained: list[TrainConfig] = []
        self.broken: set[str] = set()

    def __call__(self, cfg: TrainConfig) -> TrainResult:
        self.trained.append(cfg)
        if cfg.alias in self.broken:
            raise FloatingPointError("the loss is nan | at update 3\nof stage align")
        runs = Tracking.open(default_path=Path(cfg.out), experiment=cfg.experiment)
        run_id = runs.start(f"train {cfg.registered_model}", params={}, tags={})
        for stage in cfg.stages:
            params = {"trains": ", ".join(cfg.trained_parts(stage))}
            stage_id = runs.start(stage, parent_run_id=run_id, params=params, tags={})
            write_checkpoint(f"{cfg.out}/checkpoints/{stage}")
            self._log(runs, stage_id, cfg.last_update(stage), 0.1 if cfg.architecture.features == "last" else 0.0)
        return TrainResult(f"{cfg.out}/models/unified", "models:/nano/1", runs.uri, run_id, {})

    def _log(self, runs: Tracking, run_id: str, updates: int, above: float) -> None:
        log = RunLog(runs.uri, run_id)
        values = {"validation/psnr": 20.0 - above, "train/updates_per_s": 2.0}
        curve = [Metric("train/loss_smoothed", 1.0 / update + above, update) for update in range(1, updates + 1)]
        log.log([*curve, *(Metric(key, value, updates) for key, value in values.items())])
        log.flush(60)
        log.close()


def write_checkpoint(uri: str) -> None:
    """One that holds 1,234 trained numbers."""
    fragments = {"w": Fragment(0, {"weight": torch.zeros(1200)}), "b": Fragment(0, {"weight": torch.zeros(34)})}
    writer = CheckpointWriter(uri, rank=0, world_size=1, attempt="a", keep=1)
    writer.save(4, Snapshot(fragments, {"w": (30, 40), "b": (34,)}, torch.tensor(4.0), {}), {})
    writer.close()


def request(data: str, out: Path, *flags: str) -> AblateConfig:
    given = ["--data", data, "--out", str(out), "--max-updates", "4", *flags]
    return load_config(AblateConfig, given, job="ablate", recipe=False)


def run(cfg: AblateConfig, training: Callable[[TrainConfig], TrainResult]) -> list[Account]:
    rows = ablate.plan(cfg)
    with ablate.one_tracking_server(rows[0].train, cfg.out):
        return ablate.sweep(cfg, rows, training)


@pytest.fixture(scope="module")
def swept(prepared_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(out, the training after a first run of three rows of which one fails, its accounts)."""
    patch = pytest.MonkeyPatch()
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out, training = tmp_path_factory.mktemp("ablations"), FakeTraining()
    training.broken = {"separate"}
    accounts = run(request(prepared_dataset, out, "--rows", *ROWS), training)
    yield out, training, accounts
    patch.undo()


def test_a_row_that_fails_is_told_about_and_stops_no_other(swept) -> None:
    out, training, accounts = swept
    assert [cfg.alias for cfg in training.trained] == list(ROWS)
    assert [account.name for account in accounts] == list(ROWS)
    assert [bool(account.error) for account in accounts] == [False, False, True]
    assert "FloatingPointError: the loss is nan" in ablate.summary(request("x", out), accounts)
    assert "2 of 3 ablations are done" in ablate.summary(request("x", out), accounts)


def test_rows_are_compared_with_the_full_method_update_by_update(swept) -> None:
    out, _, _ = swept
    records = json.loads((out / "ablations.json").read_text())["rows"]
    full, last, separate = records
    assert [stage["stage"] for stage in full["stages"]] == ["align", "unified"]
    assert full["stages"][1]["loss"] == pytest.approx(0.25)
    assert [stage["loss_to_reference"] for stage in last["stages"]] == pytest.approx([0.1, 0.1])
    assert (last["stages"][1]["trains"], last["stages"][1]["updates"]) == ("alignment, lq_encoder, unet", 4)
    assert last["recipe"] == "ablations/last_features_nano.yaml"
    assert separate["stages"] == []
    text = (out / "ablations.md").read_text()
    assert "does **not** reproduce the paper's numbers" in text
    line = next(line for line in text.splitlines() if line.startswith("| last_features ") and "| unified |" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")][4:] == [
        *("1,234", "4", "0.3500", "+0.1000", "19.90", "2.00"),
    ]
    lines = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


def test_table_and_figure_lie_beside_the_rows_and_in_the_run_above_them(swept) -> None:
    from mlflow import MlflowClient

    out, _, accounts = swept
    figure = Image.open(io.BytesIO((out / "ablations.png").read_bytes()))
    assert min(figure.size) > 500
    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    sweep_run = client.get_run(json.loads((out / "sweep.json").read_text())["run_id"])
    assert {item.path for item in client.list_artifacts(sweep_run.info.run_id)} == {
        *("ablations.md", "ablations.json", "ablations.png"),
    }
    assert sweep_run.info.status == "FAILED"
    for account in accounts[:2]:
        row = client.get_run(account.run_id)
        assert row.info.run_name == account.name
        assert row.data.tags["mlflow.parentRunId"] == sweep_run.info.run_id
        found = client.search_runs([row.info.experiment_id], f"tags.ablation_row = '{account.name}'")
        assert len(found) == 3
        assert {r.data.tags["paper_table"] for r in found} == {PAPER_ROWS[account.name][0]}


def test_a_second_run_skips_what_is_finished_and_repeats_what_failed(swept, prepared_dataset: str) -> None:
    out, first, _ = swept
    again = FakeTraining()
    accounts = run(request(prepared_dataset, out, "--rows", "separate"), again)
    assert [cfg.alias for cfg in again.trained] == ["separate"]
    assert [account.name for account in accounts] == list(ROWS), "what is there already is compared too"
    assert not any(account.error for account in accounts)
    assert accounts[0].run_id is not None
    assert [stage.stage for stage in accounts[2].stages] == ["align", "encoder", "unified"]
    assert accounts[2].stages[1].trains == "alignment, lq_encoder"
    assert run(request(prepared_dataset, out, "--rows", *ROWS), again) == accounts
    assert len(again.trained) == 1
    assert len(first.trained) == 3


def test_rows_that_cannot_be_compared_are_refused_before_anything_starts(swept, prepared_dataset: str) -> None:
    out, _, _ = swept
    with pytest.raises(ConfigError, match="holds full, last_features, separate with other data, base or max_updates"):
        ablate.plan(request(prepared_dataset, out, "--max-updates", "5"))
    with pytest.raises(ValueError, match="does not exist"):
        ablate.plan(request(str(out / "nowhere"), out))
    with pytest.raises(ConfigError, match="'best'"):
        request(prepared_dataset, out, "--rows", "best")


@pytest.mark.parametrize("base", ["nano", "8xh100"])
def test_all_rows_see_the_same_samples_and_noise_and_get_the_same_updates(
    base: str, prepared_dataset: str, tmp_path: Path
) -> None:
    rows = ablate.plan(request(prepared_dataset, tmp_path, "--base", base, "--num-workers", "1"))
    assert [row.name for row in rows] == list(PAPER_ROWS)
    assert len({row.identity for row in rows}) == len(rows)
    same = (
        "seed",
        "global_batch",
        "size_px",
        "caption_dropout",
        "noise_offset",
        "mixture",
        "data",
        "model",
        "precision",
    )
    for name in same:
        assert len({getattr(row.train, name) for row in rows}) == 1, name
    assert {row.train.last_update("unified") for row in rows} == {4}
    schedule = [row.train.unified.model_dump(exclude={"trains"}) for row in rows]
    assert all(values == schedule[0] for values in schedule)
    assert {row.train.num_workers for row in rows} == {1}
    assert not list(tmp_path.iterdir())


def test_a_row_has_a_folder_and_a_name_in_the_registry_of_its_own(prepared_dataset: str, tmp_path: Path) -> None:
    rows: list[PlannedRow] = ablate.plan(request(prepared_dataset, tmp_path))
    assert [row.train.out for row in rows] == [f"{tmp_path}/{name}" for name in PAPER_ROWS]
    assert [row.train.alias for row in rows] == list(PAPER_ROWS)
    assert rows[3].paper == "Table 5: features of the VAE encoder's last layer"


def test_the_command_fails_when_a_row_did(prepared_dataset: str, tmp_path: Path, monkeypatch, capsys) -> None:
    import contextlib

    def sweep(cfg: AblateConfig, rows: Any, train: Any) -> list[Account]:
        assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}"
        return [Account("full", "Tables 5 and 6", "r", error="OSError: disk full")]

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(ablate, "sweep", sweep)
    monkeypatch.setattr(ablate.cluster, "connected", lambda **_: contextlib.nullcontext())
    with pytest.raises(SystemExit) as stop:
        ablate.main(["--data", prepared_dataset, "--out", str(tmp_path / "out"), "--rows", "full"])
    assert stop.value.code == 1
    assert "failed: OSError: disk full" in capsys.readouterr().out
    assert "MLFLOW_TRACKING_URI" not in os.environ


def stage(name: str, curve: dict[int, float]) -> StageAccount:
    return StageAccount(name, "alignment", None, curve, psnr_db=None, updates_per_s=None)


def test_losses_are_compared_only_at_updates_that_both_have() -> None:
    one, other = stage("align", {2: 0.5, 4: 0.4}), stage("align", {4: 0.3, 6: 0.2})
    assert difference_curve(other, one) == pytest.approx({4: -0.1})
    assert difference_curve(one, None) == {}
    table = comparison_table([Account("a", "p", "r", stages=(one,)), Account("b", "p", "r", stages=(other,))], "a")
    assert "| a | p | align | alignment |  | 4 | 0.4000 | reference |  |  |" in table
    assert "| b | p | align | alignment |  | 6 | 0.2000 |  |  |  |" in table


def test_without_the_reference_there_is_a_table_all_the_same() -> None:
    account = Account("b", "p", "r", stages=(stage("unified", {}),), extra={"seconds": 1.0})
    assert "| b | p | unified | alignment |  | 0 |  |  |  |  |" in comparison_table([account], "full")
    assert comparison_records([account], "full")[0]["seconds"] == 1.0


@pytest.fixture
def in_this_process(
    local_ray: None, lone_process_group: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[TrainConfig], TrainResult]]:
    """`in_this_process(cfg)`: the real training on small crops, whose one worker is this process, so it starts soon."""
    from ray.train import ScalingConfig

    alone = ScalingConfig(num_workers=0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("ray.train.ScalingConfig", lambda **_: alone)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = {"size_px": 32, "global_batch": 2}

    def run(cfg: TrainConfig) -> TrainResult:
        validation = cfg.validation.model_copy(update={"num_pictures": 1, "num_inference_steps": 1})
        return train(cfg.model_copy(update={**small, "num_workers": 1, "validation": validation}))

    yield run
    torch.set_num_threads(threads)


def num_trained(cfg: TrainConfig, stage: Stage) -> int:
    """Of a row's recipe, counted in the module that is trained."""
    module = trainable_module(load_model("nano", cfg.architecture), cfg, stage)
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def parts_of(pipeline: FaithDiffPipeline) -> dict[str, dict[str, torch.Tensor]]:
    """Part that can be trained -> name -> weights."""
    parts: dict[str, dict[str, torch.Tensor]] = {"lq_encoder": dict(pipeline.lq_encoder.state_dict())}
    for name, tensor in pipeline.unet.state_dict().items():
        room = name.partition(".")[0]
        parts.setdefault(room if room in ("alignment", "control") else "unet", {})[name] = tensor
    return parts


ODD_ROWS = ("no_alignment", "separate")
"""Rows with another architecture, and with stages of their own."""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "rows", [ODD_ROWS, pytest.param(tuple(PAPER_ROWS), marks=pytest.mark.soak)], ids=["odd rows", "all rows"]
)
def test_rows_really_train_what_they_say_and_nothing_else(
    in_this_process: Callable[[TrainConfig], TrainResult], prepared_dataset: str, tmp_path: Path, rows: tuple[str, ...]
) -> None:
    """Two updates of each stage, the first at a learning rate of 0."""
    accounts = run(request(prepared_dataset, tmp_path, "--max-updates", "2", "--rows", *rows), in_this_process)
    assert {account.name: account.error for account in accounts} == dict.fromkeys(rows)
    untrained = parts_of(load_model("nano", ArchitectureConfig(control=True)))
    for account in accounts:
        cfg = load_config(TrainConfig, [account.recipe, "--data", prepared_dataset], job="train")
        assert [stage.stage for stage in account.stages] == list(cfg.stages)
        for stage in account.stages:
            assert list(stage.curve) == [2]
            assert stage.trained_parameters == num_trained(cfg, stage.stage), (account.name, stage.stage)
            assert stage.psnr_db is not None
        trained = parts_of(FaithDiffPipeline.from_pretrained(tmp_path / account.name / "models" / cfg.stages[-1]))
        fixed = set(PARTS) - {part for stage in cfg.stages for part in cfg.trained_parts(stage)}
        for part in fixed & trained.keys():
            same = [torch.equal(tensor, untrained[part][name]) for name, tensor in trained[part].items()]
            assert all(same), (account.name, part)

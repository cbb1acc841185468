"""The paper's ablations (Tables 5 and 6), one after the other, and side by side in one table, figure and experiment.

    python pipelines/ablate.py --data out/data --out out/ablations
    python pipelines/ablate.py --data out/data --out out/ablations --rows full last_features --max-updates 10

In : a prepared dataset; the recipes `ablations/<row>_<base>.yaml`, each of which `pipelines/train.py` also runs alone.
Out: `out/<row>/` as pipelines/train.py leaves it, `out/ablations.md`, `.json` and `.png`, and an MLflow run that holds
the three, with a nested run per row, tagged with the paper's table and row.

All rows see the same samples, noise and timesteps in update n of a stage, and get the same number of updates. The same
command again skips rows that are finished and goes on with one that was interrupted. A row that fails is told about at
the end, with exit status 1, and does not stop the others.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from faithdiff.errors import InputError
from pipelines.train import TrainResult, tracking_path, train
from pipelines.training.comparison import (
    TRAINED_PARAMETERS_TAG,
    Account,
    comparison_figure,
    comparison_records,
    comparison_table,
    number,
    read_stages,
)
from pipelines.training.recipe import TrainConfig
from sr_platform import cluster
from sr_platform.checkpoints import open_checkpoint
from sr_platform.config import StrictConfig, load_config, run_job
from sr_platform.errors import ConfigError
from sr_platform.mlflow_client import open_client, patiently
from sr_platform.observability import configure_logging
from sr_platform.shards import read_manifest
from sr_platform.storage import open_storage
from sr_platform.tracking import Tracking, tracking_uri

logger = logging.getLogger("pipelines.ablate")

Row = Literal["full", "no_alignment", "no_pretraining", "last_features", "encoder_tuned", "encoder_fixed", "separate"]
Train = Callable[[TrainConfig], TrainResult]

REFERENCE: Row = "full"
PAPER_ROWS: dict[Row, tuple[str, str]] = {
    REFERENCE: ("5 and 6", "the full method"),
    "no_alignment": ("5", "without alignment module"),
    "no_pretraining": ("5", "without pre-training the alignment module"),
    "last_features": ("5", "features of the VAE encoder's last layer"),
    "encoder_tuned": ("6", "encoder tuned, diffusion model fixed (ControlNet-style, SFT)"),
    "encoder_fixed": ("6", "encoder fixed"),
    "separate": ("6", "separately tuned"),
}
"""Row -> table of the paper, and what the row changes."""
_STATE_FILE = "sweep.json"
_LIMITS = {
    "nano": "A nano model, few updates and small crops: this shows that every row trains, and what it trains. It does "
    "**not** reproduce the paper's numbers, and the order of the rows here says nothing about theirs.",
    "8xh100": "Losses on the training samples; the paper's tables compare metrics of restored pictures.",
}


class AblateConfig(StrictConfig):
    """Which ablations run, on what."""

    data: str
    """URI of a prepared dataset: a folder, file:// or s3://."""
    out: str = "out/ablations"
    """URI of everything that is written; all nodes must see it."""
    base: Literal["nano", "8xh100"] = "nano"
    """Size and hardware: the rows are `ablations/<row>_<base>.yaml`."""
    rows: tuple[Row, ...] = tuple(PAPER_ROWS)
    """Which rows run; all by default."""
    max_updates: PositiveInt | None = None
    """End each stage of every row after so many updates, on the learning-rate curve of the whole stage."""
    num_workers: PositiveInt | None = None
    """Ray Train workers of every row instead of the recipe's; changes no result."""


@dataclass(frozen=True)
class PlannedRow:
    """One row, checked and not started."""

    name: Row
    recipe: str
    train: TrainConfig
    identity: str
    """Digest of what decides the row's result."""

    @property
    def paper(self) -> str:
        table, text = PAPER_ROWS[self.name]
        return f"{'Tables' if ' ' in table else 'Table'} {table}: {text}"


def main(argv: Sequence[str]) -> None:
    cfg = load_config(AblateConfig, argv, job="ablate", description=__doc__ or "", recipe=False)
    configure_logging()
    rows = plan(cfg)
    with one_tracking_server(rows[0].train, cfg.out), cluster.connected(num_cpus=cpus_of(rows)):
        accounts = sweep(cfg, rows, train)
    print(summary(cfg, accounts))
    if any(account.error for account in accounts):
        raise SystemExit(1)


def plan(cfg: AblateConfig) -> list[PlannedRow]:
    """The rows in the paper's order: those asked for, and those that `out` holds already and that are compared too.

    Raises:
        ConfigError: the request is wrong, or `out` holds rows that cannot be compared; nothing was written.
    """
    manifest = read_manifest(cfg.data)
    known = read_state(cfg.out)["rows"]
    names = [name for name in PAPER_ROWS if name in cfg.rows or "run_id" in known.get(name, {})]
    if not names:
        raise ConfigError(f"rows: none given; there are {', '.join(PAPER_ROWS)}")
    rows = [_planned(cfg, name, manifest.digest) for name in names]
    other = [row.name for row in rows if row.name in known and known[row.name]["identity"] != row.identity]
    if other:
        raise ConfigError(
            f"out: {cfg.out} holds {', '.join(other)} with other data, base or max_updates; give another folder"
        )
    return rows


def _planned(cfg: AblateConfig, name: Row, manifest_digest: str) -> PlannedRow:
    recipe, out = f"ablations/{name}_{cfg.base}.yaml", cfg.out.rstrip("/")
    flags = ["--data", cfg.data, "--out", f"{out}/{name}"]
    if cfg.max_updates is not None:
        flags += ["--max-updates", str(cfg.max_updates)]
    if cfg.num_workers is not None:
        flags += ["--num-workers", str(cfg.num_workers)]
    train_cfg = load_config(TrainConfig, [recipe, *flags], job="ablate")
    identity = hashlib.sha256(f"{train_cfg.digest} {train_cfg.stages} {manifest_digest}".encode()).hexdigest()
    return PlannedRow(name, recipe, train_cfg, identity)


def sweep(cfg: AblateConfig, rows: Sequence[PlannedRow], train: Train) -> list[Account]:
    """Runs what is not finished, row by row; the comparison is written anew after each of them."""
    first = rows[0].train
    runs = Tracking.open(default_path=Path(cfg.out), experiment=first.experiment)
    parent_run_id = start_parent_run(cfg, runs)
    accounts: list[Account] = []
    try:
        for number, row in enumerate(rows, start=1):
            logger.info("row %d of %d: %s (%s)", number, len(rows), row.name, row.paper)
            is_new = not is_finished(cfg.out, row)
            accounts.append(run_row(cfg, row, runs, parent_run_id, train))
            if is_new or number == len(rows):
                publish(cfg, runs, parent_run_id, accounts)
    finally:
        is_whole = len(accounts) == len(rows) and not any(account.error for account in accounts)
        runs.finish(parent_run_id, failed=not is_whole)
    return accounts


def run_row(cfg: AblateConfig, row: PlannedRow, runs: Tracking, parent_run_id: str, train: Train) -> Account:
    """Trains the row unless it is finished, and reads its account from MLflow; a failure is an account too."""
    try:
        if is_finished(cfg.out, row):
            logger.info("row %s is finished already", row.name)
        else:
            train_row(cfg, row, runs, parent_run_id, train)
        finished = read_state(cfg.out)["rows"][row.name]
        stages = patiently(runs.uri, lambda: read_stages(runs.uri, finished["run_id"]))
    except Exception as error:
        logger.exception("row %s failed", row.name)
        return Account(row.name, row.paper, row.recipe, error=f"{type(error).__name__}: {error}")
    extra = {"model": finished["model_uri"], "seconds": finished["seconds"]}
    return Account(row.name, row.paper, row.recipe, finished["run_id"], stages, extra=extra)


def train_row(cfg: AblateConfig, row: PlannedRow, runs: Tracking, parent_run_id: str, train: Train) -> None:
    """Trains a row, puts its runs below the sweep's, and remembers it as finished."""
    remember(cfg.out, row.name, {"identity": row.identity})
    started_s = time.monotonic()
    result = train(row.train)
    patiently(runs.uri, lambda: tag_runs(runs, result.run_id, parent_run_id, row))
    finished = {
        "identity": row.identity,
        "run_id": result.run_id,
        "model_uri": result.model_uri,
        "seconds": round(time.monotonic() - started_s, 1),
    }
    remember(cfg.out, row.name, finished)


def tag_runs(runs: Tracking, run_id: str, parent_run_id: str, row: PlannedRow) -> None:
    """Puts the row's run below the sweep's; it and its stages can be found by table and row of the paper."""
    client = open_client(runs.uri)
    table, text = PAPER_ROWS[row.name]
    tags = {"ablation_row": row.name, "paper_table": table, "paper_row": text}
    own = {"mlflow.parentRunId": parent_run_id, "mlflow.runName": row.name}
    for key, value in {**tags, **own}.items():
        client.set_tag(run_id, key, value)
    for stage in client.search_runs([runs.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'"):
        counted = {TRAINED_PARAMETERS_TAG: str(trained_parameters(row.train, stage.info.run_name))}
        for key, value in {**tags, **counted}.items():
            client.set_tag(stage.info.run_id, key, value)


def trained_parameters(cfg: TrainConfig, stage: str) -> int:
    """How many numbers the stage trained: its checkpoints hold all of them, and nothing that was frozen."""
    checkpoint = open_checkpoint(f"{cfg.out}/checkpoints/{stage}")
    return sum(math.prod(shape) for shape in checkpoint.shapes.values()) if checkpoint else 0


def start_parent_run(cfg: AblateConfig, runs: Tracking) -> str:
    """The run of the whole sweep, opened again where `out` remembers it."""
    state = read_state(cfg.out)
    known: str | None = state["run_id"]
    if known is not None and runs.resume(known):
        return known
    run_id = runs.start(f"ablations {cfg.base}", params=cfg.model_dump(mode="json"), tags={"ablations": cfg.base})
    write_state(cfg.out, {**state, "run_id": run_id})
    return run_id


def publish(cfg: AblateConfig, runs: Tracking, run_id: str, accounts: Sequence[Account]) -> None:
    """Writes table, records and figure to `out` and into the sweep's run."""
    text = report(cfg, accounts)
    records = {"base": cfg.base, "tracking_uri": runs.shown_uri, "rows": comparison_records(accounts, REFERENCE)}
    figure = comparison_figure(accounts, REFERENCE, f"Ablations of Tables 5 and 6, {cfg.base}, same samples and noise")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    storage = open_storage(cfg.out)
    storage.write_bytes_atomic("ablations.md", text.encode())
    storage.write_bytes_atomic("ablations.json", (json.dumps(records, indent=2) + "\n").encode())
    storage.write_bytes_atomic("ablations.png", png.getvalue())

    def log() -> None:
        client = open_client(runs.uri)
        client.log_text(run_id, text, "ablations.md")
        client.log_dict(run_id, records, "ablations.json")
        client.log_figure(run_id, figure, "ablations.png")

    patiently(runs.uri, log)


def report(cfg: AblateConfig, accounts: Sequence[Account]) -> str:
    """ablations.md."""
    return "\n".join(
        [
            f"# Ablations of the paper's Tables 5 and 6, {cfg.base}",
            "",
            _LIMITS[cfg.base],
            "",
            "All rows saw the same samples, noise and timesteps in update n of a stage. The loss is the mean absolute "
            f"error of the noise, smoothed over about fifty updates; beside it, what it is above or below {REFERENCE}. "
            "Stages are of equal length, trainings are not: no_pretraining has one stage less than the others, and "
            "separate one more, which by itself lowers its loss.",
            "",
            comparison_table(accounts, REFERENCE),
            "",
            "![loss curves](ablations.png)",
            "",
        ]
    )


def summary(cfg: AblateConfig, accounts: Sequence[Account]) -> str:
    """What a person wants to know at the end."""
    lines = ["", f"{sum(not account.error for account in accounts)} of {len(accounts)} ablations are done"]
    lines += [f"  {account.name:15} {_told(account)}" for account in accounts]
    lines += [f"  compared in     {cfg.out.rstrip('/')}/ablations.md, .json and .png"]
    return "\n".join(lines)


def _told(account: Account) -> str:
    if account.error is not None:
        return f"failed: {account.error}"
    return ", ".join(f"{stage.stage}: loss {number(stage.loss, '.4f')}" for stage in account.stages)


@contextmanager
def one_tracking_server(first: TrainConfig, out: str) -> Iterator[None]:
    """All rows log to one server: that of MLFLOW_TRACKING_URI, or an SQLite file in `out`, not one in each row's."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    path = tracking_path(first.model_copy(update={"out": out}))
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri(path)
    if not given and "://" not in out:
        Path(out).mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if given is None:
            del os.environ["MLFLOW_TRACKING_URI"]


def cpus_of(rows: Sequence[PlannedRow]) -> int:
    """Logical CPUs for the row with most workers, and for the driver of Ray Train."""
    return max(4, *(1 + math.ceil(row.train.num_workers * row.train.cpus_per_worker) for row in rows))


def read_state(out: str) -> dict[str, Any]:
    """What the sweep in `out` remembers: its run, and per row the identity and, once finished, where it is."""
    storage = open_storage(out)
    if not storage.exists(_STATE_FILE):
        return {"run_id": None, "rows": {}}
    return dict(json.loads(storage.read_bytes(_STATE_FILE)))


def is_finished(out: str, row: PlannedRow) -> bool:
    return "run_id" in read_state(out)["rows"].get(row.name, {})


def remember(out: str, name: str, row: dict[str, Any]) -> None:
    state = read_state(out)
    write_state(out, {**state, "rows": {**state["rows"], name: row}})


def write_state(out: str, state: dict[str, Any]) -> None:
    open_storage(out).write_bytes_atomic(_STATE_FILE, (json.dumps(state, indent=2) + "\n").encode())


if __name__ == "__main__":
    run_job(main, user_errors=(InputError,))

"""MLflow runs of several trainings -> one table and one figure: what each trained, and how its loss went.

In : the parent run of every training; their nested runs are the stages.
Out: a Markdown table with a line per training and stage, the same as JSON, and loss curves side by side.

Trainings of one seed see the same samples and the same noise in update n of a stage, so their losses are compared
update by update: the difference to the reference shows what pure loss curves hide in their noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sr_platform.mlflow_client import open_client

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINED_PARAMETERS_TAG = "trained_parameters"
"""Of a stage's run."""
STAGE_ORDER = ("align", "encoder", "unified")
_COLUMNS = ("row", "paper", "stage", "trains", "trained parameters", "updates", "loss", "to reference", "PSNR, dB")
# Okabe and Ito's colours, which colour-blind people can tell apart; the reference is black.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442")


@dataclass(frozen=True)
class StageAccount:
    """What MLflow knows of one stage of one training."""

    stage: str
    trains: str
    trained_parameters: int | None
    curve: dict[int, float]
    """Smoothed loss by update, at every look."""
    psnr_db: float | None
    """Of the last validation pictures."""
    updates_per_s: float | None

    @property
    def updates(self) -> int:
        return max(self.curve, default=0)

    @property
    def loss(self) -> float | None:
        """Smoothed, after the last update."""
        return self.curve.get(self.updates)


@dataclass(frozen=True)
class Account:
    """One training in the comparison."""

    name: str
    paper: str
    """Which row of which table of the paper it is."""
    recipe: str
    run_id: str | None = None
    stages: tuple[StageAccount, ...] = ()
    error: str | None = None
    """Why there is nothing to compare."""
    extra: dict[str, Any] = field(default_factory=dict)


def read_stages(uri: str, run_id: str) -> tuple[StageAccount, ...]:
    """The stages nested under a training's run, in their order. Raises MlflowException when the run is not there."""
    client = open_client(uri)
    experiment = client.get_run(run_id).info.experiment_id
    nested = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    by_stage = {run.info.run_name: run for run in nested if run.info.run_name in STAGE_ORDER}
    return tuple(_read_stage(client, by_stage[stage]) for stage in STAGE_ORDER if stage in by_stage)


def _read_stage(client: Any, run: Any) -> StageAccount:
    metrics, params = run.data.metrics, run.data.params
    history = client.get_metric_history(run.info.run_id, "train/loss_smoothed")
    trained = run.data.tags.get(TRAINED_PARAMETERS_TAG)
    return StageAccount(
        stage=run.info.run_name,
        trains=params.get("trains", ""),
        trained_parameters=None if trained is None else int(trained),
        curve={metric.step: metric.value for metric in sorted(history, key=lambda m: (m.step, m.timestamp))},
        psnr_db=metrics.get("validation/psnr"),
        updates_per_s=metrics.get("train/updates_per_s"),
    )


def comparison_table(accounts: Sequence[Account], reference: str) -> str:
    """Markdown: a line for every training and stage, or for the reason why there is none."""
    base = _stages_of(accounts, reference)
    lines = [f"| {' | '.join((*_COLUMNS, 'updates/s'))} |", "|---" * (len(_COLUMNS) + 1) + "|"]
    for account in accounts:
        if account.error is not None:
            why = f"failed: {_cell(account.error)}"
            lines.append(f"| {account.name} | {account.paper} | {why} |" + " |" * (len(_COLUMNS) - 2))
        for stage in account.stages:
            lines.append(f"| {' | '.join(_cells(account, stage, base))} |")
    return "\n".join(lines)


def _cells(account: Account, stage: StageAccount, base: Mapping[str, StageAccount]) -> list[str]:
    difference = difference_curve(stage, base.get(stage.stage))
    is_reference = base.get(stage.stage) is stage
    return [
        account.name,
        account.paper,
        stage.stage,
        stage.trains,
        number(stage.trained_parameters, ","),
        str(stage.updates),
        number(stage.loss, ".4f"),
        "reference" if is_reference else number(difference.get(stage.updates), "+.4f"),
        number(stage.psnr_db, ".2f"),
        number(stage.updates_per_s, ".2f"),
    ]


def comparison_records(accounts: Sequence[Account], reference: str) -> list[dict[str, Any]]:
    """The table as JSON, with the curves and the runs that it was read from."""
    base = _stages_of(accounts, reference)
    records = []
    for account in accounts:
        record = asdict(account)
        for values, stage in zip(record["stages"], account.stages, strict=True):
            to_reference = difference_curve(stage, base.get(stage.stage)).get(stage.updates)
            values |= {"updates": stage.updates, "loss": stage.loss, "loss_to_reference": to_reference}
        records.append(record | record.pop("extra"))
    return records


def difference_curve(stage: StageAccount, reference: StageAccount | None) -> dict[int, float]:
    """Smoothed loss minus that of the reference, at the updates that both have looked at."""
    if reference is None:
        return {}
    return {update: loss - reference.curve[update] for update, loss in stage.curve.items() if update in reference.curve}


def comparison_figure(accounts: Sequence[Account], reference: str, title: str) -> Figure:
    """Loss curves of all trainings, a column per stage; below them their difference to the reference."""
    from matplotlib.figure import Figure

    shown = [stage for stage in STAGE_ORDER if any(stage in _by_name(account) for account in accounts)]
    figure = Figure(figsize=(5.0 * max(1, len(shown)) + 2.2, 7.0), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(2, max(1, len(shown)), sharex="col", squeeze=False)
    for column, stage in zip(axes.T, shown, strict=False):
        _draw_stage(column[0], column[1], accounts, reference, stage)
    handles = {line.get_label(): line for panel in axes.flat for line in panel.get_lines()}
    named = {account.name: handles[account.name] for account in accounts if account.name in handles}
    figure.legend(list(named.values()), list(named), loc="outside right center", frameon=False)
    return figure


def _draw_stage(losses: Axes, differences: Axes, accounts: Sequence[Account], reference: str, stage: str) -> None:
    from matplotlib.ticker import MaxNLocator

    base = _stages_of(accounts, reference).get(stage)
    colours = iter(_COLOURS * len(accounts))
    for account in accounts:
        colour = "black" if account.name == reference else next(colours)
        if (found := _by_name(account).get(stage)) is None:
            continue
        width = 3.0 if account.name == reference else 1.4
        style: dict[str, Any] = {"label": account.name, "color": colour, "linewidth": width}
        losses.plot(list(found.curve), list(found.curve.values()), **style)
        curve = difference_curve(found, base)
        differences.plot(list(curve), list(curve.values()), **style)
    losses.set_title(f"stage {stage}", fontsize=10)
    losses.set_ylabel("loss, smoothed")
    differences.set_ylabel(f"loss minus that of {reference}")
    differences.set_xlabel("update")
    if base is None:
        differences.text(0.5, 0.5, f"{reference} has no such stage", ha="center", transform=differences.transAxes)
        differences.set_yticks([])
    for panel in (losses, differences):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)


def _stages_of(accounts: Sequence[Account], name: str) -> dict[str, StageAccount]:
    return next((_by_name(account) for account in accounts if account.name == name), {})


def _by_name(account: Account) -> dict[str, StageAccount]:
    return {stage.stage: stage for stage in account.stages}


def number(value: float | None, form: str) -> str:
    """`value` in the given format, or nothing where there is none."""
    return "" if value is None else format(value, form)


def _cell(text: str) -> str:
    """One line that cannot end its cell."""
    return " ".join(text.split()).replace("|", "\\|")

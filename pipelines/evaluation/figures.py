"""Figures of an evaluation, as PNG for report.md and MLflow: how each metric is distributed, method by method.

    write_figures(read_score_table(report_folder), report_folder / "figures")

A dot is a picture, the box its quartiles, the bar below the mean with its 95% bootstrap interval. What has no score is
named in the label, with how many pictures lack it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.evaluation.score_table import OURS, Metric, ScoreTable
from pipelines.evaluation.scoring import applies
from pipelines.evaluation.statistics import summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS_COLOUR, _COLOUR, _FAINT = "#0072B2", "#555555", "#BBBBBB"
_ROW_IN, _DPI = 0.62, 130


def write_figures(table: ScoreTable, folder: Path) -> list[Path]:
    """One PNG per metric that has a score; returns their paths in the order of the metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for metric in table.metrics:
        if metric.name not in table.has_scores:
            continue
        path = folder / f"{file_stem(metric.name)}.png"
        distribution_figure(table, metric).savefig(path, dpi=_DPI)
        paths.append(path)
    return paths


def file_stem(metric: str) -> str:
    """A name for files, of any metric: `clipiqa+_vitL14_512` -> `clipiqa_plus_vitL14_512`."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", metric.replace("+", "_plus"))


def distribution_figure(table: ScoreTable, metric: Metric) -> Figure:
    """All methods that can have a score below each other, ours first."""
    from matplotlib.figure import Figure

    methods = [method for method in table.methods if applies(table, method, metric.name)]
    figure = Figure(figsize=(8.0, 1.3 + _ROW_IN * len(methods)), layout="constrained")
    axes = figure.subplots()
    labels = [_draw_method(axes, table, metric, method, row) for row, method in enumerate(methods)]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    direction = "higher is better" if metric.higher_is_better else "lower is better"
    axes.set_xlabel(f"{metric.name}{f', {metric.unit}' if metric.unit else ''} ({direction})")
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _draw_method(axes: Axes, table: ScoreTable, metric: Metric, method: str, row: int) -> str:
    """Draws one row and returns its label."""
    scores = table.scores(method, metric.name)
    summary = summarize(scores)
    values = np.array([score for score in scores.values() if score is not None])
    missing = f", {summary.num_missing} missing" if summary.num_missing else ""
    label = f"{method}\nn={summary.num_scored}{missing}"
    if summary.mean is None:
        return label
    colour = _OURS_COLOUR if method == OURS else _COLOUR
    # Spread by rank, not by chance: the same scores give the same picture.
    heights = row - 0.12 + 0.22 * (np.arange(len(values)) * 0.618034 % 1 - 0.5)
    axes.scatter(values, heights, s=9, color=colour, alpha=0.45, linewidths=0, zorder=2)
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    axes.barh(row - 0.12, high - low, 0.3, low, color="none", edgecolor=_FAINT, zorder=1)
    axes.plot([middle, middle], [row - 0.27, row + 0.03], color=_FAINT, linewidth=1.5, zorder=1)
    if summary.interval is not None:
        axes.plot([summary.interval.low, summary.interval.high], [row + 0.22] * 2, color=colour, linewidth=2)
    axes.plot(summary.mean, row + 0.22, "D", color=colour, markersize=5)
    axes.annotate(
        f"{summary.mean:.4g}", (summary.mean, row + 0.22), (0, -12), textcoords="offset points", ha="center", fontsize=7
    )
    return label

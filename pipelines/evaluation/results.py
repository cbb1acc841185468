"""The files of a report, written when everything is measured; report.json is the last one.

scores.parquet     one row per method, picture and metric: value, or the reason why there is none
report.json        the header: protocol and digest, model, versions, machine, counts, methods, metrics, pictures
report.md          means with their counts, per method and metric; what is missing, and why
figures/*.png      how each metric is distributed          report.html    picture by picture
pictures/<method>/<picture>.png
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.evaluation import report_html
from pipelines.evaluation.figures import write_figures
from pipelines.evaluation.measuring import Score
from pipelines.evaluation.paper import compare_with_paper, paper_markdown
from pipelines.evaluation.score_table import HEADER_NAME, INPUT, SCORES_NAME, Metric, ScoreTable, read_score_table
from pipelines.evaluation.scoring import NOT_APPLICABLE, applies, installed_version
from pipelines.evaluation.statistics import Summary, summarize
from sr_platform.storage import open_storage

REPORT_NAME = "report.md"
FIGURES_NAME = "figures"
_SCHEMA = pa.schema(
    [
        ("method", pa.string()),
        ("picture", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("reason", pa.string()),
        ("seconds", pa.float64()),
    ]
)
_LIBRARIES = (
    *("torch", "numpy", "scipy", "pillow", "opencv-python-headless", "simplejpeg", "diffusers", "transformers"),
    *("ray", "pyiqa", "rapidocr", "onnxruntime", "faithdiff-platform"),
)
_MISSING_SHOWN = 12


def versions() -> dict[str, str]:
    """Of Python and of every library that may change a number; what is not installed is left out."""
    found = {name: installed_version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


def machine() -> dict[str, Any]:
    """What the driver's machine is."""
    import torch

    accelerator = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {"cpu": platform.machine(), "num_cpus": os.cpu_count(), "accelerator": accelerator}


def write_scores(report: str, header: Mapping[str, Any], scores: Sequence[Score]) -> None:
    """scores.parquet, then the header: from then on there is a report."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([score._asdict() for score in scores], schema=_SCHEMA), buffer)
    storage = open_storage(report)
    storage.write_bytes_atomic(SCORES_NAME, buffer.getvalue())
    storage.write_bytes_atomic(HEADER_NAME, (json.dumps(header, indent=2, allow_nan=False) + "\n").encode())


def write_pages(report: str) -> None:
    """Everything for people: report.md, figures, report.html; from scores.parquet, report.json and the pictures."""
    with report_folder(report) as folder:
        table = read_score_table(folder)
        figures = write_figures(table, folder / FIGURES_NAME)
        names = [figure.relative_to(folder).as_posix() for figure in figures]
        text = markdown(table, names)
        (folder / REPORT_NAME).write_text(text, encoding="utf-8")
        page = report_html.write(folder)
        storage = open_storage(report)
        if not storage.is_local:
            for name in (*names, REPORT_NAME, page.name):
                storage.write_bytes_atomic(name, (folder / name).read_bytes())


@contextmanager
def report_folder(report: str) -> Iterator[Path]:
    """A local folder with the report; one on S3 is fetched into a temporary folder, without its cache."""
    storage = open_storage(report)
    if storage.is_local:
        yield Path(storage.uri)
        return
    folder = Path(tempfile.mkdtemp(prefix="report-"))
    try:
        for name in storage.list():
            if not name.startswith("cache/"):
                open_storage(folder).write_chunks(name, storage.read_chunks(name))
        yield folder
    finally:
        shutil.rmtree(folder)


def markdown(table: ScoreTable, figures: Sequence[str] = ()) -> str:
    """report.md. The same scores give the same text."""
    header = table.header
    protocol, model = header["protocol"], header["model"]
    lines = [
        f"# Evaluation: {protocol['name']}",
        "",
        f"Protocol `{header['protocol_digest']}`. Two reports are comparable only if this digest is the same in both: "
        "`python pipelines/evaluate.py compare ONE OTHER`.",
        "",
        f"- data: {protocol['dataset']}, {protocol['pictures']['num_pictures']} pictures, "
        f"`{protocol['pictures']['digest']}`",
        f"- input: {_input_text(protocol)}",
        f"- model: {model['version']}, `{model['digest']}`"
        if model
        else "- model: none, only outputs of other methods",
        f"- restoration: {_plain_settings(protocol['restoration'])}",
        "",
        f"Means over pictures, and whether up or down is better. `{INPUT}` is the input enlarged by Lanczos. Where not "
        "all pictures have a score, their number stands behind the mean.",
        "",
        *means_table(table),
        "",
        *_rules(protocol),
        "",
        *_missing_lines(table),
        "## The paper's numbers",
        "",
        paper_markdown(compare_with_paper(table)),
    ]
    if figures:
        lines += ["## Distributions", "", *(f"![{Path(name).stem}]({name})" for name in figures), ""]
    shown = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    lines += ["## Made with", "", f"{shown}; {_plain_settings(header['machine'])}.", ""]
    return "\n".join(lines)


def means_table(table: ScoreTable) -> list[str]:
    """A row per method, a column per metric."""
    head = ["method", *(f"{metric.name} {_arrow(metric)}" for metric in table.metrics)]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * len(table.metrics)}"]
    for method in table.methods:
        cells = [_cell(table, method, metric.name) for metric in table.metrics]
        lines.append(f"| {' | '.join([method, *cells])} |")
    return lines


def _cell(table: ScoreTable, method: str, metric: str) -> str:
    if not applies(table, method, metric):
        return "-"
    return mean_text(summarize(table.scores(method, metric), num_resamples=1))


def mean_text(summary: Summary) -> str:
    """ "27.31", "27.31 (3 of 5)", or "missing"."""
    if summary.mean is None:
        return "missing"
    text = f"{summary.mean:.4f}" if abs(summary.mean) < 10 else f"{summary.mean:.2f}"
    total = summary.num_scored + summary.num_missing
    return text if not summary.num_missing else f"{text} ({summary.num_scored} of {total})"


def _missing_lines(table: ScoreTable) -> list[str]:
    """Why scores are missing, each reason with all that it concerns."""
    by_reason: dict[str, list[str]] = {}
    for method in table.methods:
        for metric in table.metrics:
            for reason, count in table.missing(method, metric.name).items():
                if reason in NOT_APPLICABLE:
                    continue
                by_reason.setdefault(reason, []).append(f"{metric.name} of {method} ({count})")
    if not by_reason:
        return []
    lines = ["## Missing", "", "How many pictures have no score, and why; none of them is in a mean.", ""]
    for reason, concerned in by_reason.items():
        more = f" and {len(concerned) - _MISSING_SHOWN} more" if len(concerned) > _MISSING_SHOWN else ""
        lines.append(f"- {reason}: {', '.join(concerned[:_MISSING_SHOWN])}{more}")
    return [*lines, ""]


def _rules(protocol: Mapping[str, Any]) -> list[str]:
    """Channel, border and library of the metrics that have them."""
    lines = [
        f"- {name}: channel {rules['channel']}, border {rules['border_px']} px"
        for name, rules in protocol["metrics"].items()
        if "channel" in rules
    ]
    lines += [f"- {library} {version or 'not installed'}" for library, version in protocol["libraries"].items()]
    if "text" in protocol:
        lines.append(f"- text: {_plain_settings(protocol['text'])}")
    return lines


def _input_text(protocol: Mapping[str, Any]) -> str:
    if protocol["degradation"]:
        return f"degraded by {protocol['degradation']} with seed {protocol['degradation_seed']}"
    return "as it came with the data"


def _plain_settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if value not in ("", None))


def _arrow(metric: Metric) -> str:
    return "(up)" if metric.higher_is_better else "(down)"

"""A finished evaluation, read back: scores.parquet and report.json of a report folder.

scores.parquet has one row per method, picture and metric: `value` is null where a score is missing, and `reason` says
why. report.json holds everything that the numbers depend on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sr_platform.errors import InputDataError

SCORES_NAME = "scores.parquet"
HEADER_NAME = "report.json"
OURS = "ours"
INPUT, REFERENCE = "lq", "hq"
"""Folders of pictures that are no method's results."""

_COLUMNS = ("method", "picture", "metric", "value", "reason")


@dataclass(frozen=True)
class Metric:
    """What a metric measures in: `unit` may be empty."""

    name: str
    higher_is_better: bool
    unit: str = ""


@dataclass(frozen=True)
class ScoreTable:
    """All scores: `values[method, metric]` by picture, None where missing; `reasons` of those by the same key."""

    header: Mapping[str, Any]
    methods: tuple[str, ...]
    metrics: tuple[Metric, ...]
    pictures: tuple[str, ...]
    values: Mapping[tuple[str, str], Mapping[str, float | None]]
    reasons: Mapping[tuple[str, str], Mapping[str, str]]

    def scores(self, method: str, metric: str) -> dict[str, float | None]:
        """Scores of every picture of the evaluation; a picture without a row is missing too."""
        found = self.values.get((method, metric), {})
        return {picture: found.get(picture) for picture in self.pictures}

    def scores_of(self, picture: str, method: str, metric: str) -> float | None:
        """One score; None where it is missing."""
        return self.values.get((method, metric), {}).get(picture)

    @cached_property
    def has_scores(self) -> frozenset[str]:
        """Metrics of which at least one score exists."""
        return frozenset(
            metric for (_, metric), scores in self.values.items() if any(v is not None for v in scores.values())
        )

    def missing(self, method: str, metric: str) -> Counter[str]:
        """Reasons of the missing scores, with how many pictures each concerns."""
        reasons = self.reasons.get((method, metric), {})
        lacking = [picture for picture, score in self.scores(method, metric).items() if score is None]
        return Counter(reasons.get(picture) or "no reason was recorded" for picture in lacking)


def read_score_table(report_folder: Path) -> ScoreTable:
    """The scores of a report folder.

    Raises:
        InputDataError: a file is missing or not what it should be.
    """
    header = _read_header(report_folder / HEADER_NAME)
    rows = _read_rows(report_folder / SCORES_NAME)
    values: dict[tuple[str, str], dict[str, float | None]] = {}
    reasons: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        key = (row["method"], row["metric"])
        scores = values.setdefault(key, {})
        if row["picture"] in scores:
            raise InputDataError(
                f"{SCORES_NAME}: {row['metric']} of {row['picture']} by {row['method']} has two rows; evaluate again"
            )
        scores[row["picture"]] = row["value"]
        if row["value"] is None:
            reasons.setdefault(key, {})[row["picture"]] = row["reason"] or ""
    return ScoreTable(
        header=header,
        methods=_in_order(header.get("methods", []), [method for method, _ in values], first=OURS),
        metrics=_metrics(header, [metric for _, metric in values]),
        pictures=tuple(sorted({row["picture"] for row in rows})),
        values=values,
        reasons=reasons,
    )


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputDataError(f"{path}: not a report's header ({error}); give the folder evaluate.py wrote") from None
    if not isinstance(header, dict):
        raise InputDataError(f"{path}: a {type(header).__name__} came, a JSON object is needed; evaluate again")
    return header


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise InputDataError(f"{path}: not a table of scores ({error}); evaluate again") from None
    lacking = [name for name in _COLUMNS if name not in table.column_names]
    if lacking:
        raise InputDataError(f"{path}: has no column {', '.join(lacking)}; evaluate again")
    rows: list[dict[str, Any]] = table.select(_COLUMNS).to_pylist()
    return rows


def _metrics(header: Mapping[str, Any], scored: Sequence[str]) -> tuple[Metric, ...]:
    """Those the header describes, in its order. A metric that it does not describe cannot be judged."""
    described = {
        about["name"]: Metric(about["name"], bool(about["higher_is_better"]), about.get("unit") or "")
        for about in header.get("metrics", [])
    }
    unknown = sorted(set(scored) - set(described))
    if unknown:
        raise InputDataError(f"{HEADER_NAME}: metrics does not describe {', '.join(unknown)}; evaluate again")
    return tuple(described.values())


def _in_order(named: Sequence[str], found: Sequence[str], *, first: str) -> tuple[str, ...]:
    every = list(dict.fromkeys([*named, *sorted(set(found))]))
    every = [name for name in every if name not in (INPUT, REFERENCE) or name in found]
    return tuple(sorted(every, key=lambda name: name != first))

"""The gate's judgement: is one evaluation good enough beside another, by stated margins. Pure; nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.evaluation.comparability import comparability
from pipelines.evaluation.gate_evidence import Evidence
from pipelines.evaluation.score_table import OURS, ScoreTable
from pipelines.evaluation.statistics import compare, summarize


@dataclass(frozen=True)
class Judged:
    """One metric: both means, and how much worse the new one is (below 0: better)."""

    metric: str
    mean: float
    champion_mean: float | None
    worse_by: float
    margin: float
    num_pictures: int
    interval: tuple[float, float] | None = None
    """Of the difference new minus champion, 95 %, by paired bootstrap over pictures."""


@dataclass(frozen=True)
class Verdict:
    """Without reasons it is good enough."""

    reasons: tuple[str, ...] = ()
    judged: tuple[Judged, ...] = ()
    run_id: str = ""
    champion_run_id: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        return not self.reasons

    def record(self) -> dict[str, Any]:
        """For the registry."""
        return {
            "against": list(self.reasons),
            "evaluation_run": self.run_id,
            "champion_run": self.champion_run_id,
            **self.about,
            "metrics": {judged.metric: _record(judged) for judged in self.judged},
        }

    def lines(self) -> list[str]:
        """For people."""
        return [_line(judged) for judged in self.judged]


def judge(own: Evidence, champion: Evidence | None, margins: Mapping[str, float]) -> Verdict:
    """Whether `own` has every score of the metrics in `margins`, and none is worse than the champion's by more."""
    reasons: list[str] = []
    about = {"protocol_digest": own.table.header["protocol_digest"]}
    runs = (own.run_id, champion.run_id if champion else "")
    for evidence, whose in ((own, "its"), (champion, "the champion's")):
        if evidence is not None:
            reasons += [text for name in margins for text in _missing(evidence.table, name, whose)]
    if champion is not None:
        differing = comparability(own.table, champion.table).reasons
        reasons += [f"it is not comparable with the champion: {text}" for text in differing]
    if reasons:
        return Verdict(tuple(reasons), (), *runs, about)
    theirs = None if champion is None else champion.table
    judged = tuple(_judged(own.table, theirs, name, margin) for name, margin in margins.items())
    for metric in judged:
        if metric.worse_by > metric.margin:
            reasons.append(f"{metric.metric} is worse by {metric.worse_by:.4g}, and {metric.margin:.4g} is allowed")
    return Verdict(tuple(reasons), judged, *runs, about)


def _missing(table: ScoreTable, metric: str, whose: str) -> list[str]:
    if metric not in {known.name for known in table.metrics}:
        return [f"{whose} evaluation does not measure {metric}"]
    missing = table.missing(OURS, metric)
    if not missing:
        return []
    reason = next(iter(missing))
    return [f"{whose} {metric} is missing on {sum(missing.values())} of {len(table.pictures)} pictures ({reason})"]


def _judged(own: ScoreTable, champion: ScoreTable | None, metric: str, margin: float) -> Judged:
    scores = own.scores(OURS, metric)
    mean = summarize(scores, num_resamples=1).mean
    assert mean is not None, metric
    if champion is None:
        return Judged(metric, mean, None, 0.0, margin, len(scores))
    higher_is_better = next(known.higher_is_better for known in own.metrics if known.name == metric)
    theirs = champion.scores(OURS, metric)
    champion_mean = summarize(theirs, num_resamples=1).mean
    found = compare(scores, theirs, higher_is_better=higher_is_better)
    assert found.mean is not None, metric
    worse_by = -found.mean if higher_is_better else found.mean
    interval = None if found.interval is None else (found.interval.low, found.interval.high)
    return Judged(metric, mean, champion_mean, worse_by, margin, found.num_pairs, interval)


def _record(judged: Judged) -> dict[str, Any]:
    return {
        "mean": round(judged.mean, 6),
        "champion": None if judged.champion_mean is None else round(judged.champion_mean, 6),
        "worse_by": round(judged.worse_by, 6),
        "margin": judged.margin,
        "pictures": judged.num_pictures,
        "interval": judged.interval and [round(end, 6) for end in judged.interval],
    }


def _line(judged: Judged) -> str:
    if judged.champion_mean is None:
        return f"{judged.metric}: {judged.mean:.4f} over {judged.num_pictures} pictures; there is no champion yet"
    verdict = "better" if judged.worse_by < 0 else "worse"
    interval = f", 95 % of {judged.interval[0]:+.4f} to {judged.interval[1]:+.4f}" if judged.interval else ""
    return (
        f"{judged.metric}: {judged.mean:.4f}, champion {judged.champion_mean:.4f}, {verdict} by "
        f"{abs(judged.worse_by):.4f} over {judged.num_pictures} pictures{interval} (margin {judged.margin:g})"
    )

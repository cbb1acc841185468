"""Are two reports comparable, and what differs: `evaluate.py compare ONE OTHER`.

Comparable are reports of one protocol digest, made from the same low-quality pixels. If they are not, every setting
that differs is named, with exit status 2; if they are, the means of both stand beside each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from pipelines.evaluation import results
from pipelines.evaluation.protocol import differences
from pipelines.evaluation.score_table import ScoreTable, read_score_table
from pipelines.evaluation.statistics import summarize
from sr_platform.config import StrictConfig, load_config
from sr_platform.errors import RequestError


class CompareConfig(StrictConfig):
    """Two reports."""

    one: Annotated[str, tyro.conf.Positional]
    """Folder or s3:// URI of a report."""
    other: Annotated[str, tyro.conf.Positional]
    """Of the other one."""


class IncomparableError(RequestError):
    """Two reports were made by different rules, or of different pictures."""


@dataclass(frozen=True)
class Comparability:
    """Empty `reasons`: the two are comparable."""

    reasons: tuple[str, ...]

    @property
    def is_comparable(self) -> bool:
        return not self.reasons


def main(argv: Sequence[str]) -> None:
    cfg = load_config(CompareConfig, argv, job="evaluate compare", description=__doc__ or "", recipe=False)
    with results.report_folder(cfg.one) as one, results.report_folder(cfg.other) as other:
        first, second = read_score_table(one), read_score_table(other)
    check_comparable(first, second, cfg.one, cfg.other)
    print(f"comparable: both under {first.header['protocol']['name']}, {first.header['protocol_digest']}")
    print("\n".join(side_by_side(first, second)))


def check_comparable(one: ScoreTable, other: ScoreTable, one_name: str, other_name: str) -> None:
    """Raises IncomparableError, naming everything that differs."""
    found = comparability(one, other)
    if not found.is_comparable:
        raise IncomparableError(f"compare: {one_name} and {other_name} are not comparable: {'; '.join(found.reasons)}")


def comparability(one: ScoreTable, other: ScoreTable) -> Comparability:
    """Whether numbers of the two may stand beside each other."""
    a, b = one.header, other.header
    if a["protocol_digest"] != b["protocol_digest"]:
        found = differences(a["protocol"], b["protocol"]) or ["the digests alone differ: a header was changed by hand"]
        return Comparability(tuple(found))
    inputs = [{picture["name"]: picture["lq_digest"] for picture in header.get("pictures", [])} for header in (a, b)]
    changed = sorted(name for name in {**inputs[0], **inputs[1]} if inputs[0].get(name) != inputs[1].get(name))
    if changed:
        return Comparability(
            (
                f"the low-quality pixels of {len(changed)} pictures differ, first {changed[0]}: other libraries, or "
                "another kind of CPU, degraded them",
            )
        )
    return Comparability(())


def side_by_side(one: ScoreTable, other: ScoreTable) -> list[str]:
    """A row per method and metric that both have: both means and the difference, over the pictures that both scored."""
    lines = ["| method | metric | one | other | difference | pictures |", "|---|---|---:|---:|---:|---:|"]
    for method in (name for name in one.methods if name in other.methods):
        for metric in one.metrics:
            a, b = one.scores(method, metric.name), other.scores(method, metric.name)
            both = [name for name in a if a[name] is not None and b.get(name) is not None]
            if not both:
                lines.append(f"| {method} | {metric.name} | missing | missing | - | 0 of {len(a)} |")
                continue
            means = [summarize({name: scores[name] for name in both}, num_resamples=1).mean for scores in (a, b)]
            assert means[0] is not None
            assert means[1] is not None
            shown = f"{means[0]:.4f} | {means[1]:.4f} | {means[1] - means[0]:+.4f}"
            lines.append(f"| {method} | {metric.name} | {shown} | {len(both)} of {len(a)} |")
    return lines

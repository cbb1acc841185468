"""The paper's published numbers beside ours, with the difference.

The numbers are data: paper_numbers.yaml, each with its table, row and source. A number for which no source was found
is printed as "not found", never as a guess.

    print(paper_markdown(compare_with_paper(read_score_table(report_folder))))
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipelines.evaluation.score_table import Metric, ScoreTable
from pipelines.evaluation.statistics import summarize
from sr_platform.config import StrictConfig

NUMBERS_PATH = Path(__file__).with_name("paper_numbers.yaml")
NOT_FOUND = "not found"


class Number(NamedTuple):
    """One cell of a table of the paper."""

    row: str
    metric: str
    value: float
    source: str


class Source(StrictConfig):
    """Where numbers were read. A source that is not the paper itself says what is doubtful about it."""

    where: str
    is_primary: bool
    caveat: str = ""


class Block(StrictConfig):
    """The part of a table about one data set and level."""

    dataset: str
    level: str = ""
    unit: str = ""
    numbers: tuple[Number, ...]


class Table(StrictConfig):
    """One table of the paper; `metrics` maps its columns to the names of ours."""

    title: str
    caveat: str
    metrics: dict[str, tuple[str, ...]]
    blocks: tuple[Block, ...]


class PaperNumbers(StrictConfig):
    """The whole of paper_numbers.yaml."""

    paper: dict[str, str]
    methods: dict[str, tuple[str, ...]]
    references: dict[str, tuple[str, ...]]
    sources: dict[str, Source]
    tables: dict[str, Table]


@dataclass(frozen=True)
class PaperCell:
    """One number of the paper beside ours: None where there is none. `num_missing` of our pictures have no score."""

    row: str
    metric: str
    paper: float | None
    source: str
    method: str | None
    our_metric: str | None
    ours: float | None
    num_scored: int
    num_missing: int

    @property
    def difference(self) -> float | None:
        return None if self.paper is None or self.ours is None else self.ours - self.paper


@dataclass(frozen=True)
class PaperComparison:
    """The cells of one block of one table, row by row, with everything a reader must know about them."""

    title: str
    columns: tuple[str, ...]
    cells: tuple[PaperCell, ...]
    notes: tuple[str, ...]
    sources: Mapping[str, Source]

    @property
    def num_not_found(self) -> int:
        return sum(cell.paper is None for cell in self.cells)


@lru_cache(maxsize=1)
def paper_numbers() -> PaperNumbers:
    """The file that ships."""
    return PaperNumbers.model_validate(yaml.safe_load(NUMBERS_PATH.read_text(encoding="utf-8")))


def compare_with_paper(table: ScoreTable) -> list[PaperComparison]:
    """A comparison for every block of the paper's table that the protocol names; none when it names no table."""
    protocol = table.header.get("protocol", {})
    numbers = paper_numbers()
    named = numbers.tables.get(str(protocol.get("table", "")))
    if named is None:
        return []
    blocks = [block for block in named.blocks if _is_about(block, protocol)]
    return [_compare_block(str(protocol["table"]), named, block, table, numbers) for block in blocks]


def paper_markdown(comparisons: Sequence[PaperComparison]) -> str:
    """Tables for report.md: paper, ours and the difference; an asterisk marks numbers not read in the paper itself."""
    if not comparisons:
        return "The protocol names no table of the paper.\n"
    return "\n".join(_markdown_of(comparison) for comparison in comparisons)


def _is_about(block: Block, protocol: Mapping[str, Any]) -> bool:
    dataset, level = _named_dataset(protocol), str(protocol.get("level") or "")
    return (not dataset or _plain(dataset) == _plain(block.dataset)) and (not level or level == block.level)


def _named_dataset(protocol: Mapping[str, Any]) -> str:
    named = protocol.get("dataset") or protocol.get("data") or ""
    return str(named.get("name") or "") if isinstance(named, Mapping) else str(named)


def _compare_block(
    number: str, paper_table: Table, block: Block, table: ScoreTable, numbers: PaperNumbers
) -> PaperComparison:
    printed = {(cell.row, cell.metric): cell for cell in block.numbers}
    rows = {**numbers.methods, **{row: names for row, names in numbers.references.items() if _has_row(block, row)}}
    cells = []
    for row, also in rows.items():
        method = _method_of(row, also, table)
        for column, names in paper_table.metrics.items():
            metric = next((m for m in table.metrics if m.name in names), None)
            ours, counts = _our_mean(table, method, metric, block)
            cell = printed.get((row, column))
            value, source = (cell.value, cell.source) if cell else (None, "")
            our_metric = metric.name if metric else None
            cells.append(PaperCell(row, column, value, source, method, our_metric, ours, *counts))
    sources = {cell.source: numbers.sources[cell.source] for cell in block.numbers}
    title = f"Table {number}: {paper_table.title} ({' '.join(filter(None, [block.dataset, block.level]))})"
    notes = _notes(paper_table, sources, cells)
    return PaperComparison(title, tuple(paper_table.metrics), tuple(cells), notes, sources)


def _has_row(block: Block, row: str) -> bool:
    return any(cell.row == row for cell in block.numbers)


def _notes(paper_table: Table, sources: Mapping[str, Source], cells: Sequence[PaperCell]) -> tuple[str, ...]:
    notes = [paper_table.caveat] if paper_table.caveat else []
    notes += [f"{source.where}: {source.caveat}" for source in sources.values() if source.caveat]
    not_found = sum(cell.paper is None for cell in cells)
    if not_found:
        notes.append(f"{not_found} of the {len(cells)} numbers of this table were found in no source and are left out")
    return tuple(notes)


def _our_mean(
    table: ScoreTable, method: str | None, metric: Metric | None, block: Block
) -> tuple[float | None, tuple[int, int]]:
    """Our mean in the paper's unit, and how many pictures were scored and are missing."""
    if method is None or metric is None:
        return None, (0, 0)
    summary = summarize(table.scores(method, metric.name), num_resamples=1)
    mean = None if summary.mean is None else summary.mean * _factor(metric, block)
    return mean, (summary.num_scored, summary.num_missing)


def _factor(metric: Metric, block: Block) -> float:
    """The paper prints precision and recall in percent; ours may be shares."""
    return 100.0 if block.unit == "%" and metric.unit != "%" else 1.0


def _method_of(row: str, also: Sequence[str], table: ScoreTable) -> str | None:
    names = {_plain(name) for name in (row, *also)}
    return next((method for method in table.methods if _plain(method) in names), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _markdown_of(comparison: PaperComparison) -> str:
    rows = list(dict.fromkeys(cell.row for cell in comparison.cells))
    head = ["row", *(f"{column}: paper / ours / difference" for column in comparison.columns)]
    lines = [f"### {comparison.title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [_cell_text(cell, comparison) for cell in comparison.cells if cell.row == row]
        lines.append(f"| {' | '.join([row, *cells])} |")
    notes = [f"- {note}" for note in comparison.notes]
    if any(not source.is_primary for source in comparison.sources.values()):
        notes.insert(0, "- \\* not read in the paper itself")
    return "\n".join([*lines, "", *notes, ""])


def _cell_text(cell: PaperCell, comparison: PaperComparison) -> str:
    mark = "" if cell.paper is None or comparison.sources[cell.source].is_primary else "\\*"
    paper = NOT_FOUND if cell.paper is None else f"{cell.paper:g}{mark}"
    if cell.ours is None:
        return f"{paper} / - / -" if cell.num_missing == 0 else f"{paper} / missing on {cell.num_missing} / -"
    count = f" (n={cell.num_scored}" + (f", {cell.num_missing} missing)" if cell.num_missing else ")")
    difference = "-" if cell.difference is None else f"{cell.difference:+.4g}"
    return f"{paper} / {cell.ours:.4g}{count} / {difference}"

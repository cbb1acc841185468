"""What the page of an evaluation shows, as plain JSON values: scores, means with intervals, links to pictures.

Links are relative to the report folder and quoted, so that a name may hold anything a file name may hold.
"""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from pipelines.evaluation.paper import PaperComparison, compare_with_paper
from pipelines.evaluation.score_table import INPUT, OURS, REFERENCE, ScoreTable
from pipelines.evaluation.scoring import NOT_APPLICABLE
from pipelines.evaluation.statistics import compare, summarize
from sr_platform.errors import InputDataError

PICTURES_NAME = "pictures"
_THUMBNAIL_PX = (224, 168)
_THUMBNAIL_QUALITY = 62


def page_data(table: ScoreTable, report_folder: Path) -> dict[str, Any]:
    """Everything of the page. The same report gives the same values.

    Raises:
        InputDataError: a picture of the report cannot be read.
    """
    return {
        "header": dict(table.header),
        "methods": list(table.methods),
        "metrics": [asdict(metric) for metric in table.metrics],
        "means": _means(table),
        "differences": _differences(table),
        "missing": _missing(table),
        "paper": [_paper(comparison) for comparison in compare_with_paper(table)],
        "pictures": _pictures(table, report_folder),
    }


def _means(table: ScoreTable) -> dict[str, dict[str, Any]]:
    return {
        method: {
            metric.name: _with_interval(asdict(summarize(table.scores(method, metric.name))))
            for metric in table.metrics
        }
        for method in table.methods
    }


def _differences(table: ScoreTable) -> dict[str, dict[str, Any]]:
    """Ours minus each other method, over the pictures that both have a score of."""
    found: dict[str, dict[str, Any]] = {}
    for method in table.methods if OURS in table.methods else ():
        if method == OURS:
            continue
        for metric in table.metrics:
            ours, theirs = table.scores(OURS, metric.name), table.scores(method, metric.name)
            difference = compare(ours, theirs, higher_is_better=metric.higher_is_better)
            values = {**asdict(difference), "ties": difference.ties, "win_rate": difference.win_rate}
            found.setdefault(method, {})[metric.name] = _with_interval(values)
    return found


def _with_interval(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, **(values.pop("interval") or {"low": None, "high": None})}


def _missing(table: ScoreTable) -> list[dict[str, Any]]:
    return [
        {
            "metric": metric.name,
            "method": method,
            "reason": reason,
            "pictures": count,
            "applies": reason not in NOT_APPLICABLE,
        }
        for metric in table.metrics
        for method in table.methods
        for reason, count in sorted(table.missing(method, metric.name).items())
    ]


def _paper(comparison: PaperComparison) -> dict[str, Any]:
    cells = [{**asdict(cell), "difference": cell.difference} for cell in comparison.cells]
    sources = {name: source.model_dump() for name, source in comparison.sources.items()}
    return {
        "title": comparison.title,
        "columns": list(comparison.columns),
        "cells": cells,
        "notes": list(comparison.notes),
        "sources": sources,
    }


def _pictures(table: ScoreTable, report_folder: Path) -> list[dict[str, Any]]:
    shown = (INPUT, *(method for method in table.methods if method not in (INPUT, REFERENCE)), REFERENCE)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda picture: _picture(table, report_folder, picture, shown), table.pictures))


def _picture(table: ScoreTable, report_folder: Path, name: str, shown: tuple[str, ...]) -> dict[str, Any]:
    files = {method: f"{PICTURES_NAME}/{method}/{name}.png" for method in shown}
    files = {method: file for method, file in files.items() if (report_folder / file).is_file()}
    size_px, thumbnails = None, {}
    # The input comes last: it is the smaller one, and is shown as large as the others.
    for method in sorted(files, key=lambda method: (method == INPUT, method != REFERENCE)):
        size, thumbnail = _looked_at(report_folder / files[method], wants_thumbnail=method in (OURS, INPUT))
        size_px = size_px or size
        if thumbnail:
            thumbnails[method] = thumbnail
    return {
        "name": name,
        "size_px": size_px,
        "files": {method: quote(file) for method, file in files.items()},
        "thumbnails": thumbnails,
        "scores": {m: {x.name: table.scores_of(name, m, x.name) for x in table.metrics} for m in table.methods},
    }


def _looked_at(path: Path, *, wants_thumbnail: bool) -> tuple[tuple[int, int], str]:
    """(width, height) px of a picture, and a small copy of it as a data URI where wanted."""
    try:
        with Image.open(path) as image:
            size = image.size
            if not wants_thumbnail:
                return size, ""
            small = image.convert("RGB")
            small.thumbnail(_THUMBNAIL_PX, Image.Resampling.BICUBIC)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputDataError(f"{path}: not a picture ({error}); evaluate again") from None
    data = io.BytesIO()
    small.save(data, "WEBP", quality=_THUMBNAIL_QUALITY, method=4)
    return size, f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"

"""report.html: the comparison page of an evaluation, for people. Opens from a file, without a server or a network.

    write(report_folder) -> report_folder / "report.html"

One file with everything in it but the pictures, which it links to where they lie below the report folder. The page's
parts are in `report/`; nothing of them is built.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from pipelines.evaluation.report_data import page_data
from pipelines.evaluation.score_table import read_score_table

PAGE_NAME = "report.html"
_PARTS = Path(__file__).with_name("report")
_SCRIPTS = ("element.js", "scores.js", "charts.js", "paper.js", "viewer.js", "pictures.js", "page.js")


def write(report_folder: Path) -> Path:
    """Writes the page of a finished report folder and returns its path; it appears only when complete.

    Raises:
        InputDataError: the folder's scores, header or pictures cannot be read.
    """
    data = page_data(read_score_table(report_folder), report_folder)
    path = report_folder / PAGE_NAME
    partial = path.with_suffix(".html.partial")
    partial.write_text(page(data), encoding="utf-8")
    partial.replace(path)
    return path


def page(data: dict[str, Any]) -> str:
    """The page as text. Data enters as JSON that cannot end its element, and scripts put it in as text."""
    filled = {
        "title": html.escape(f"Evaluation: {data['header'].get('protocol', {}).get('name', 'report')}"),
        "style": _part("page.css"),
        "data": _json_for_html(data),
        "script": "\n".join(_part(name) for name in _SCRIPTS),
    }
    # In one pass: what is filled in may hold braces of its own.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: filled[mark[1]], _part("page.html"))


def _json_for_html(data: dict[str, Any]) -> str:
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _part(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")

"""Too many bad pictures stop the job; what the recipe filters out does not count as bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.preparation.ceiling import Ceiling, QuarantineConfig
from sr_platform.errors import InputDataError
from sr_platform.storage import open_storage


def ceiling(tmp_path: Path, **settings: float) -> Ceiling:
    return Ceiling(QuarantineConfig.model_validate(settings), 100, open_storage(tmp_path))


def test_the_job_stops_beyond_the_ceiling_and_lists_what_was_bad(tmp_path: Path) -> None:
    limit = ceiling(tmp_path, max_fraction=0.03, always_allowed=0)
    limit.add((f"a/{i}", "unreadable: cut off") for i in range(3))
    with pytest.raises(InputDataError, match=r"4 of 100 pictures are bad so far \(1 empty caption, 3 unreadable; a/0"):
        limit.add([("a/9", "empty caption: the model said nothing")])
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == ["a/0", "a/1", "a/2", "a/9"]


def test_a_picture_counts_once_and_the_recipes_own_choices_not_at_all(tmp_path: Path) -> None:
    limit = ceiling(tmp_path, max_fraction=0.01, always_allowed=1)
    for _ in range(5):
        limit.add([("a/1", "empty caption: x"), ("a/2", "too small: x"), ("a/3", "near duplicate: x")])
    assert limit.bad == {"a/1": "empty caption: x"}


def test_a_few_are_always_allowed(tmp_path: Path) -> None:
    limit = ceiling(tmp_path, max_fraction=0.0, always_allowed=2)
    limit.add([("a/1", "unreadable: x"), ("a/2", "unreadable: x")])
    with pytest.raises(InputDataError, match="2 are allowed"):
        limit.add([("a/3", "unreadable: x")])

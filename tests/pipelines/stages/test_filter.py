"""The filter says of each picture whether it can be used, and why not."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from PIL import Image

from pipelines.stages.filter import Filter, FilterConfig
from pipelines.stages.sample import Sample, read_table, to_table

CFG = FilterConfig(min_side_px=64, max_pixels=20_000, min_deviation=5.0)


def judged(data: bytes) -> Sample:
    sample = Sample(shard=0, num_pictures=1, source="a.png", data=data)
    (row,) = read_table(Filter(CFG)(to_table([sample])))
    return row


def test_a_good_picture_passes_with_its_size(picture_file: Callable[..., bytes]) -> None:
    data = picture_file(64, 90)
    row = judged(data)
    assert (row.problem, row.source_height_px, row.source_width_px, row.data) == ("", 64, 90, data)


def test_unusable_pictures_carry_reason_and_detail_and_no_bytes(picture_file: Callable[..., bytes]) -> None:
    flat = io.BytesIO()
    Image.new("RGB", (90, 90), "gray").save(flat, "PNG")
    problems = {
        "unreadable: image file is truncated": picture_file(80, 80)[:3000],
        "unreadable: not a picture of a known format": b"text",
        "too small: 100x63 px, less than 64 px": picture_file(63, 100),
        "too flat: gray levels deviate by 0.0": flat.getvalue(),
        "unreadable: 200x200 px are more than 20000 pixels": picture_file(200, 200),
    }
    for problem, data in problems.items():
        row = judged(data)
        assert row.problem.startswith(problem)
        assert row.data == b""


def test_a_row_with_a_problem_passes_untouched() -> None:
    sample = Sample(shard=0, num_pictures=1, source="a.png", problem="unreadable: gone")
    assert read_table(Filter(CFG)(to_table([sample]))) == [sample]


def test_a_limit_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="min_side_px"):
        FilterConfig(min_side_px=-1)

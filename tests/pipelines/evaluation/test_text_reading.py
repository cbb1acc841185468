"""Matching is one-to-one by overlap and text; the real recogniser reads drawn text, and much less after level III."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

from faithdiff.degradation import degrade
from pipelines.evaluation.text_reading import (
    ILLEGIBLE,
    Matches,
    Reader,
    TextConfig,
    UnavailableReaderError,
    Word,
    dump_words,
    match,
    overlap_of,
    parse_words,
    plain,
)
from pipelines.synthetic.text_pictures import text_picture
from sr_platform.errors import InputDataError


def word(text: str, left: float, top: float, width: float = 40, height: float = 20) -> Word:
    right, bottom = left + width, top + height
    return Word(text, ((left, top), (right, top), (right, bottom), (left, bottom)))


def matches(known: list[Word], read: list[Word], min_overlap: float = 0.5) -> Matches:
    return match(known, read, min_overlap=min_overlap)


def test_text_and_place_must_agree_and_case_and_punctuation_need_not() -> None:
    known = [word("Mind", 0, 0), word("the", 50, 0), word("step!", 100, 0)]
    read = [word("MIND", 2, 1), word("tho", 50, 0), word("step", 130, 0)]
    found = matches(known, read)
    assert (found.num_known, found.num_read, found.num_matched) == (3, 3, 1)
    assert found.precision == found.recall == pytest.approx(1 / 3)
    assert matches(known, [*read[:2], word("step", 110, 0)]).num_matched == 2, "30 of 50 px are shared"


def test_nothing_is_matched_twice_and_the_best_overlap_is_taken() -> None:
    known = [word("EXIT", 0, 0), word("EXIT", 8, 0)]
    assert matches(known, [word("EXIT", 1, 0)]).num_matched == 1
    assert matches(known, [word("EXIT", 1, 0), word("EXIT", 9, 0)]).num_matched == 2
    assert matches([word("EXIT", 0, 0)], [word("EXIT", 0, 0), word("EXIT", 1, 0)]).precision == 0.5


def test_what_nobody_can_read_counts_for_nothing() -> None:
    known = [word("OPEN", 0, 0), word(ILLEGIBLE, 100, 0)]
    found = matches(known, [word("OPEN", 0, 0), word("blur", 100, 2), word("more", 200, 0)])
    assert (found.num_known, found.num_read, found.num_matched) == (1, 2, 1)


def test_reading_nothing_has_no_precision_to_be_proud_of() -> None:
    assert (matches([word("OPEN", 0, 0)], []).precision, matches([word("OPEN", 0, 0)], []).recall) == (0, 0)


def test_boxes_may_be_turned() -> None:
    square = word("a", 0, 0, 20, 20)
    diamond = Word("a", ((10, 0), (20, 10), (10, 20), (0, 10)))
    assert overlap_of(square, diamond) == pytest.approx(0.5)
    assert overlap_of(square, word("a", 50, 50)) == 0
    assert overlap_of(square, Word("a", ((1, 1), (1, 1), (1, 1), (1, 1)))) == 0


@pytest.mark.parametrize(
    ("text", "expected"), [("Mind the step!", "mindthestep"), ("No. 7", "no7"), ("A\u00c9", "a\u00e9")]
)
def test_text_is_compared_plainly(text: str, expected: str) -> None:
    assert plain(text) == expected


def test_words_come_back_from_json_and_from_icdar_lines() -> None:
    words = [word("a, b", 0, 0), word(ILLEGIBLE, 5, 5)]
    assert parse_words(dump_words(words), "a.words.json") == words
    lines = "\ufeff0,0,40,0,40,20,0,20,a, b\n5,5,45,5,45,25,5,25,###\n"
    assert parse_words(lines.encode(), "gt_a.txt") == words


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.words.json", b"[{}]"),
        ("a.words.json", b"no json"),
        ("a.words.json", json.dumps([{"text": "a", "box": [[0, 0]]}]).encode()),
        ("gt_a.txt", b"1,2,3,word\n"),
        ("gt_a.txt", b"\xff\xfe"),
    ],
)
def test_words_that_cannot_be_understood_are_refused_by_name(name: str, data: bytes) -> None:
    with pytest.raises(InputDataError, match=name):
        parse_words(data, name)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(TextConfig(unit="line"))


def test_drawn_text_is_read_and_after_level_iii_clearly_less(
    reader: Reader, capsys: pytest.CaptureFixture[str]
) -> None:
    totals = {"hq": np.zeros(3), "lq": np.zeros(3)}
    for number in range(4):
        drawn = text_picture(np.random.default_rng([7, number]), 288, 288)
        known = [Word(line.string, line.box) for line in drawn.lines]
        lq = degrade(drawn.pixels, "level_III", key=str(number), seed=0)
        enlarged = np.asarray(Image.fromarray(lq).resize((288, 288), Image.Resampling.LANCZOS))
        for name, pixels in (("hq", drawn.pixels), ("lq", enlarged)):
            found = match(known, reader.read(pixels), min_overlap=0.5)
            totals[name] += (found.num_known, found.num_read, found.num_matched)
    recall = {name: matched / known for name, (known, _, matched) in totals.items()}
    precision = {name: matched / max(read, 1) for name, (_, read, matched) in totals.items()}
    with capsys.disabled():
        print("\nlines read, precision/recall: " + ", ".join(f"{n} {precision[n]:.2f}/{recall[n]:.2f}" for n in totals))
    assert precision["hq"] > 0.8
    assert recall["hq"] > 0.8
    assert recall["lq"] < 0.5 * recall["hq"]


def test_words_are_parts_of_lines_with_boxes_of_their_own() -> None:
    drawn = text_picture(np.random.default_rng([7, 1]), 288, 288)
    read = Reader(TextConfig(unit="word")).read(drawn.pixels)
    written = " ".join(line.string for line in drawn.lines).split()
    assert {plain(found.text) for found in read} & {plain(text) for text in written}
    assert all(" " not in found.text for found in read)


def test_a_blank_picture_holds_no_text(reader: Reader) -> None:
    assert reader.read(np.full((64, 64, 3), 200, np.uint8)) == []


def test_without_the_library_or_with_a_damaged_model_one_line_says_so(tmp_path, monkeypatch) -> None:
    damaged = tmp_path / "rec.onnx"
    damaged.write_bytes(b"no model")
    with pytest.raises(UnavailableReaderError, match=r"the models .*rec\.onnx cannot be loaded") as refusal:
        Reader(TextConfig(), recogniser=str(damaged))
    assert "\n" not in str(refusal.value)
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UnavailableReaderError, match=r"needs rapidocr .*faithdiff-platform\[eval\]"):
        Reader(TextConfig())

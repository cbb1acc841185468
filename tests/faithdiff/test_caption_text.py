"""The clean-up of captions against the released strings, and the prompt and seeds of every captioner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from faithdiff.caption_text import PROMPT, clean_caption, text_seed


def test_released_clean_up_gives_the_released_strings(golden: Callable[[str], Any]) -> None:
    pairs = golden("case08_tables").about["caption_postprocess"]
    strings = {text: cleaned for text, cleaned in pairs.items() if not cleaned.startswith("RAISES")}
    assert len(strings) >= 4
    assert {text: clean_caption(text, compat="released") for text in strings} == strings


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("The image shows two cats.", "Two cats."),
        ("The image shows two cats. They sleep.", "Two cats. They sleep."),
        ("The image shows a dog! It is happy. Very.", "A dog! It is happy. Very."),
        ("A B C d", "D."),
        ("one two three", "One two three."),
        ("", ""),
        ("   \n", ""),
        ("The image shows ...", ""),
        ("!", ""),
    ],
)
def test_clean_up_neither_fails_on_short_texts_nor_doubles_the_full_stop(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned


def test_fixed_and_released_clean_up_differ_in_the_double_full_stop_only(golden: Callable[[str], Any]) -> None:
    for text, cleaned in golden("case08_tables").about["caption_postprocess"].items():
        if not cleaned.startswith("RAISES"):
            assert clean_caption(text) == cleaned.replace("..", ".")


def test_the_prompt_is_one_vicuna_turn_about_the_picture() -> None:
    assert PROMPT.startswith("A chat between a curious user")
    assert PROMPT.endswith(
        "questions. USER: <image>\nDescribe this image and its style in a very detailed manner. ASSISTANT:"
    )


def test_a_model_with_another_opening_loses_no_words() -> None:
    assert clean_caption("A red barn. It is old.", num_opening_words=0) == "A red barn. It is old."


def test_every_picture_has_its_own_seed_and_keeps_it() -> None:
    assert text_seed(0, "a") == 3073196845511751275
    assert len({text_seed(seed, key) for seed in range(4) for key in ("a", "b", "a b", "\udcff")}) == 16

"""Caption clean-up against the released strings, and LLaVA captions from a tiny model of the real classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faithdiff.captions import PROMPT, LlavaCaptioner, SamplingSettings, build_tiny_llava, clean_caption
from faithdiff.errors import InputError

SAMPLING = SamplingSettings(temperature=1.0, top_p=0.9, max_new_tokens=8)


@pytest.fixture(scope="module")
def tiny_llava_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def captioner(tiny_llava_path: Path) -> LlavaCaptioner:
    return LlavaCaptioner.from_pretrained(tiny_llava_path, sampling=SAMPLING)


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40 + 8 * i, 64, 3), dtype=np.uint8) for i in range(count)]


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


def test_a_caption_does_not_depend_on_its_batch(captioner: LlavaCaptioner) -> None:
    images, keys = pictures(3), ["a", "b", "c"]
    together = captioner(images, keys=keys, seed=1)
    assert len(together) == 3
    assert all(together)
    assert together == captioner(images[::-1], keys=keys[::-1], seed=1)[::-1]
    assert together == [captioner([i], keys=[k], seed=1)[0] for i, k in zip(images, keys, strict=True)]


def test_another_seed_or_key_gives_another_caption(captioner: LlavaCaptioner) -> None:
    image = pictures(1)
    texts = {captioner(image, keys=[key], seed=seed)[0] for key in ("a", "b") for seed in (0, 1, 2)}
    assert len(texts) == 6


def test_draws_follow_the_softmax_after_top_p(tiny_llava_path: Path) -> None:
    cold = LlavaCaptioner.from_pretrained(
        tiny_llava_path, sampling=SamplingSettings(temperature=1e-3, top_p=0.1, max_new_tokens=6)
    )
    image = pictures(1)
    assert len({cold(image, keys=["a"], seed=seed)[0] for seed in range(4)}) == 1


def test_no_pictures_give_no_captions(captioner: LlavaCaptioner) -> None:
    assert captioner([], keys=[], seed=0) == []


def test_keys_must_match_pictures(captioner: LlavaCaptioner) -> None:
    with pytest.raises(InputError, match="2 pictures came with 1 keys"):
        captioner(pictures(2), keys=["a"], seed=0)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no LLaVA model"):
        LlavaCaptioner.from_pretrained(tmp_path)

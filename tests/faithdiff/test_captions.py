"""LLaVA captions from a tiny model of the real classes: each depends on its picture, key and seed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from faithdiff.caption_text import SamplingSettings
from faithdiff.captions import LlavaCaptioner, SeededDraw, build_tiny_llava
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


def test_a_caption_does_not_depend_on_its_batch(captioner: LlavaCaptioner) -> None:
    images, keys = pictures(3), ["a", "b", "c"]
    together = captioner(images, keys=keys, seed=1)
    assert len(together) == 3
    assert all(together)
    assert together == captioner(images[::-1], keys=keys[::-1], seed=1)[::-1]
    assert together == [captioner([i], keys=[k], seed=1)[0] for i, k in zip(images, keys, strict=True)]


def test_pictures_that_end_early_leave_the_others_in_step(tiny_llava_path: Path) -> None:
    long = LlavaCaptioner.from_pretrained(
        tiny_llava_path, sampling=SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=60)
    )
    images, keys = pictures(5), ["a", "b", "c", "d", "e"]
    alone, by_two, together = (
        [text for i in range(0, 5, n) for text in long(images[i : i + n], keys=keys[i : i + n], seed=2)]
        for n in (1, 2, 5)
    )
    assert alone == by_two == together
    assert len({len(text.split()) for text in alone}) > 2, "they end at different words"


def test_words_are_drawn_as_often_as_the_softmax_says() -> None:
    scores = torch.tensor([[-torch.inf, 0.0, 1.0, 2.0, -torch.inf, 0.5, -torch.inf]])
    num_draws = 4000
    draw = SeededDraw([f"k{i}" for i in range(num_draws)], seed=0)
    left = draw(torch.zeros(num_draws, 0, dtype=torch.long), scores.expand(num_draws, -1))
    assert (left.exp().sum(dim=1) == 1).all()
    share, expected = left.exp().mean(dim=0), scores.softmax(dim=1)[0]
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / num_draws).sqrt()).all()


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

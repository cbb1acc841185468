"""Kinds come in their shares, however many pictures are drawn."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pipelines.synthetic.mixture import KINDS, MixtureConfig, draw_picture, kind_of
from sr_platform.config import validate
from sr_platform.errors import ConfigError


@pytest.mark.parametrize("num", [20, 200, 2000])
@pytest.mark.parametrize("first", [0, 12_345])
def test_any_run_of_pictures_has_the_kinds_in_their_shares(num: int, first: int) -> None:
    mixture = MixtureConfig(dead_leaves=5, textures=3, text=2)
    counts = Counter(kind_of(7, number, mixture) for number in range(first, first + num))
    for kind, share in (("dead_leaves", 0.5), ("textures", 0.3), ("text", 0.2)):
        assert counts[kind] == pytest.approx(share * num, abs=3)


def test_a_share_of_0_is_never_drawn_and_all_0_is_refused() -> None:
    mixture = MixtureConfig(text=0)
    assert {kind_of(0, number, mixture) for number in range(300)} == {"dead_leaves", "textures"}
    with pytest.raises(ConfigError, match="every share is 0; give one of dead_leaves, textures, text"):
        validate(MixtureConfig, dict.fromkeys(KINDS, 0), where="test")


def test_a_picture_follows_from_seed_and_number_alone() -> None:
    def pixels(seed: int, number: int) -> np.ndarray:
        mixture = MixtureConfig()
        return draw_picture(seed=seed, number=number, height_px=64, width_px=64, mixture=mixture)[1].pixels

    np.testing.assert_array_equal(pixels(0, 5), pixels(0, 5))
    assert not np.array_equal(pixels(0, 5), pixels(1, 5))
    assert not np.array_equal(pixels(0, 5), pixels(0, 6))

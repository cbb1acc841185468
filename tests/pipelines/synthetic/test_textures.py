"""Every material fills any view of it with something to see, and pictures repeat exactly."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.synthetic.textures import MATERIALS, exposed, lit_surface, texture


@pytest.mark.parametrize("name", MATERIALS)
def test_a_material_fills_the_picture_in_natural_tones(name: str) -> None:
    for seed in range(3):
        rgb, words = lit_surface(np.random.default_rng(seed), MATERIALS[name], 96, 128, sun=1.0)
        assert rgb.shape == (96, 128, 3)
        assert rgb.dtype == np.float32
        assert np.isfinite(rgb).all()
        assert rgb.min() > -0.05
        assert np.mean(rgb > 1.1) < 0.2
        assert rgb.std() > 0.01
        assert words == words.strip()
        assert len(words) > 8


def test_a_texture_repeats_exactly_and_differs_from_the_next() -> None:
    first, again, other = (texture(np.random.default_rng(seed), 64, 64) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert first.caption == again.caption
    assert not np.array_equal(first.pixels, other.pixels)


def test_what_is_dark_and_flat_is_exposed_and_the_rest_left_alone() -> None:
    rng = np.random.default_rng(0)
    dim = (0.04 + 0.02 * rng.standard_normal((64, 64, 1)) * np.ones(3)).astype(np.float32)
    assert exposed(dim).mean() == pytest.approx(0.15, abs=1e-3)
    assert exposed(dim).std() == pytest.approx(0.05, abs=1e-3)
    bright = rng.random((64, 64, 3), dtype=np.float32)
    np.testing.assert_allclose(exposed(bright), bright, atol=1e-6)
    assert min(texture(np.random.default_rng([5, seed]), 64, 64).pixels.std() for seed in range(40)) > 8


def test_one_material_can_lie_over_another_and_the_caption_says_so() -> None:
    pictures = [texture(np.random.default_rng([8, seed]), 64, 64) for seed in range(24)]
    layered = sum("partly covered by" in picture.caption for picture in pictures)
    assert 2 <= layered <= 14
    assert all(picture.caption[0].isupper() and picture.caption.endswith(".") for picture in pictures)

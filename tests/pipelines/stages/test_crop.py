"""Crops lie on a centred grid, do not overlap, and follow from the seed and the picture's name."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from pipelines.sources import SourceConfig
from pipelines.stages.crop import Crop, CropConfig, drawn_side_px, grid, num_crops, sample_key
from pipelines.stages.sample import Sample, read_table, to_table


def cropped(
    data: bytes, *, seed: int = 0, source: str = "a/a.png", cut: dict[str, Any] | None = None, **config: float
) -> list[Sample]:
    sample = Sample(0, 1, source, data=data)
    cfg = CropConfig.model_validate({"size_px": 32, "max_per_picture": 99, **config})
    sources = {"a": SourceConfig.model_validate({"name": "a", **(cut or {})})}
    return read_table(Crop(cfg, sources, seed=seed, max_pixels=10**6)(to_table([sample])))


def test_the_grid_is_centred_and_as_full_as_it_gets() -> None:
    assert grid(100, 32) == [2, 34, 66]
    assert grid(32, 32) == [0]
    for side in range(32, 200):
        starts = grid(side, 32)
        assert len(starts) == side // 32
        assert all(b - a == 32 for a, b in pairwise(starts))
        assert 0 <= starts[0] <= side - starts[-1] - 32 <= starts[0] + 1


def test_a_crop_holds_the_pixels_of_its_place(
    make_picture: Callable[..., np.ndarray], picture_file: Callable[..., bytes]
) -> None:
    picture, crops = make_picture(70, 100), cropped(picture_file(70, 100))
    assert len(crops) == 6
    for crop in crops:
        expected = picture[crop.top_px : crop.top_px + 32, crop.left_px : crop.left_px + 32]
        np.testing.assert_array_equal(crop.hq_pixels(), expected)
        assert (crop.data, crop.source_height_px, crop.source_width_px) == (b"", 70, 100)


def test_which_crops_are_kept_follows_from_seed_and_name_alone(picture_file: Callable[..., bytes]) -> None:
    data = picture_file(200, 200)

    def places(**kwargs: object) -> list[tuple[int, int]]:
        return [(c.top_px, c.left_px) for c in cropped(data, max_per_picture=5, **kwargs)]

    assert places() == places() == sorted(places())
    assert len(set(places())) == 5
    assert places() != places(seed=1)
    assert places() != places(source="a/b.png")


def test_keys_are_readable_unique_and_have_no_dots() -> None:
    sources = ["a.png", "a.jpg", "x/a.png", "Wëird näme.v2.png", "....png", "日本.png"]
    keys = [sample_key(source, index) for source in sources for index in range(3)]
    assert len(set(keys)) == len(keys)
    assert not any("." in key or "/" in key for key in keys)
    assert sample_key("Red House.png", 2).startswith("red_house-")


def test_flat_crops_are_problems_of_their_own() -> None:
    import io

    from PIL import Image

    half = np.zeros((32, 64, 3), np.uint8)
    half[:, 32:] = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    buffer = io.BytesIO()
    Image.fromarray(half).save(buffer, "PNG")
    flat, good = cropped(buffer.getvalue())
    assert flat.problem.startswith("crop too flat: gray levels deviate by 0.0")
    assert (flat.hq, good.problem) == (b"", "")


def test_a_source_cut_whole_gives_one_crop_with_sides_of_multiples_of_four(
    make_picture: Callable[..., np.ndarray], picture_file: Callable[..., bytes]
) -> None:
    (crop,) = cropped(picture_file(70, 103), cut={"cut": "whole"})
    np.testing.assert_array_equal(crop.hq_pixels(), make_picture(70, 103)[:68, :100])


def test_a_face_is_resized_to_a_side_drawn_from_seed_and_name(picture_file: Callable[..., bytes]) -> None:
    data, cut = picture_file(256, 256), {"cut": "whole", "resize_px": [128, 192]}
    sides = [cropped(data, source=f"a/{i}.png", cut=cut)[0].height_px for i in range(40)]
    assert sides == [cropped(data, source=f"a/{i}.png", cut=cut)[0].width_px for i in range(40)]
    assert all(128 <= side <= 192 and side % 4 == 0 for side in sides)
    assert len(set(sides)) > 8
    assert {drawn_side_px((128, 132), 0, str(i)) for i in range(40)} == {128, 132}


def test_the_number_of_crops_is_known_from_the_size(picture_file: Callable[..., bytes]) -> None:
    for size, limit in (((70, 100), 99), ((70, 100), 4), ((31, 100), 9)):
        cfg = CropConfig(size_px=32, max_per_picture=limit)
        crops = cropped(picture_file(*size), max_per_picture=limit)
        assert len(crops) == num_crops(*size, cfg, SourceConfig(name="a"))


def test_a_size_that_the_model_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        CropConfig(size_px=100)

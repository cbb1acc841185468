"""Pictures and samples for the tests of the data stages."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def picture_pixels(height_px: int, width_px: int, seed: int = 0) -> np.ndarray:
    """A smooth coloured picture with some structure everywhere."""
    y, x = np.mgrid[0:height_px, 0:width_px]
    periods = np.random.default_rng(seed).uniform(6, 20, (3, 2))
    waves = [127 + 100 * np.sin(x / a) * np.cos(y / b) for a, b in periods]
    return np.stack(waves, axis=-1).astype(np.uint8)


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., np.ndarray]:
    """`make_picture(height_px, width_px, seed=0)` -> uint8 RGB."""
    return picture_pixels


@pytest.fixture(scope="session")
def picture_file() -> Callable[..., bytes]:
    """`picture_file(height_px, width_px, seed=0)` -> the bytes of a PNG."""

    def make(height_px: int, width_px: int, seed: int = 0) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(picture_pixels(height_px, width_px, seed)).save(buffer, "PNG")
        return buffer.getvalue()

    return make


@pytest.fixture
def picture_folder(tmp_path: Path, picture_file: Callable[..., bytes]) -> Path:
    """Five good pictures in two folders, one with a caption beside it, and four that cannot be used."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for index in range(4):
        (folder / f"red_house_{index}.png").write_bytes(picture_file(70 + 32 * index, 100, index))
    (folder / "deep" / "0.png").write_bytes(picture_file(64, 64, 9))
    (folder / "deep" / "0.txt").write_text("A quiet\nharbour.")
    (folder / "truncated.png").write_bytes(picture_file(80, 80)[:600])
    (folder / "small.png").write_bytes(picture_file(40, 100))
    (folder / "zero.jpg").write_bytes(b"")
    Image.new("RGB", (90, 90), "gray").save(folder / "flat.png")
    (folder / "notes.md").write_text("not a picture")
    return folder


@pytest.fixture
def make_crop() -> Callable[..., Any]:
    """`make_crop(key="k", **fields)` -> a Sample after the crop stage, 32x32 px."""
    from pipelines.stages.sample import Sample

    def make(key: str = "k", **fields: Any) -> Sample:
        hq = picture_pixels(32, 32).tobytes()
        given = {"shard": 0, "num_pictures": 1, "source": "a.png", "height_px": 32, "width_px": 32, "hq": hq, **fields}
        return Sample(key=key, **given)

    return make

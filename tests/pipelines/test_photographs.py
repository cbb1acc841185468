"""The photographs of the demo come out of installed wheels, each with an honest caption."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path

import pytest
from PIL import Image

from pipelines.photographs import write_photographs
from sr_platform.errors import InputDataError


def test_every_photograph_is_a_picture_with_a_caption_beside_it(tmp_path: Path) -> None:
    paths = write_photographs(tmp_path / "photographs")
    assert len(paths) >= 12
    assert paths == write_photographs(tmp_path / "photographs")
    for path in paths:
        with Image.open(path) as image:
            image.load()
            assert min(image.size) >= 300
        caption = path.with_suffix(".txt").read_text().strip()
        assert caption.endswith(".")
        assert 20 < len(caption) < 200


def test_a_missing_wheel_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputDataError, match="skimage is not installed; pip install"):
        write_photographs(tmp_path)
    here = importlib.machinery.ModuleSpec("skimage", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: here)
    with pytest.raises(InputDataError, match=r"astronaut.png is missing from the installed skimage"):
        write_photographs(tmp_path)

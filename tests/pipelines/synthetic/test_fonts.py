"""Every typeface is there and has every character that words are made of."""

from __future__ import annotations

import importlib.machinery
import string
from pathlib import Path

import pytest

from pipelines.synthetic import fonts
from sr_platform.errors import InputDataError

CHARACTERS = string.ascii_letters + string.digits + ".,:;?!/-"


@pytest.mark.parametrize("name", fonts.ALL)
def test_a_typeface_has_every_character(name: str) -> None:
    face = fonts.font(name, 24)
    absent = bytes(face.getmask("\uffff"))
    assert [c for c in CHARACTERS if bytes(face.getmask(c)) in (absent, b"")] == []
    assert face.getlength("a b") > face.getlength("ab")


def test_missing_fonts_are_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputDataError, match="matplotlib is not installed"):
        fonts.fonts_path.__wrapped__()
    here = importlib.machinery.ModuleSpec("matplotlib", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: here)
    with pytest.raises(InputDataError, match=r"DejaVuSans.ttf is missing .* another version of matplotlib"):
        fonts.fonts_path.__wrapped__()

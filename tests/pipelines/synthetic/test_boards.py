"""Boards know exactly where their ink is, and their letters stand out from their ground."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageChops

from pipelines.synthetic import fonts
from pipelines.synthetic.boards import BOARDS, Board, with_article
from pipelines.synthetic.colours import contrast


@pytest.mark.parametrize("name", ["DejaVuSans-BoldOblique", "STIXGeneralItalic", "cmtt10"])
@pytest.mark.parametrize("outline_px", [0, 3])
def test_the_box_of_a_line_is_that_of_its_ink(name: str, outline_px: int) -> None:
    board = Board(Image.new("RGBA", (400, 100)), ink=(200, 30, 30))
    bottom = board.write("Quay, 7!", name, 40, 25, 30, outline_px=outline_px)
    text, box = board.lines[0]
    assert text == "Quay, 7!"
    assert box == board.image.getchannel("A").getbbox()
    assert box[:2] == (25, 30)
    assert box[3] == bottom


@pytest.mark.parametrize("draw", BOARDS, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("size", [(90, 90), (800, 600)])
def test_all_text_of_a_board_is_on_it_and_can_be_read(
    draw: Callable[[np.random.Generator, int, int], Board], size: tuple[int, int]
) -> None:
    for seed in range(6):
        board = draw(np.random.default_rng(seed), *size)
        assert board.name
        assert board.lines
        for text, (left, top, right, bottom) in board.lines:
            assert text == " ".join(text.split())
            assert 0 <= left < right <= board.image.width, (seed, text)
            assert 0 <= top < bottom <= board.image.height, (seed, text)
        if draw.__name__ != "lettering":
            ground = max(board.image.getcolors(10**6))[1]
            assert contrast(np.array(ground[:3]) / 255, np.array(board.ink) / 255) >= 4.4


def test_text_is_all_that_a_line_adds() -> None:
    board = Board(Image.new("RGBA", (300, 80), (240, 240, 230, 255)))
    before = board.image.copy()
    board.write("Heron Gate", fonts.BOLD[0], 30, 10, 10)
    changed = ImageChops.difference(before.convert("RGB"), board.image.convert("RGB"))
    assert changed.getbbox() == board.lines[0][1]


def test_names_take_their_article() -> None:
    assert with_article("orange sign") == "an orange sign"
    assert with_article("light gray ticket") == "a light gray ticket"

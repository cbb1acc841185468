"""Text is where its boxes say, whole in the picture, and nothing else depends on it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pipelines.synthetic.boards import Board
from pipelines.synthetic.picture import Picture, TextLine
from pipelines.synthetic.text_pictures import text_picture

SIZE_PX = 160


def draw(seed: int) -> Picture:
    return text_picture(np.random.default_rng([4, seed]), SIZE_PX, SIZE_PX)


@pytest.fixture
def without_ink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boards note their lines and write nothing."""
    write = Board.write

    def note(self: Board, *args: object, **kwargs: object) -> int:
        image, self.image = self.image, self.image.copy()
        bottom = write(self, *args, **kwargs)
        self.image = image
        return bottom

    monkeypatch.setattr(Board, "write", note)


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return [draw(seed) for seed in range(20)]


@pytest.mark.usefixtures("without_ink")
def test_text_lies_in_its_boxes_and_nowhere_else(pictures: list[Picture]) -> None:
    num_checked = 0
    for seed, picture in enumerate(pictures):
        blank = draw(seed)
        assert blank.lines == picture.lines
        changed = np.abs(picture.pixels.astype(int) - blank.pixels).max(axis=2)
        for line in picture.lines:
            assert_fits(changed, line, [other for other in picture.lines if other is not line])
        if "letters" not in picture.caption.split(" that ")[0]:  # without a plate, letters cast a shadow
            inside = np.max([filled(line, grow_px=1.5) for line in picture.lines], axis=0)
            assert changed[inside == 0].max() <= 2
            num_checked += 1
    assert num_checked >= 8


def assert_fits(changed: np.ndarray, line: TextLine, others: list[TextLine]) -> None:
    """The ink reaches every side of its box, within a pixel and a half."""
    mask = filled(line, grow_px=0)
    assert changed[mask > 0].max(initial=0) > 20, line
    corners = np.array(line.box)
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        strip = cv2.line(np.zeros_like(mask), *(np.rint(c).astype(int).tolist() for c in (start, end)), 1, 3)
        assert changed[strip > 0].max(initial=0) > 4, (line, others)


def filled(line: TextLine, grow_px: float) -> np.ndarray:
    """1 inside the box grown by so much."""
    mask = np.zeros((SIZE_PX, SIZE_PX), np.uint8)
    points = np.rint(np.array(line.box) * 16 - 8).astype(np.int32)
    cv2.fillPoly(mask, [points], 1, shift=4)
    if grow_px:
        mask = cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * int(2 * grow_px) // 2 + 1,) * 2))
    return mask


def test_every_box_is_within_the_picture_and_runs_as_one_reads(pictures: list[Picture]) -> None:
    for picture in pictures:
        assert picture.pixels.shape == (SIZE_PX, SIZE_PX, 3)
        for line in picture.lines:
            corners = np.array(line.box)
            assert corners.shape == (4, 2)
            assert corners.min() >= -0.5
            assert corners.max() <= SIZE_PX + 0.5
            along, down = corners[1] - corners[0], corners[3] - corners[0]
            assert along[0] * down[1] - along[1] * down[0] > 0
            assert along[0] > 0


def test_captions_quote_what_is_written(pictures: list[Picture]) -> None:
    for picture in pictures:
        assert picture.lines[0].string in picture.caption
        assert len(picture.caption) < 320


@pytest.mark.parametrize("size", [(64, 64), (64, 256), (256, 64)])
def test_pictures_may_be_small_or_narrow(size: tuple[int, int]) -> None:
    for seed in range(8):
        picture = text_picture(np.random.default_rng(seed), *size)
        assert picture.pixels.shape == (*size, 3)
        for line in picture.lines:
            assert (np.array(line.box) >= -0.5).all()
            assert (np.array(line.box) <= [size[1] + 0.5, size[0] + 0.5]).all()

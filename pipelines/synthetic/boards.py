"""Things with text on them: a sign, a number plate, a printed page, a ticket, or letters painted on the wall itself.

A board is drawn flat and straight; `pipelines.synthetic.text_pictures` hangs it into a picture. Lengths are px of the
board, about `SUPERSAMPLING` of which make one px of the picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from pipelines.synthetic import fonts, words
from pipelines.synthetic.colours import Colours, colour_names, contrast, draw_palette, from_lab, to_lab
from pipelines.synthetic.picture import SUPERSAMPLING

SMALLEST_FONT_PX = 10 * SUPERSAMPLING
_NARROW_PX = 16 * SMALLEST_FONT_PX
_MIN_CONTRAST = 4.5


@dataclass
class Board:
    """RGBA, transparent where it ends, and the lines of text on it."""

    image: Image.Image
    name: str = ""
    """Read before "that reads": "a yellow sign"."""
    ink: tuple[int, int, int] = (0, 0, 0)
    lines: list[tuple[str, tuple[int, int, int, int]]] = field(default_factory=list)
    """Each line's string, and left, top, right, bottom of its ink."""

    def write(self, text: str, font_name: str, size_px: int, left: float, top: float, *, outline_px: int = 0) -> int:
        """Writes one line whose ink begins at `left` and `top`; returns the ink's bottom."""
        face = fonts.font(font_name, size_px)
        draw = ImageDraw.Draw(self.image)
        # The box that fonts announce includes empty margins; that of the pixels is exact.
        stencil = Image.new("L", (int(face.getlength(text)) + 4 * size_px, 3 * size_px + 4 * outline_px))
        origin = (size_px + outline_px, size_px // 2 + outline_px)
        ImageDraw.Draw(stencil).text(origin, text, fill=255, font=face, stroke_width=outline_px)
        box = stencil.getbbox()
        assert box, f"{text!r} leaves no ink in {font_name}"
        x, y = round(left) - box[0] + origin[0], round(top) - box[1] + origin[1]
        if outline_px:
            around = (0, 0, 0) if sum(self.ink) > 380 else (255, 255, 255)
            draw.text((x, y), text, fill=(*around, 255), font=face, stroke_width=outline_px)
        draw.text((x, y), text, fill=(*self.ink, 255), font=face)
        width, height = box[2] - box[0], box[3] - box[1]
        self.lines.append((text, (round(left), round(top), round(left) + width, round(top) + height)))
        return round(top) + height


def sign(rng: np.random.Generator, width: int, height: int) -> Board:
    """One to three centred lines on a plate with a border."""
    lines = [words.notice(rng)]
    lines += [
        str(rng.choice([words.place(rng), words.code(rng), words.time_of_day(rng)])) for _ in range(rng.integers(3))
    ]
    height = int(min(height, width * (0.22 + 0.2 * len(lines)) * rng.uniform(0.9, 1.3)))
    board, ground = _plate(rng, width, height, radius=int(rng.uniform(0, 0.12) * height))
    _centred(rng, board, lines, str(rng.choice(fonts.BOLD + fonts.SANS)))
    board.name = with_article(f"{ground} sign")
    return board


def number_plate(rng: np.random.Generator, width: int, height: int) -> Board:
    """One code in large letters."""
    height = int(min(height, width * rng.uniform(0.2, 0.32)))
    board, ground = _plate(rng, width, height, radius=height // 8)
    _centred(rng, board, [words.code(rng)], str(rng.choice(fonts.MONOSPACED + fonts.BOLD)))
    board.name = with_article(f"{ground} plate")
    return board


def page(rng: np.random.Generator, width: int, height: int) -> Board:
    """A printed page: a title and as many lines as fit."""
    board, ground = _plate(rng, width, height, radius=0, is_paper=True)
    body = str(rng.choice(fonts.SANS + fonts.SERIF + fonts.MONOSPACED))
    size = max(int(min(width, height) * rng.uniform(0.035, 0.075)), SMALLEST_FONT_PX)
    margin, bottom = 0.07 * min(width, height), 0.93 * height
    y = margin
    if rng.random() < 0.6:
        title, bold = words.place(rng), str(rng.choice(fonts.BOLD))
        y = board.write(title, bold, _fitting(title, bold, width - 2 * margin, 2 * size), margin, y) + 0.7 * size
    left = [word for _ in range(60) for word in words.sentence(rng).split()]
    while left and y + 1.3 * size < bottom:
        line, left = _filled(left, body, size, width - 2 * margin)
        board.write(line, body, _fitting(line, body, width - 2 * margin, size), margin, y)
        y += 1.45 * size
    board.name = with_article(f"{ground} page of print")
    return board


def ticket(rng: np.random.Generator, width: int, height: int) -> Board:
    """A label with a heading, fields with their values, and bars."""
    height = int(min(height, width * rng.uniform(0.5, 0.8)))
    board, ground = _plate(rng, width, height, radius=height // 24, is_paper=True)
    margin = 0.06 * height
    heading = words.code(rng) if width < _NARROW_PX else f"{words.notice(rng)} {words.code(rng)}"
    name = str(rng.choice(fonts.BOLD))
    size = _fitting(heading, name, width - 2 * margin, int(0.16 * height))
    y = board.write(heading, name, size, margin, margin) + 0.05 * height
    draw = ImageDraw.Draw(board.image)
    draw.line((margin, y, width - margin, y), fill=(*board.ink, 255), width=max(height // 120, 1))
    y += 0.05 * height
    body = str(rng.choice(fonts.SANS + fonts.MONOSPACED))
    size = max(int(height * rng.uniform(0.07, 0.1)), SMALLEST_FONT_PX)
    fields = [
        ("From", words.place),
        ("Date", words.date),
        ("Seat", words.code),
        ("Price", words.price),
        ("Call", words.phone),
    ]
    for index in rng.permutation(len(fields)):
        text = f"{fields[index][0]}: {fields[index][1](rng)}"
        if y + 1.2 * size > 0.8 * height:
            break
        board.write(text, body, _fitting(text, body, width - 2 * margin, size), margin, y)
        y += 1.45 * size
    _bars(rng, board, (margin, max(y, 0.8 * height), width - margin, 0.95 * height))
    board.name = with_article(f"{ground} ticket")
    return board


def lettering(rng: np.random.Generator, width: int, height: int) -> Board:
    """One or two lines without a ground, outlined so that they stand out from anything."""
    lines = [str(rng.choice([words.notice(rng), words.place(rng), " ".join(words.words(rng, 2))]))]
    lines += [words.code(rng)] * int(rng.random() < 0.3)
    height = int(min(height, width * (0.1 + 0.2 * len(lines))))
    board = Board(Image.new("RGBA", (width, height)), ink=_bytes(_outlinable(rng)))
    _centred(rng, board, lines, str(rng.choice(fonts.BOLD + fonts.SERIF)), outline=0.06)
    board.name = f"{colour_names(np.array([board.ink], np.float32) / 255)} letters"
    return board


BOARDS: tuple[Callable[[np.random.Generator, int, int], Board], ...] = (sign, number_plate, page, ticket, lettering)


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plate(
    rng: np.random.Generator, width: int, height: int, radius: int, *, is_paper: bool = False
) -> tuple[Board, str]:
    """An empty board in one colour with a border in the colour of its letters, and the name of its colour."""
    ground, ink = _readable(rng, is_paper=is_paper)
    image = Image.new("RGBA", (width, height))
    board = Board(image, ink=_bytes(ink))
    border = 0 if is_paper else int(rng.choice([0, 0.03, 0.05]) * height)
    draw = ImageDraw.Draw(image)
    whole = (0, 0, width - 1, height - 1)
    draw.rounded_rectangle(whole, radius, fill=(*_bytes(ground), 255))
    if border:
        inner = (border, border, width - 1 - border, height - 1 - border)
        draw.rounded_rectangle(inner, max(radius - border, 0), outline=(*board.ink, 255), width=max(border // 2, 2))
    return board, colour_names(ground, 1)


def _readable(rng: np.random.Generator, *, is_paper: bool) -> tuple[Colours, Colours]:
    """Colours of the ground and of the ink on it; paper is light and muted, signs may be vivid."""
    if is_paper:
        ground = from_lab(np.array([[rng.uniform(80, 96), rng.normal(0, 2), rng.normal(5, 5)]]))
        ink = from_lab(to_lab(draw_palette(rng, 1)) * [0.3, 0.6, 0.6])
    else:
        lightness, hue, vividness = rng.uniform(20, 90), rng.uniform(0, 2 * np.pi), rng.uniform(0, 65)
        ground = from_lab(np.array([[lightness, vividness * np.cos(hue), vividness * np.sin(hue)]]))
        ink = draw_palette(rng, 1)
    if contrast(ground[0], ink[0]) < _MIN_CONTRAST:
        candidates = [np.full((1, 3), tone, np.float32) for tone in (0.04, 0.97)]
        ink = max(candidates, key=lambda colour: contrast(ground[0], colour[0]))
    return ground, ink


def _outlinable(rng: np.random.Generator) -> Colours:
    """A colour that a black or a white outline sets off clearly."""
    lab = to_lab(draw_palette(rng, 1))
    lab[:, 0] = rng.choice([rng.uniform(15, 38), rng.uniform(70, 92)])
    return from_lab(lab)


def _centred(rng: np.random.Generator, board: Board, lines: list[str], name: str, *, outline: float = 0.0) -> None:
    """Lines below each other, as large as width and height allow."""
    width, height = board.image.size
    room = 0.8 * height / len(lines)
    for index, text in enumerate(lines):
        size = _fitting(text, name, 0.84 * width, int(0.85 * room * rng.uniform(0.8, 1.1)))
        # Measured on a board of its own, then written where it belongs.
        probe = Board(Image.new("RGBA", (1, 1)))
        edge = int(outline * size)
        probe.write(text, name, size, 0, 0, outline_px=edge)
        _, _, text_width, text_height = probe.lines[0][1]
        top = 0.1 * height + room * (index + 0.5) - text_height / 2
        board.write(text, name, size, (width - text_width) / 2, top, outline_px=edge)


def _fitting(text: str, name: str, width: float, size_px: int) -> int:
    """The font size, at most `size_px`, at which the text is no wider than `width`."""
    size_px = max(size_px, 8)
    needed = fonts.font(name, size_px).getlength(text)
    return max(int(size_px * min(1.0, width / needed)), 5)


def _filled(left: list[str], name: str, size_px: int, width: float) -> tuple[str, list[str]]:
    """The words that fit on one line, and those that are left."""
    face = fonts.font(name, size_px)
    num = 1
    while num < len(left) and face.getlength(" ".join(left[: num + 1])) <= width:
        num += 1
    return " ".join(left[:num]), left[num:]


def _bars(rng: np.random.Generator, board: Board, box: tuple[float, float, float, float]) -> None:
    draw = ImageDraw.Draw(board.image)
    left, top, right, bottom = box
    unit = max((right - left) / 190, 1.0)
    x = left
    while x < right - 4 * unit:
        wide, gap = rng.integers(1, 4, 2) * unit
        draw.rectangle((round(x), round(top), round(x + wide) - 1, round(bottom)), fill=(*board.ink, 255))
        x += wide + gap


def _bytes(colour: Colours) -> tuple[int, int, int]:
    red, green, blue = np.rint(colour.reshape(-1, 3)[0] * 255).astype(int).tolist()
    return red, green, blue

"""A dataset at a glance: contact_sheet.png beside the manifest, with some of its samples.

write_contact_sheet("out/data") -> "out/data/contact_sheet.png"

Each sample is a card: hq, every lq variant enlarged to the size of the hq, the key and the caption. Which samples are
shown follows from the manifest's digest, so the same dataset gives the same sheet.
"""

from __future__ import annotations

import bisect
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipelines.stages.write import encode_png
from pipelines.synthetic.fonts import font
from sr_platform.sample_reader import SampleReader
from sr_platform.shards import Manifest
from sr_platform.storage import open_storage

CONTACT_SHEET_NAME = "contact_sheet.png"

_CELL_PX = 288
_GAP_PX = 20
_SEAM_PX = 4
"""Between the pictures of one card."""
_WIDTH_PX = 1900
_CAPTION_LINES = 4
_PAPER, _INK, _FAINT = (250, 249, 246), (30, 30, 30), (120, 118, 112)
_LQ = re.compile(r"lq(\d*)\.png")
# DejaVu also has the letters of Greek, Cyrillic and Arabic; what it lacks appears as a box.
_FACE, _BOLD_FACE = "DejaVuSans", "DejaVuSans-Bold"


@dataclass(frozen=True)
class SheetRow:
    """One sample to show."""

    key: str
    caption: str
    hq: Image.Image
    lqs: tuple[Image.Image, ...] = ()


def write_contact_sheet(uri: str, num_samples: int = 12) -> str:
    """Draws the sheet of a finished dataset and publishes it there; returns its path or URI.

    Raises:
        InputDataError: the dataset is not finished or damaged.
    """
    reader = SampleReader(uri)
    manifest = reader.manifest
    rng = np.random.default_rng(int(manifest.digest[:16], 16))
    chosen = np.sort(rng.choice(len(reader), min(num_samples, len(reader)), replace=False)).tolist()
    rows = [_read_row(reader, index) for index in chosen]
    image = contact_sheet(rows, title=_title(manifest, len(rows)))
    storage = open_storage(uri)
    storage.write_bytes_atomic(CONTACT_SHEET_NAME, encode_png(np.asarray(image)))
    return storage.path(CONTACT_SHEET_NAME)


def contact_sheet(rows: Sequence[SheetRow], title: str = "") -> Image.Image:
    """The sheet as one RGB picture: cards from left to right and down, below a title."""
    card_width = _card_width(max((1 + len(row.lqs) for row in rows), default=1))
    columns = max(1, min(len(rows), (_WIDTH_PX - _GAP_PX) // (card_width + _GAP_PX)))
    cards = [_card(row, card_width) for row in rows]
    lines = [cards[start : start + columns] for start in range(0, len(cards), columns)]
    width = max(columns * (card_width + _GAP_PX) + _GAP_PX, _CELL_PX * 2)
    heading = _wrapped(title, font(_BOLD_FACE, 18), width - 2 * _GAP_PX, max_lines=3)
    top = _GAP_PX + 24 * len(heading) + (_GAP_PX if heading else 0)
    height = top + sum(max(card.height for card in line) + _GAP_PX for line in lines)
    sheet = Image.new("RGB", (width, height), _PAPER)
    _print_lines(sheet, heading, font(_BOLD_FACE, 18), (_GAP_PX, _GAP_PX), 24, _INK)
    for line in lines:
        for column, card in enumerate(line):
            sheet.paste(card, (_GAP_PX + column * (card_width + _GAP_PX), top))
        top += max(card.height for card in line) + _GAP_PX
    return sheet


def _card_width(num_pictures: int) -> int:
    return num_pictures * (_CELL_PX + _SEAM_PX) - _SEAM_PX


def _card(row: SheetRow, width: int) -> Image.Image:
    """hq and lq beside each other; below them the key and the caption."""
    hq = _fitted(row.hq)
    pictures = [hq, *(_stretched(lq, hq.size) for lq in row.lqs)]
    caption = _wrapped(row.caption, font(_FACE, 14), width, _CAPTION_LINES)
    key = _wrapped(row.key, font(_FACE, 12), width, max_lines=1)
    key_top = hq.height + 6
    card = Image.new("RGB", (width, key_top + 18 + 19 * len(caption)), _PAPER)
    for place, picture in enumerate(pictures):
        card.paste(picture, (place * (hq.width + _SEAM_PX), 0))
    _print_lines(card, key, font(_FACE, 12), (0, key_top), 16, _FAINT)
    _print_lines(card, caption, font(_FACE, 14), (0, key_top + 18), 19, _INK)
    return card


def _fitted(hq: Image.Image) -> Image.Image:
    """As large as a cell allows; small pictures grow by a whole factor, so that their pixels stay square."""
    longest = max(hq.size)
    if longest > _CELL_PX:
        size = (max(hq.width * _CELL_PX // longest, 1), max(hq.height * _CELL_PX // longest, 1))
        return hq.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    factor = _CELL_PX // longest
    return hq.resize((hq.width * factor, hq.height * factor), Image.Resampling.NEAREST)


def _stretched(lq: Image.Image, size: tuple[int, int]) -> Image.Image:
    """lq over the same area as hq: its own pixels visible where it is enlarged."""
    is_enlarged = lq.width <= size[0]
    return lq.resize(size, Image.Resampling.NEAREST if is_enlarged else Image.Resampling.LANCZOS)


def _wrapped(text: str, face: ImageFont.FreeTypeFont, width_px: int, max_lines: int) -> list[str]:
    """Lines no wider than `width_px`; what is too long ends in dots. Words longer than a line are cut."""
    left = "".join(c if c.isprintable() else " " for c in text).split()
    lines: list[str] = []
    while left and len(lines) < max_lines:
        line = left.pop(0)
        if face.getlength(line) > width_px:
            line, rest = _cut(line, face, width_px)
            left.insert(0, rest)
        else:
            while left and face.getlength(f"{line} {left[0]}") <= width_px:
                line = f"{line} {left.pop(0)}"
        lines.append(line)
    if left:
        lines[-1] = _cut(f"{lines[-1]} ", face, width_px - face.getlength("..."))[0].rstrip() + "..."
    return lines


def _cut(text: str, face: ImageFont.FreeTypeFont, width_px: float) -> tuple[str, str]:
    """As many characters as fit, at least one, and the rest."""
    num = bisect.bisect_right(range(1, len(text) + 1), width_px, key=lambda num: face.getlength(text[:num]))
    return text[: max(num, 1)], text[max(num, 1) :]


def _print_lines(
    image: Image.Image,
    lines: Sequence[str],
    face: ImageFont.FreeTypeFont,
    place: tuple[int, int],
    spacing_px: int,
    colour: tuple[int, int, int],
) -> None:
    draw = ImageDraw.Draw(image)
    for index, line in enumerate(lines):
        draw.text((place[0], place[1] + index * spacing_px), line, fill=colour, font=face)


def _read_row(reader: SampleReader, index: int) -> SheetRow:
    """One sample without what nobody looks at; a synthesized picture is <key>.png and has no lq."""
    suffixes = reader.suffixes(index)
    variants = sorted((int(match[1] or 0), match[0]) for suffix in suffixes if (match := _LQ.fullmatch(suffix)))
    hq = "hq.png" if "hq.png" in suffixes else "png"
    about = ["json"] if "json" in suffixes else []
    members = reader.read_many([index], [hq, *(suffix for _, suffix in variants), *about])[0]
    caption = json.loads(members["json"]).get("caption", "") if about else ""
    lqs = tuple(_decoded(members[suffix]) for _, suffix in variants)
    return SheetRow(reader.keys[index], caption, _decoded(members[hq]), lqs)


def _decoded(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def _title(manifest: Manifest, num_shown: int) -> str:
    left_out = sum(count for name, count in manifest.counts.items() if name.startswith("quarantined"))
    parts = [
        f"dataset {manifest.digest[:16]}",
        f"{num_shown} of {manifest.num_samples:,} samples",
        f"{manifest.counts.get('pictures', manifest.num_samples):,} pictures ({left_out:,} left out)",
        f"{len(manifest.shards):,} shards",
        ", ".join(source.name for source in manifest.sources),
    ]
    return "  |  ".join(parts)

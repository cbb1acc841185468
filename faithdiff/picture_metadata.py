"""What a picture file says about its picture: which way is up, its resolution, and the EXIF tags worth keeping."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

from PIL import Image
from PIL.ExifTags import IFD, Base
from PIL.TiffImagePlugin import TiffImageFile

from faithdiff.picture_checks import find_png_chunk, tiff_tags

# More than a JPEG can hold in one piece.
MAX_EXIF_BYTES = 65_000
# The most that JPEG can hold.
_MAX_DPI = 65_535
_DESCRIPTIVE = (
    *(Base.ImageDescription, Base.Make, Base.Model, Base.Software, Base.DateTime, Base.Artist, Base.HostComputer),
    *(Base.Copyright, Base.Rating, Base.RatingPercent),
    *(Base.XPTitle, Base.XPComment, Base.XPAuthor, Base.XPKeywords, Base.XPSubject),
)
# Sizes of the picture, and offsets into the old file.
_STALE = (Base.ExifImageWidth, Base.ExifImageHeight, IFD.Interop)
_BULKY = (IFD.MakerNote, Base.UserComment)
# What Pillow raises on damaged EXIF blocks; its warnings are errors where they are turned into some.
_DAMAGE = (
    *(SyntaxError, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError),
    *(struct.error, Warning),
)


@dataclass(frozen=True)
class Metadata:
    dpi: tuple[float, float] | None
    exif: bytes | None
    notes: tuple[str, ...]


def orientation_of(image: Image.Image, data: bytes) -> int:
    """EXIF orientation from 1 to 8; 1 where there is none, or none that makes sense."""
    try:
        value = _exif_of(image, data).get(Base.Orientation, 1)
    except _DAMAGE:
        return 1
    return value if value in range(1, 9) else 1


def _stored_orientation(data: bytes) -> int:
    """Of a TIFF, which Pillow forgets once it has turned the picture."""
    value = tiff_tags(data).get(Base.Orientation, (1, 1))[1]
    return value if value in range(1, 9) else 1


def upright_size(image: Image.Image, data: bytes) -> tuple[int, int]:
    """Width and height in px once the picture is turned upright."""
    width, height = image.size
    # Pillow tells the size of a TIFF as it will be.
    is_turned = image.format != "TIFF" and orientation_of(image, data) >= 5
    return (height, width) if is_turned else (width, height)


def read_metadata(image: Image.Image, data: bytes) -> Metadata:
    """Of a loaded picture. What is damaged is left out, with a note."""
    notes = []
    exif = None
    try:
        exif = _kept(_exif_of(image, data))
    except _DAMAGE:
        notes.append("its EXIF data was ignored: it is damaged")
    if exif is not None and len(exif) > MAX_EXIF_BYTES:
        exif = None
        notes.append(f"its EXIF data was ignored: it has more than {MAX_EXIF_BYTES:,} bytes")
    return Metadata(_dpi(image, data), exif, tuple(notes))


def _exif_of(image: Image.Image, data: bytes) -> Image.Exif:
    if image.format == "PNG" and "exif" not in image.info:
        # It may stand behind the pixels, where Pillow sees it only after it has read them.
        late = find_png_chunk(data, b"eXIf")
        if late is not None:
            image.info["exif"] = b"Exif\0\0" + late
    return image.getexif()


def _kept(exif: Image.Exif) -> bytes | None:
    kept = Image.Exif()
    for tag in _DESCRIPTIVE:
        if tag in exif:
            kept[tag] = exif[tag]
    for group in (IFD.Exif, IFD.GPSInfo):
        values = {tag: value for tag, value in exif.get_ifd(group).items() if tag not in _STALE}
        if values:
            kept.get_ifd(group).update(values)
    if not kept and not any(kept.get_ifd(group) for group in (IFD.Exif, IFD.GPSInfo)):
        return None
    kept[Base.Orientation] = 1
    block = kept.tobytes()
    if len(block) > MAX_EXIF_BYTES:
        for bulky in _BULKY:
            kept.get_ifd(IFD.Exif).pop(bulky, None)
        block = kept.tobytes()
    return block.removeprefix(b"Exif\0\0")


def _dpi(image: Image.Image, data: bytes) -> tuple[float, float] | None:
    """Pixels per inch across and down the upright picture."""
    if isinstance(image, TiffImageFile) and Base.XResolution not in image.tag_v2:
        return None  # Pillow says 1
    orientation = _stored_orientation(data) if image.format == "TIFF" else orientation_of(image, data)
    value: Any = image.info.get("dpi")
    try:
        across, down = (float(side) for side in (value if orientation < 5 else value[::-1]))
    except (TypeError, ValueError, ArithmeticError):
        return None
    if not all(math.isfinite(side) and 0 < side <= _MAX_DPI for side in (across, down)):
        return None
    return across, down

"""Pixels of an opened picture file as arrays, upright, at the depth that the file has: colours and alpha apart.

Pillow decodes everything, for its decoders stand up to hostile files. It keeps 8 bits of 16-bit RGB, so such a file is
decoded twice: once for the upper bytes, once, told the other byte order, for the lower.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from faithdiff.picture_checks import OtherKind, tiff_tags
from faithdiff.picture_metadata import orientation_of
from faithdiff.picture_profiles import Space

Levels = npt.NDArray[Any]

_WIDE_GREY = ("I;16", "I;16B", "I;16L", "I;16N")
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_PHOTOMETRIC, _PLANAR, _BITS = 262, 284, 258
# Factors by which Pillow stretches the few levels of a grey PNG to 8 bits; it leaves the transparent one as it is.
_STRETCHED = {"L;2": 85, "L;4": 17}
# Steps that turn a picture of each EXIF orientation upright: whether rows and columns change places, then flips.
_UPRIGHT = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


@dataclass(frozen=True)
class Pixels:
    """uint8 or uint16 levels as the file means them: `colours` [H, W] grey, [H, W, 3] RGB or [H, W, 4] CMYK."""

    colours: Levels
    alpha: Levels | None
    space: Space

    @property
    def is_grey(self) -> bool:
        return self.space == "GRAY"


def read_pixels(image: Image.Image, data: bytes) -> Pixels:
    """Decodes `image`, opened from `data`. Raises OtherKind for levels of other depths, and whatever decoders raise."""
    tags = tiff_tags(data) if image.format == "TIFF" else {}
    if tags.get(_PLANAR, (1, 1))[1] != 1 and tags.get(_BITS, (1, 8))[1] > 8:
        raise OtherKind("a TIFF of 16 bits with its channels in separate planes; save it interleaved")
    rawmode = _rawmode(image)
    is_wide = image.mode in _WIDE_GREY or (";16" in rawmode and image.mode in ("RGB", "RGBA"))
    pixels = _read_wide(image, data, rawmode, tags) if is_wide else _read_narrow(image, rawmode)
    orientation = 1 if image.format == "TIFF" else orientation_of(image, data)  # a TIFF is turned as it is loaded
    alpha = None if pixels.alpha is None else upright(pixels.alpha, orientation)
    return Pixels(upright(pixels.colours, orientation), alpha, pixels.space)


def upright(levels: Levels, orientation: int) -> Levels:
    """Levels [H, W, ...] turned and mirrored as an EXIF orientation from 1 to 8 asks for."""
    is_transposed, flips_rows, flips_columns = _UPRIGHT[orientation]
    if is_transposed:
        levels = levels.swapaxes(0, 1)
    return np.ascontiguousarray(levels[:: -1 if flips_rows else 1, :: -1 if flips_columns else 1])


def filled_below(rgb: Levels, alpha: Levels) -> Levels:
    """`rgb` where something shows; elsewhere what is around goes on, so that no hidden colour spreads by enlarging.

    Colours are averaged over ever larger squares, and each hidden pixel takes the smallest square that shows anything.
    """
    shows = alpha > 0
    if shows.all() or not shows.any():
        return rgb
    is_wide = rgb.dtype == np.uint16
    narrow = (rgb >> 8).astype(np.uint8) if is_wide else rgb
    mask = Image.fromarray(shows.astype(np.uint8) * 255)
    around = np.asarray(_filled(Image.merge("RGBA", (*Image.fromarray(narrow).split(), mask))))
    return np.where(shows[..., None], rgb, around.astype(np.uint16) * 257 if is_wide else around)


def _filled(image: Image.Image) -> Image.Image:
    """RGB of an RGBA picture whose alpha is 0 or 255, holes filled from half the size."""
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] == 255 or max(image.size) == 1:
        return image.convert("RGB")
    half = image.convert("RGBa").reduce(2).convert("RGBA")
    half.putalpha(half.getchannel("A").point([0] + [255] * 255))
    around = _filled(half).resize(image.size, Image.Resampling.BILINEAR)
    around.paste(image.convert("RGB"), mask=alpha)
    return around


def _rawmode(image: Image.Image) -> str:
    """How Pillow is about to unpack the pixels, empty where it does not say."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return ""
    args = image.tile[0].args
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _read_narrow(image: Image.Image, rawmode: str) -> Pixels:
    if image.mode in ("I", "F"):
        raise OtherKind(
            f"a picture of {'whole' if image.mode == 'I' else 'floating-point'} numbers of 32 bits; "
            "save it with 8 or 16 bits per channel"
        )
    if rawmode in _STRETCHED and "transparency" in image.info:
        image.info["transparency"] *= _STRETCHED[rawmode]
    image.load()
    if image.mode == "CMYK":
        return Pixels(np.asarray(image), None, "CMYK")
    is_grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        levels = np.asarray(image.convert("RGBA"))
        return Pixels(levels[..., 0] if is_grey else levels[..., :3], levels[..., 3], "GRAY" if is_grey else "RGB")
    if is_grey:
        return Pixels(np.asarray(image.convert("L")), None, "GRAY")
    return Pixels(np.asarray(image.convert("RGB")), None, "RGB")


def _read_wide(image: Image.Image, data: bytes, rawmode: str, tags: dict[int, tuple[int, int]]) -> Pixels:
    if image.mode in _WIDE_GREY:
        return _wide_grey(image, tags)
    if rawmode == "LA;16B":
        # Four bytes a pixel, as 8-bit RGBA has them.
        raw = _unpacked(image, "RGBA").view(">u2").astype(np.uint16)
        return Pixels(raw[..., 0], raw[..., 1], "GRAY")
    straight = rawmode.replace("RGBa", "RGBA")
    with Image.open(BytesIO(data), formats=(str(image.format),)) as again:
        lower = _unpacked(again, straight[:-1] + _OTHER_ORDER[straight[-1]])
    levels = _unpacked(image, straight).astype(np.uint16) << 8 | lower
    if levels.shape[2] == 4:
        colours, alpha = levels[..., :3], levels[..., 3]
        return Pixels(_unpremultiplied(colours, alpha) if "RGBa" in rawmode else colours, alpha, "RGB")
    return Pixels(levels, _alpha_of_key(levels, image.info.get("transparency")), "RGB")


def _unpacked(image: Image.Image, rawmode: str) -> npt.NDArray[np.uint8]:
    assert isinstance(image, ImageFile.ImageFile), "an opened file"
    image.tile = [
        tile._replace(args=(rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode)
        for tile in image.tile
    ]
    image.load()
    return np.asarray(image)


def _wide_grey(image: Image.Image, tags: dict[int, tuple[int, int]]) -> Pixels:
    image.load()
    levels: Levels = np.asarray(image).astype(np.uint16)
    if tags.get(_BITS, (1, 16))[1] == 12:
        levels = levels << 4 | levels >> 8
    alpha = _alpha_of_key(levels[..., None], image.info.get("transparency"))
    if tags.get(_PHOTOMETRIC, (1, 1))[1] == 0:
        levels = 65_535 - levels
    return Pixels(levels, alpha, "GRAY")


def _alpha_of_key(levels: Levels, key: Any) -> Levels | None:
    """Of a PNG that names one colour as transparent."""
    if key is None:
        return None
    return np.where((levels == np.asarray(key)).all(axis=-1), 0, 65_535).astype(np.uint16)


def _unpremultiplied(colours: Levels, alpha: Levels) -> Levels:
    result = np.zeros_like(colours)
    for rows in range(0, len(colours), 256):
        part, share = colours[rows : rows + 256].astype(np.uint64), alpha[rows : rows + 256, :, None].astype(np.uint64)
        result[rows : rows + 256] = np.minimum((part * 65_535 + share // 2) // np.maximum(share, 1), 65_535)
    return result

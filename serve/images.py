"""Bytes <-> pictures: what people upload becomes uint8 RGB [H, W, 3], upright; results become PNG.

Limits are checked on the header, before a single pixel is decoded. Files are read by Pillow from memory alone.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field, PositiveInt

from faithdiff.errors import InputError
from faithdiff.image_modes import to_rgb
from serve.problems import Problem
from sr_platform.config import StrictConfig

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class PictureLimits(StrictConfig):
    """How large a picture may be that comes in, and that goes out."""

    max_upload_bytes: PositiveInt = 32 * 1024**2
    """Largest upload, as sent."""
    max_input_px: PositiveInt = 25_000_000
    """Most pixels of an uploaded picture."""
    max_side_px: PositiveInt = Field(default=16_384, le=65_535)
    """Longest side of an uploaded picture."""
    max_output_px: PositiveInt = 64_000_000
    """Most pixels of a restored picture: input pixels x scale x scale."""


def decode_picture(data: bytes, limits: PictureLimits) -> np.ndarray:
    """The upright picture in `data` as uint8 RGB [H, W, 3]; of several frames the first.

    EXIF orientation is applied; transparent pixels are laid on white; 16 bits are reduced to 8.

    Raises:
        Problem: 415 no picture of `FORMATS`; 413 too many pixels; 422 damaged.
    """
    picture = _open(data)
    _check_size(picture, limits)
    try:
        picture.load()
        return to_rgb(ImageOps.exif_transpose(picture))
    except MemoryError:
        raise
    except InputError as error:
        raise Problem(415, "unsupported-picture", str(error)) from error
    except Exception as error:
        # Decoders raise anything at all on damaged or hostile files.
        raise _unreadable(error) from error


def check_output(lq: np.ndarray, scale: int, limits: PictureLimits) -> None:
    """Raises Problem 413 when `scale` would make more pixels than allowed."""
    height, width = lq.shape[:2]
    if height * width * scale**2 > limits.max_output_px:
        largest = int((limits.max_output_px / (height * width)) ** 0.5)
        advice = f"take a scale of at most {largest}" if largest else "send a smaller picture"
        raise Problem(
            413,
            "result-too-large",
            f"picture: {width}x{height} px at scale {scale} makes {height * width * scale**2:,} pixels; "
            f"at most {limits.max_output_px:,} are allowed: {advice}",
        )


def encode_png(rgb: np.ndarray) -> bytes:
    """uint8 RGB [H, W, 3] as a PNG file. The same array gives the same bytes."""
    buffer = BytesIO()
    # Level 3 is about three times as fast as the default and a few per cent larger.
    Image.fromarray(rgb).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except _BOMBS as error:
        raise Problem(413, "picture-too-large", f"picture: {error}") from error
    except UnidentifiedImageError as error:
        raise Problem(
            415,
            "unsupported-picture",
            f"picture: the upload of {len(data):,} bytes is not a picture this service reads; "
            f"send {', '.join(FORMATS[:-1])} or {FORMATS[-1]}",
        ) from error
    except Exception as error:
        raise _unreadable(error) from error


def _check_size(picture: Image.Image, limits: PictureLimits) -> None:
    width, height = picture.size
    if max(width, height) > limits.max_side_px or width * height > limits.max_input_px:
        raise Problem(
            413,
            "picture-too-large",
            f"picture: {width}x{height} px; at most {limits.max_input_px:,} pixels with sides of at most "
            f"{limits.max_side_px:,} are allowed: send a smaller picture",
        )


def _unreadable(error: Exception) -> Problem:
    reason = " ".join(str(error).split()) or type(error).__name__
    return Problem(422, "unreadable-picture", f"picture: it is damaged or incomplete ({reason}); send a whole file")

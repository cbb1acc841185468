"""Picture files in and out of the service: `faithdiff.picture_files` with the service's limits and problems.

Limits are checked on the header, before a single pixel is decoded. Files are read from memory alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from faithdiff import picture_files
from faithdiff.errors import InputError
from faithdiff.picture_files import PictureTooLarge, UnreadablePicture, UnsupportedPicture
from serve.problems import Problem
from sr_platform.config import StrictConfig

if TYPE_CHECKING:
    from faithdiff.picture_files import Levels, OutputOptions, PictureFile


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


ACCEPTED = picture_files.PictureLimits(2**40, 2**40, 2**16)
"""Of a picture that was checked when it was accepted; limits may have become smaller since."""


def read_picture(data: bytes, limits: picture_files.Limits) -> PictureFile:
    """The upright picture in `data`, in sRGB; of several frames the first.

    Raises:
        Problem: 415 no picture of a known format; 413 too many bytes or pixels; 422 damaged.
    """
    with _as_problems():
        return picture_files.read_picture(data, limits)


def read_size(data: bytes, limits: picture_files.Limits) -> tuple[int, int]:
    """(width, height) px of the upright picture, from its header alone. Raises Problem as `read_picture`."""
    with _as_problems():
        return picture_files.read_size(data, limits)


def write_picture(restored_rgb: Levels, source: PictureFile, scale: int, options: OutputOptions) -> tuple[bytes, str]:
    """The restored picture as a file, and its media type. Raises Problem 422 when the format cannot hold it."""
    try:
        return picture_files.write_picture(restored_rgb, source, scale, options)
    except InputError as error:
        raise Problem(422, "unfit-format", str(error)) from error


def check_size(size_px: tuple[int, int], limits: PictureLimits) -> None:
    """Raises Problem 413 when a picture of (width, height) px would not be let in."""
    width, height = size_px
    if max(width, height) > limits.max_side_px or width * height > limits.max_input_px:
        raise Problem(
            413,
            "picture-too-large",
            f"picture: {width}x{height} px; at most {limits.max_input_px:,} pixels with sides of at most "
            f"{limits.max_side_px:,} are allowed: send a smaller picture",
        )


def check_output(size_px: tuple[int, int], scale: int, limits: PictureLimits) -> None:
    """Raises Problem 413 when `scale` would make more pixels of (width, height) px than allowed."""
    width, height = size_px
    if height * width * scale**2 > limits.max_output_px:
        largest = int((limits.max_output_px / (height * width)) ** 0.5)
        advice = f"take a scale of at most {largest}" if largest else "send a smaller picture"
        raise Problem(
            413,
            "result-too-large",
            f"picture: {width}x{height} px at scale {scale} makes {height * width * scale**2:,} pixels; "
            f"at most {limits.max_output_px:,} are allowed: {advice}",
        )


@contextmanager
def _as_problems() -> Iterator[None]:
    try:
        yield
    except PictureTooLarge as error:
        raise Problem(413, "picture-too-large", str(error)) from error
    except UnsupportedPicture as error:
        raise Problem(415, "unsupported-picture", str(error)) from error
    except UnreadablePicture as error:
        raise Problem(422, "unreadable-picture", str(error)) from error

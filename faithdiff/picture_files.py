"""Picture files in and out: JPEG, PNG, WebP and TIFF -> levels in sRGB, and restored levels -> the file asked for.

    source = read_picture(data, PictureLimits())           # upright sRGB, 8 or 16 bits; alpha apart
    restored = pipeline(source.rgb, 4).array
    data, media_type = write_picture(restored, source, 4, OutputOptions(format="tiff"))

The network sees sRGB. A result goes back into the RGB or grey profile of its source, which is embedded again; that of a
CMYK source stays in sRGB. Alpha is enlarged on its own. Resolution and EXIF are kept, XMP is not: it repeats what EXIF
says, describes how the old pixels were edited, and may hold pictures. Imports no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from faithdiff import picture_metadata
from faithdiff.errors import InputError
from faithdiff.picture_checks import OtherKind, Suspicious, check_structure
from faithdiff.picture_pixels import Pixels, filled_below, read_pixels
from faithdiff.picture_profiles import Profile, UnusableProfile, read_profile

Levels = npt.NDArray[Any]
OutputFormat = Literal["png", "jpeg", "webp", "tiff"]

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
MEDIA_TYPES: dict[OutputFormat, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "tiff": "image/tiff",
}


class PictureTooLarge(InputError):  # noqa: N818 - a fact about the picture
    """More bytes or pixels than the limits allow."""


class UnreadablePicture(InputError):  # noqa: N818
    """A picture file that is damaged, cut off or built to do harm."""


class UnsupportedPicture(InputError):  # noqa: N818
    """Not a file of `FORMATS`, or a kind of one that is not read."""


class Limits(Protocol):
    """How large a picture may be that comes in."""

    @property
    def max_upload_bytes(self) -> int: ...

    @property
    def max_input_px(self) -> int: ...

    @property
    def max_side_px(self) -> int: ...


@dataclass(frozen=True)
class PictureLimits:
    """`Limits` for those who have no configuration of their own."""

    max_upload_bytes: int = 256 * 1024**2
    max_input_px: int = 100_000_000
    max_side_px: int = 65_535


@dataclass(frozen=True)
class PictureFile:
    """What a picture file holds, upright. `rgb` and `alpha` are of one dtype, uint8 or uint16."""

    rgb: Levels
    """[H, W, 3] in sRGB. Below transparent pixels it goes on as around them."""
    alpha: Levels | None
    """[H, W], 0 is transparent."""
    is_grey: bool
    icc_profile: bytes | None
    """RGB or grey profile that the result goes back into; None: the result stays in sRGB."""
    dpi: tuple[float, float] | None
    exif: bytes | None
    """TIFF block of the tags that describe the picture, with orientation 1, without thumbnail and sizes."""
    format: str
    """One of `FORMATS`."""
    notes: tuple[str, ...] = ()
    """What of the file could not be used, in words for its owner."""


@dataclass(frozen=True)
class OutputOptions:
    """How a restored picture is written. `keep_metadata` False drops EXIF, and with it place and time of the shot."""

    format: OutputFormat = "png"
    quality: int = 90
    """1 to 100, of JPEG and WebP."""
    keep_metadata: bool = True

    def __post_init__(self) -> None:
        if self.format not in MEDIA_TYPES:
            raise InputError(f"output: format is {self.format!r}; it must be one of {', '.join(MEDIA_TYPES)}")
        if isinstance(self.quality, bool) or not isinstance(self.quality, int) or not 1 <= self.quality <= 100:
            raise InputError(f"output: quality is {self.quality!r}; it must be a whole number from 1 to 100")


def read_size(data: bytes, limits: Limits) -> tuple[int, int]:
    """Width and height of the upright picture in px, from the file's header alone. Raises as `read_picture`."""
    with _open(data, limits) as image:
        return picture_metadata.upright_size(image, data)


def read_picture(data: bytes, limits: Limits) -> PictureFile:
    """The first picture in a JPEG, PNG, WebP or TIFF file, by its content whatever its name.

    Raises:
        PictureTooLarge: too many bytes or pixels; known before a pixel is decoded.
        UnsupportedPicture: another kind of file, or levels that are neither 8 nor 16 bits deep.
        UnreadablePicture: damaged, or built so that reading would cost far more than its picture is worth.
    """
    with _open(data, limits) as image:
        pixels = read_pixels(image, data)
        metadata = picture_metadata.read_metadata(image, data)
        profile, note = _profile_of(image, pixels)
        rgb, depth_note = _in_srgb(pixels, profile)
        alpha = pixels.alpha if pixels.alpha is None or pixels.alpha.dtype == rgb.dtype else _eight_bits(pixels.alpha)
        notes = (*metadata.notes, *(text for text in (note, depth_note) if text))
        return PictureFile(
            rgb=rgb if alpha is None else filled_below(rgb, alpha),
            alpha=alpha,
            is_grey=pixels.is_grey,
            icc_profile=profile.data if profile is not None and profile.has_way_back else None,
            dpi=metadata.dpi,
            exif=metadata.exif,
            format=_format_of(image),
            notes=notes,
        )


def write_picture(restored_rgb: Levels, source: PictureFile, scale: int, options: OutputOptions) -> tuple[bytes, str]:
    """The file of a restored picture, and its media type. The same arguments give the same bytes.

    `restored_rgb` is uint8 or uint16 [scale H, scale W, 3] in sRGB. 16 bits stay 16 bits in PNG and TIFF and are
    rounded to 8 in JPEG and WebP. Alpha is laid on white in JPEG. Grey stays grey, but for WebP, which knows none.

    Raises:
        InputError: the size does not fit the source, or is more than the format can hold.
    """
    from faithdiff.picture_encoding import encode

    return encode(restored_rgb, source, scale, options), MEDIA_TYPES[options.format]


@contextmanager
def _open(data: bytes, limits: Limits) -> Iterator[Image.Image]:
    """The picture with its header read and its limits checked; what goes wrong inside becomes one of our errors."""
    if len(data) > limits.max_upload_bytes:
        raise PictureTooLarge(
            f"picture: {len(data):,} bytes; at most {limits.max_upload_bytes:,} are allowed: send a smaller file"
        )
    try:
        check_structure(data)
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_size(image, limits)
            yield image
    except (InputError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureTooLarge(f"picture: {error}; send a smaller picture") from error
    except OtherKind as error:
        raise UnsupportedPicture(f"picture: it is {error}") from error
    except Suspicious as error:
        raise UnreadablePicture(f"picture: it has {error}; save it again with an image editor") from error
    except UnidentifiedImageError as error:
        raise UnsupportedPicture(
            f"picture: its {len(data):,} bytes are no picture that is read here; "
            f"send {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        ) from error
    except Exception as error:
        # Decoders raise anything at all on damaged or hostile files.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnreadablePicture(f"picture: it is damaged or incomplete ({reason}); send a whole file") from error


def _check_size(image: Image.Image, limits: Limits) -> None:
    width, height = image.size
    if min(width, height) < 1:
        raise UnreadablePicture(f"picture: it is damaged ({width}x{height} px); send a whole file")
    if max(width, height) > limits.max_side_px or width * height > limits.max_input_px:
        raise PictureTooLarge(
            f"picture: {width}x{height} px; at most {limits.max_input_px:,} pixels with sides of at most "
            f"{limits.max_side_px:,} are allowed: send a smaller picture"
        )


def _format_of(image: Image.Image) -> str:
    # Phones put two pictures into one JPEG, which Pillow calls MPO.
    return "JPEG" if image.format == "MPO" else str(image.format)


def _profile_of(image: Image.Image, pixels: Pixels) -> tuple[Profile | None, str | None]:
    data = image.info.get("icc_profile")
    if not isinstance(data, bytes) or not data:
        return None, None
    try:
        return read_profile(data, pixels.space), None
    except (UnusableProfile, struct.error) as error:
        return None, f"its colour profile was ignored: {error}"


def _in_srgb(pixels: Pixels, profile: Profile | None) -> tuple[Levels, str | None]:
    """uint8 or uint16 [H, W, 3] in sRGB, and a note where depth was lost."""
    levels, note = pixels.colours, None
    if pixels.space == "CMYK":
        if profile is not None:
            return profile.to_srgb(levels), None
        cmyk = Image.frombytes("CMYK", levels.shape[1::-1], levels.tobytes())
        return np.asarray(cmyk.convert("RGB")), None
    if profile is not None:
        if levels.dtype == np.uint16 and not profile.is_srgb and profile.curves is None:
            levels, note = _eight_bits(levels), "its 16 bits were rounded to 8: its colour profile is made of tables"
        levels = profile.to_srgb(levels)
    return (levels if levels.ndim == 3 else np.repeat(levels[..., None], 3, axis=2)), note


def _eight_bits(levels: Levels) -> npt.NDArray[np.uint8]:
    from faithdiff.image_modes import to_eight_bits

    return to_eight_bits(levels)

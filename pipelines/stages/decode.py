"""A picture file -> uint8 RGB [H, W, 3] in sRGB, upright, without alpha.

Common pictures are decoded by the library that is fastest at it, after Pillow has read the header; the pixels are the
same. Everything unusual is Pillow's.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from faithdiff.image_modes import to_rgb

SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)

# By content, whatever the suffix. Not all that Pillow knows: it would have other programs read EPS, for example.
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# Chunks that change nothing about 8 or 16 bit RGB pixels as Pillow reads them.
_PLAIN_PNG_CHUNKS = frozenset(
    {b"IHDR", b"IDAT", b"IEND", b"sRGB", b"gAMA", b"cHRM", b"pHYs", b"sBIT", b"tIME", b"bKGD"}
)
_PNG_RGB = 2

_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_SRGB_NAMES = ("srgb", "c2")  # "c2" is the compact sRGB profile of large photo services


class UnreadablePictureError(ValueError):
    """The bytes are no picture, a damaged one, or too large a one."""


def decode_picture(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """The first frame, upright by its EXIF orientation, in sRGB by its profile, as 8 bits, alpha laid on white.

    Raises:
        UnreadablePictureError: the picture cannot be read whole, or has more than `max_pixels`.
    """
    with warnings.catch_warnings():
        # Our own limit replaces Pillow's warning about large pictures.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise UnreadablePictureError(f"{image.width}x{image.height} px are more than {max_pixels} pixels")
                return _pixels(image, data)
        except (UnreadablePictureError, MemoryError):
            raise
        except UnidentifiedImageError as error:
            # Pillow's own message holds an address in memory, which differs from run to run.
            raise UnreadablePictureError("not a picture of a known format") from error
        except Exception as error:
            # Decoders raise anything at all on damaged or hostile files.
            raise UnreadablePictureError(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _pixels(image: Image.Image, data: bytes) -> NDArray[np.uint8]:
    pixels = None
    if image.format == "PNG" and _is_plain_png(data):
        pixels = _png_pixels(data)
    elif image.format == "JPEG" and image.mode in ("RGB", "L") and _is_plain_jpeg(image):
        # Strict: where Pillow fills in what is damaged, this is an error.
        pixels = simplejpeg.decode_jpeg(data, "RGB")
    if pixels is not None and pixels.shape[:2] == (image.height, image.width):
        return pixels
    ImageOps.exif_transpose(image, in_place=True)
    return np.ascontiguousarray(to_rgb(_in_srgb(image)))


def _is_plain_png(data: bytes) -> bool:
    """Whether it is whole RGB, with nothing that would change it: transparency, palette, profile, orientation, frames.

    Damage is left to Pillow, which gives an account of it; OpenCV only writes a line to stderr.
    """
    view, position, kind = memoryview(data), 8, b""
    while position + 12 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if kind not in _PLAIN_PNG_CHUNKS or data[end : end + 4] != zlib.crc32(view[position + 4 : end]).to_bytes(
            4, "big"
        ):
            return False
        position = end + 4
    return kind == b"IEND" and data[25] == _PNG_RGB


def _png_pixels(data: bytes) -> NDArray[np.uint8] | None:
    """None when it is damaged, of which Pillow gives a better account."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 3 or pixels.shape[2] != 3:
        return None
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.getexif().get(ExifTags.Base.Orientation, 1) == 1 and _foreign_profile(image) is None


def _in_srgb(image: Image.Image) -> Image.Image:
    """The picture converted from its embedded profile, if it has one that is readable and not sRGB."""
    profile = _foreign_profile(image)
    if profile is None:
        return image
    if image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        converted = ImageCms.profileToProfile(
            image,
            profile,
            _SRGB,
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode=mode,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, ValueError):
        return image  # the profile is for another kind of pixels
    assert converted is not None
    return converted


def _foreign_profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    data = image.info.get("icc_profile")
    if not data:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        name = ImageCms.getProfileDescription(profile).strip().lower()
    except (ImageCms.PyCMSError, OSError, TypeError):
        return None  # unreadable: the numbers are taken as they are, as every viewer does
    return None if name.startswith(_SRGB_NAMES) else profile

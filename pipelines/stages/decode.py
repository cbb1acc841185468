"""A picture file -> uint8 RGB [H, W, 3], upright, without alpha."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from faithdiff.image_modes import to_rgb

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# What Pillow raises on damaged files, by format.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


class UnreadablePictureError(ValueError):
    """The bytes are no picture, a damaged one, or too large a one."""


def decode_picture(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """The first frame, turned upright by its EXIF orientation, 16 bit shortened to 8, alpha laid on white.

    Raises:
        UnreadablePictureError: the picture cannot be read whole, or has more than `max_pixels`.
    """
    with warnings.catch_warnings():
        # Our own limit replaces Pillow's warning about large pictures.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > max_pixels:
                    raise UnreadablePictureError(f"{image.width}x{image.height} px are more than {max_pixels} pixels")
                return np.ascontiguousarray(to_rgb(ImageOps.exif_transpose(image)))
        except UnreadablePictureError:
            raise
        except UnidentifiedImageError as error:
            # Pillow's own message holds an address in memory, which differs from run to run.
            raise UnreadablePictureError("not a picture of a known format") from error
        except (*_DAMAGED, Image.DecompressionBombError) as error:
            raise UnreadablePictureError(" ".join(str(error).split())[:200] or type(error).__name__) from error

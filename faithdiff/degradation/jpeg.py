"""JPEG through libjpeg-turbo, with the choices of the simulated one where the format leaves a choice."""

from __future__ import annotations

import simplejpeg

from faithdiff.degradation.levels import Picture, to_uint8, to_unit


def real_jpeg(image: Picture, quality: float) -> Picture:
    """Clipped, rounded to 8 bit, written as JPEG (4:2:0) and read back; quality rounded to an integer.

    Halved chroma is repeated, not interpolated, as the simulated JPEG does.
    """
    data = simplejpeg.encode_jpeg(
        to_uint8(image), quality=round(quality), colorspace="RGB", colorsubsampling="420", fastdct=False
    )
    return to_unit(simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=True))

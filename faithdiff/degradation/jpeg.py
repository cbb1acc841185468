"""JPEG through libjpeg-turbo, with the choices of the simulated one where the format leaves a choice."""

from __future__ import annotations

import cv2
import simplejpeg

from faithdiff.degradation.levels import Picture, to_uint8, to_unit

_CELL_PX = 16
"""A unit of 4:2:0: two by two blocks of luma, one of each chroma."""


def real_jpeg(image: Picture, quality: float) -> Picture:
    """Clipped, rounded to 8 bit, written as JPEG (4:2:0) and read back; quality rounded to an integer.

    As in the simulated JPEG, halved chroma is repeated and not interpolated, and sides are filled up to 16 px with
    black: the encoder would repeat the edge instead, and spare the last pixels of a side the ringing.
    """
    height, width = image.shape[:2]
    levels = cv2.copyMakeBorder(
        to_uint8(image), 0, -height % _CELL_PX, 0, -width % _CELL_PX, cv2.BORDER_CONSTANT, value=(0, 0, 0)
    )
    settings = [cv2.IMWRITE_JPEG_QUALITY, round(quality)]
    settings += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    # OpenCV writes, because simplejpeg always takes the inexact cosine transform; simplejpeg reads, because OpenCV
    # always interpolates chroma.
    done, data = cv2.imencode(".jpg", cv2.cvtColor(levels, cv2.COLOR_RGB2BGR), settings)
    assert done, "libjpeg refused an 8-bit RGB picture"
    decoded = simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=True)
    return to_unit(decoded[:height, :width])

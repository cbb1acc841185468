import numpy as np
import pytest
from PIL import Image

from faithdiff.errors import InputError
from faithdiff.image_modes import to_rgb


def test_sixteen_bits_are_rounded_to_eight_and_not_clipped():
    levels = np.array([[0, 128, 129, 257, 32_768, 65_535]], dtype=np.uint16)
    assert to_rgb(Image.fromarray(levels))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize(("mode", "clear"), [("RGBA", (200, 0, 0, 0)), ("LA", (90, 0))])
def test_transparent_pixels_lie_on_white(mode, clear):
    assert to_rgb(Image.new(mode, (2, 1), clear)).tolist() == [[[255, 255, 255]] * 2]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_common_mode_becomes_uint8_rgb(mode):
    image = Image.new("RGB", (3, 2), (250, 5, 5))
    rgb = to_rgb(image.convert(mode) if mode != "LAB" else Image.new("LAB", (3, 2)))
    assert (rgb.shape, rgb.dtype) == ((2, 3, 3), np.uint8)


def test_floating_point_pixels_are_refused():
    with pytest.raises(InputError, match="floating-point"):
        to_rgb(Image.new("F", (1, 1)))

"""Every kind of picture file becomes upright 8-bit RGB, or is named unreadable."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.stages.decode import UnreadablePictureError, decode_picture

LIMIT = 10_000


def as_file(image: Image.Image, kind: str = "PNG", **kwargs: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def red(mode: str = "RGB", size: tuple[int, int] = (20, 10)) -> Image.Image:
    return Image.new("RGB", size, (255, 0, 0)).convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "JPEG", "GIF"])
def test_common_formats_decode_to_rgb(kind: str) -> None:
    pixels = decode_picture(as_file(red(), kind), max_pixels=LIMIT)
    assert pixels.shape == (10, 20, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("LA", "PNG")])
def test_other_pixel_modes_become_rgb(mode: str, kind: str) -> None:
    assert decode_picture(as_file(red(mode), kind), max_pixels=LIMIT).shape == (10, 20, 3)


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert decode_picture(as_file(clear), max_pixels=LIMIT).min() == 255


def test_sixteen_bit_gray_keeps_its_range() -> None:
    ramp = np.array([[0, 257 * 100, 65535]], np.uint16)
    pixels = decode_picture(as_file(Image.fromarray(ramp)), max_pixels=LIMIT)
    assert pixels[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = decode_picture(as_file(red(), "JPEG", exif=exif), max_pixels=LIMIT)
    assert pixels.shape == (20, 10, 3)


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = as_file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_picture(data, max_pixels=LIMIT)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_truncated_files_are_unreadable(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = as_file(noise, kind)
    with pytest.raises(UnreadablePictureError):
        decode_picture(data[: len(data) // 2], max_pixels=LIMIT)


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_bytes_that_are_no_picture_are_unreadable(data: bytes) -> None:
    with pytest.raises(UnreadablePictureError):
        decode_picture(data, max_pixels=LIMIT)


def test_too_many_pixels_are_refused_before_decoding() -> None:
    with pytest.raises(UnreadablePictureError, match="200x100 px are more than 10000 pixels"):
        decode_picture(as_file(red(size=(200, 100))), max_pixels=LIMIT)


def test_floating_point_pixels_are_refused() -> None:
    floating = Image.fromarray(np.ones((4, 4), np.float32))
    with pytest.raises(UnreadablePictureError, match="floating-point"):
        decode_picture(as_file(floating, "TIFF"), max_pixels=LIMIT)

"""Every kind of picture file becomes upright 8-bit sRGB, or is named unreadable."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from pipelines.stages.decode import UnreadablePictureError, decode_picture

LIMIT = 10_000


def as_file(image: Image.Image, kind: str = "PNG", **kwargs: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def red(mode: str = "RGB", size: tuple[int, int] = (20, 10)) -> Image.Image:
    return Image.new("RGB", size, (255, 0, 0)).convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "JPEG", "GIF", "JPEG2000", "PPM"])
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


def noise(height_px: int = 60, width_px: int = 50, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height_px // 4 + 1, width_px // 4 + 1, channels), dtype=np.uint8)
    return cv2.resize(coarse, (width_px, height_px), interpolation=cv2.INTER_CUBIC).reshape(height_px, width_px, -1)


PNG_INFO = PngImagePlugin.PngInfo()
for kind, value in ((b"gAMA", 45455), (b"pHYs", 0)):
    PNG_INFO.add(kind, struct.pack(">I", value) + (struct.pack(">IB", 0, 0) if kind == b"pHYs" else b""))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 60, "subsampling": 1}),
        ("JPEG", {"quality": 60, "subsampling": 2}),
        ("JPEG", {"quality": 90, "progressive": True}),
        ("JPEG", {"quality": 90, "keep_rgb": True}),
        ("PNG", {}),
        ("PNG", {"pnginfo": PNG_INFO}),
        ("PNG", {"compress_level": 0}),
    ],
)
@pytest.mark.parametrize("size", [(60, 50), (61, 49), (1, 1)])
def test_fast_decoders_give_the_pixels_that_pillow_gives(
    kind: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    data = as_file(Image.fromarray(noise(*size)), kind, **options)
    assert np.array_equal(decode_picture(data, max_pixels=LIMIT), np.asarray(Image.open(io.BytesIO(data))))


def test_a_gray_jpeg_has_its_gray_in_every_channel() -> None:
    data = as_file(Image.fromarray(noise(channels=1)[..., 0]), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode_picture(data, max_pixels=LIMIT), np.stack([expected] * 3, axis=-1))


def png_of(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def test_sixteen_bit_colour_is_rounded() -> None:
    levels = np.array([[[0, 128, 129], [65535, 257 * 100 + 128, 257 * 100 + 129]]], np.uint16)
    assert decode_picture(png_of(levels[..., ::-1]), max_pixels=LIMIT).tolist() == [[[0, 0, 1], [255, 100, 101]]]


def test_an_orientation_after_the_pixels_of_a_png_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = as_file(red())
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    end = len(data) - 12
    late = data[:end] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[end:]
    assert decode_picture(late, max_pixels=LIMIT).shape == (20, 10, 3)


def test_a_transparent_colour_lies_on_white() -> None:
    data = as_file(red(), transparency=(255, 0, 0))
    assert decode_picture(data, max_pixels=LIMIT).min() == 255


def wide_gamut_profile() -> bytes:
    """Lab, the one profile besides sRGB that the library can make, with PCS pixels of its own."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def swapped_profile() -> bytes:
    """sRGB with the tables of red and blue exchanged, under another name: numbers (r, g, b) mean colours (b, g, r)."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    data = bytearray(bytes(data).replace(b"s\0R\0G\0B", b"t\0R\0G\0B"))
    for index in range(struct.unpack_from(">I", data, 128)[0]):
        place = 132 + 12 * index
        kind = bytes(data[place : place + 4])
        data[place : place + 4] = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}.get(kind, kind)
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_colours_are_converted_from_the_profile_of_the_picture(kind: str) -> None:
    options: dict[str, Any] = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    pixels = decode_picture(as_file(red(), kind, icc_profile=swapped_profile(), **options), max_pixels=LIMIT)
    assert np.abs(pixels.astype(int) - (0, 0, 255)).max() <= 8


def test_an_srgb_profile_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = noise()
    data = as_file(Image.fromarray(pixels), icc_profile=profile)
    assert np.array_equal(decode_picture(data, max_pixels=LIMIT), pixels)


@pytest.mark.parametrize("profile", [b"garbage", wide_gamut_profile()], ids=["garbage", "of Lab"])
def test_a_profile_that_cannot_be_applied_is_ignored(profile: bytes) -> None:
    pixels = noise()
    data = as_file(Image.fromarray(pixels), icc_profile=profile)
    assert np.array_equal(decode_picture(data, max_pixels=LIMIT), pixels)


def test_transparency_survives_the_conversion_of_colours() -> None:
    half = Image.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 0]]], np.uint8))
    pixels = decode_picture(as_file(half, icc_profile=swapped_profile()), max_pixels=LIMIT)
    assert np.abs(pixels[0].astype(int) - [[0, 0, 255], [255, 255, 255]]).max() <= 3


def test_an_inverted_cmyk_jpeg_has_its_colours() -> None:
    # Pillow writes CMYK as Adobe does: inverted, with Adobe's marker.
    data = as_file(red("CMYK"), "JPEG", quality=100)
    assert b"Adobe" in data
    assert np.abs(decode_picture(data, max_pixels=LIMIT).astype(int) - (255, 0, 0)).max() <= 4


def test_a_jpeg_with_damaged_pixels_is_unreadable() -> None:
    data = bytearray(as_file(Image.fromarray(noise(200, 200)), "JPEG", quality=95))
    data[len(data) // 2 : len(data) // 2 + 40] = b"\xff\xd9" + bytes(38)
    with pytest.raises(UnreadablePictureError):
        decode_picture(bytes(data), max_pixels=10**6)


def test_formats_that_other_programs_would_read_are_unreadable() -> None:
    with pytest.raises(UnreadablePictureError, match="not a picture of a known format"):
        decode_picture(as_file(red(), "EPS"), max_pixels=LIMIT)

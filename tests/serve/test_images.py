from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from serve.images import PictureLimits, check_output, decode_picture, encode_png
from serve.problems import Problem

LIMITS = PictureLimits()
ToFile = Callable[..., bytes]


def _png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_lossless_files_come_back_exactly(picture: np.ndarray, to_file: ToFile, file_format: str) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    assert np.array_equal(decode_picture(to_file(picture, file_format, **options), LIMITS), picture)


def test_a_jpeg_comes_back_nearly(to_file: ToFile) -> None:
    smooth = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    decoded = decode_picture(to_file(smooth, "JPEG", quality=95), LIMITS)
    assert np.abs(decoded.astype(int) - smooth).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(picture: np.ndarray, to_file: ToFile, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_picture(to_file(picture, "PNG", exif=exif.tobytes()), LIMITS)
    upright = {
        1: picture, 2: picture[:, ::-1], 3: picture[::-1, ::-1], 4: picture[::-1],
        5: picture.swapaxes(0, 1), 6: np.rot90(picture, -1), 7: np.rot90(picture, 2).swapaxes(0, 1),
        8: np.rot90(picture),
    }[orientation]  # fmt: skip
    assert np.array_equal(decoded, upright)


def test_transparent_pixels_are_laid_on_white(to_file: ToFile) -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (0, 0, 0, 128)
    decoded = decode_picture(to_file(rgba, "PNG"), LIMITS)
    assert decoded[0, 0].tolist() == [10, 20, 30]
    assert decoded[0, 1].tolist() == [127, 127, 127]
    assert decoded[1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("mode", "file_format"), [
    ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("L", "JPEG"), ("CMYK", "TIFF"),
    ("YCbCr", "TIFF"), ("LAB", "TIFF"),
])  # fmt: skip
def test_every_mode_becomes_rgb(picture: np.ndarray, to_file: ToFile, mode: str, file_format: str) -> None:
    image = Image.fromarray(picture).convert("RGB")
    image = image.quantize(16) if mode == "P" else Image.new(mode, image.size) if mode == "LAB" else image.convert(mode)
    decoded = decode_picture(to_file(image, file_format), LIMITS)
    assert (decoded.shape, decoded.dtype) == (picture.shape, np.uint8)


def test_a_palette_with_transparency_is_laid_on_white(to_file: ToFile) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 9, 8, 7])
    image.putdata([0, 1])
    decoded = decode_picture(to_file(image, "PNG", transparency=0), LIMITS)
    assert decoded.tolist() == [[[255, 255, 255], [9, 8, 7]]]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_are_reduced_to_eight_by_rounding(to_file: ToFile, file_format: str) -> None:
    levels = np.array([[0, 128, 129, 257 * 77, 65_535]], np.uint16)
    decoded = decode_picture(to_file(levels, file_format), LIMITS)
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 77, 255]
    assert (decoded == decoded[..., :1]).all()


def test_floating_point_pictures_are_refused(to_file: ToFile) -> None:
    with pytest.raises(Problem, match="8 or 16 bits") as refused:
        decode_picture(to_file(np.zeros((4, 4), np.float32), "TIFF"), LIMITS)
    assert refused.value.status == 415


def test_the_two_picture_jpeg_of_phones_gives_its_first(picture: np.ndarray, to_file: ToFile) -> None:
    other = Image.new("RGB", (32, 24))
    decoded = decode_picture(to_file(picture, "MPO", save_all=True, append_images=[other]), LIMITS)
    assert decoded.shape == picture.shape
    assert decoded.std() > 30


def test_of_an_animation_the_first_frame_is_taken(picture: np.ndarray, to_file: ToFile) -> None:
    other = Image.fromarray(255 - picture)
    animation = to_file(picture, "PNG", save_all=True, append_images=[other])
    assert np.array_equal(decode_picture(animation, LIMITS), picture)


@pytest.mark.parametrize("data", [b"", b"hello", b"\0" * 100, b"%PDF-1.7", b"GIF89a" + b"\0" * 50, b"<svg/>"])
def test_what_is_no_picture_of_a_known_format_is_refused_as_such(data: bytes) -> None:
    with pytest.raises(Problem, match="send JPEG, PNG, WEBP or TIFF") as refused:
        decode_picture(data, LIMITS)
    assert refused.value.status == 415


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused_and_never_half_shown(
    picture: np.ndarray, to_file: ToFile, file_format: str, share: float
) -> None:
    whole = to_file(np.kron(picture, np.ones((4, 4, 1), np.uint8)), file_format)
    with pytest.raises(Problem, match="picture: ") as refused:
        decode_picture(whole[: int(len(whole) * share)], LIMITS)
    assert refused.value.status in {415, 422}


def test_no_corruption_of_bytes_raises_anything_but_a_problem(picture: np.ndarray, to_file: ToFile) -> None:
    rng = np.random.default_rng(1)
    outcomes = {"decoded": 0, "refused": 0}
    for file_format in ("PNG", "JPEG", "TIFF", "WEBP"):
        whole = np.frombuffer(to_file(picture, file_format), np.uint8)
        for _ in range(100):
            broken = whole.copy()
            broken[rng.integers(0, len(broken), 8)] = rng.integers(0, 256, 8)
            try:
                decode_picture(broken.tobytes(), LIMITS)
                outcomes["decoded"] += 1
            except Problem:
                outcomes["refused"] += 1
    assert sum(outcomes.values()) == 400
    assert outcomes["refused"] > 100


@pytest.mark.parametrize(("width", "height"), [(6000, 6000), (40_000, 10), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    with pytest.raises(Problem) as refused:
        decode_picture(_png_header(width, height), LIMITS)
    assert refused.value.status == 413


def test_the_limit_of_pixels_is_exact(picture: np.ndarray, to_file: ToFile) -> None:
    data = to_file(picture, "PNG")
    assert decode_picture(data, PictureLimits(max_input_px=24 * 32)).shape == (24, 32, 3)
    with pytest.raises(Problem, match="32x24 px; at most 767 pixels"):
        decode_picture(data, PictureLimits(max_input_px=24 * 32 - 1))


def test_a_result_that_would_be_too_large_names_the_largest_scale(picture: np.ndarray) -> None:
    limits = PictureLimits(max_output_px=24 * 32 * 9)
    check_output(picture, 3, limits)
    with pytest.raises(Problem, match="take a scale of at most 3") as refused:
        check_output(picture, 4, limits)
    assert refused.value.status == 413


def test_a_png_holds_the_picture_exactly_and_the_same_bytes_each_time(picture: np.ndarray) -> None:
    png = encode_png(picture)
    assert np.array_equal(np.asarray(Image.open(BytesIO(png))), picture)
    assert encode_png(picture.copy()) == png

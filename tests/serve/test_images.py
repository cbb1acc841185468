from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from faithdiff.picture_files import OutputOptions
from serve.images import PictureLimits, check_output, check_size, read_picture, read_size, write_picture
from serve.problems import Problem

LIMITS = PictureLimits()
ToFile = Callable[..., bytes]


def _png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def _problem(data: bytes, limits: PictureLimits = LIMITS) -> Problem:
    with pytest.raises(Problem) as raised:
        read_picture(data, limits)
    return raised.value


def test_a_picture_comes_in_upright_and_goes_out_in_the_format_asked_for(picture: np.ndarray, to_file: ToFile) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone that was held upright
    data = to_file(picture, "PNG", exif=exif.tobytes())
    source = read_picture(data, LIMITS)
    assert np.array_equal(source.rgb, np.rot90(picture, -1))
    assert read_size(data, LIMITS) == (24, 32)
    restored = source.rgb.repeat(2, axis=0).repeat(2, axis=1)
    written, media_type = write_picture(restored, source, 2, OutputOptions(format="tiff"))
    assert media_type == "image/tiff"
    assert np.array_equal(np.asarray(Image.open(BytesIO(written))), restored)


@pytest.mark.parametrize("limits", [PictureLimits(max_input_px=767), PictureLimits(max_side_px=31)])
def test_a_picture_beyond_the_limits_is_refused(picture: np.ndarray, to_file: ToFile, limits: PictureLimits) -> None:
    problem = _problem(to_file(picture, "PNG"), limits)
    assert (problem.status, problem.kind) == (413, "picture-too-large")
    assert "32x24 px" in problem.detail
    with pytest.raises(Problem, match="32x24 px"):
        check_size((32, 24), limits)
    check_size((32, 24), LIMITS)


def test_a_bomb_is_refused_by_its_header() -> None:
    assert _problem(_png_header(60_000, 60_000)).status == 413


def test_what_is_no_picture_is_named_so() -> None:
    assert (_problem(b"%PDF-1.7 and so on").status, _problem(b"").status) == (415, 415)
    assert _problem(b"%PDF-1.7 and so on").kind == "unsupported-picture"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_named_damaged(to_file: ToFile, share: float) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = to_file(noise, "PNG")
    problem = _problem(data[: int(len(data) * share)])
    assert (problem.status, problem.kind) == (422, "unreadable-picture")


def test_a_result_beyond_the_limits_is_refused_with_a_scale_that_fits() -> None:
    limits = PictureLimits(max_output_px=10_000)
    check_output((32, 24), 3, limits)
    with pytest.raises(Problem, match="take a scale of at most 3"):
        check_output((32, 24), 4, limits)
    with pytest.raises(Problem, match="send a smaller picture"):
        check_output((320, 240), 1, limits)


def test_a_format_that_cannot_hold_the_result_is_a_problem_of_the_request(picture: np.ndarray, to_file: ToFile) -> None:
    source = read_picture(to_file(np.zeros((1, 1100, 3), np.uint8), "PNG"), LIMITS)
    with pytest.raises(Problem) as raised:
        write_picture(np.zeros((15, 16_500, 3), np.uint8), source, 15, OutputOptions(format="webp"))
    assert (raised.value.status, raised.value.kind) == (422, "unfit-format")

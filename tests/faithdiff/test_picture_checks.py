import struct
import zlib

import numpy as np
import pytest

from faithdiff.picture_checks import (
    MAX_JPEG_SCANS,
    MAX_JPEG_SEGMENTS,
    MAX_TIFF_PARTS,
    OtherKind,
    Suspicious,
    check_structure,
    find_png_chunk,
    tiff_tags,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
SCAN = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
COMMENT = b"\xff\xfe\x00\x03x"


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_ordinary_files_pass(file_format, to_file):
    check_structure(to_file(PIXELS, file_format))


@pytest.mark.parametrize("settings", [{"progressive": True}, {"restart_marker_rows": 1}, {"comment": b"x" * 60_000}])
def test_every_ordinary_jpeg_passes(settings, to_file):
    check_structure(to_file(PIXELS, "JPEG", **settings))


@pytest.mark.parametrize(
    "data", [b"", b"I", b"II", b"MM", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MMXXVI: prose"]
)
def test_what_is_short_or_unknown_is_left_to_the_decoders(data):
    check_structure(data)


def test_a_jpeg_of_many_scans_is_suspicious(to_file):
    data = to_file(PIXELS, "JPEG")
    body, end = data[:-2], data[-2:]
    check_structure(body + SCAN * (MAX_JPEG_SCANS - 1) + end)
    with pytest.raises(Suspicious, match="scans"):
        check_structure(body + SCAN * MAX_JPEG_SCANS + end)


def test_a_jpeg_of_many_parts_is_suspicious():
    with pytest.raises(Suspicious, match="parts"):
        check_structure(b"\xff\xd8" + COMMENT * (MAX_JPEG_SEGMENTS + 1))
    with pytest.raises(Suspicious, match="next part"):
        check_structure(b"\xff\xd8" + bytes(MAX_JPEG_SEGMENTS + 1) + COMMENT)


def test_what_follows_the_end_of_a_jpeg_does_not_count(to_file):
    check_structure(to_file(PIXELS, "JPEG") + SCAN * 1_000)


def test_a_png_of_many_chunks_is_suspicious(png_file):
    empty = struct.pack(">I4sI", 0, b"prVt", zlib.crc32(b"prVt"))
    data = png_file(PIXELS)
    with pytest.raises(Suspicious, match="chunks"):
        check_structure(data[:33] + empty * 5_000 + data[33:])
    check_structure(data[:33] + empty * 1_000 + data[33:])
    check_structure(data + empty * 5_000)


def test_a_png_in_many_honest_parts_passes(png_file):
    check_structure(png_file(PIXELS)[:33] + (struct.pack(">I4s", 4_096, b"IDAT") + bytes(4_100)) * 5_000)


def test_a_chunk_of_a_png_is_found_wherever_it_stands(png_file):
    data = png_file(PIXELS, {b"aaAa": b"before"}, {b"bbBb": b"after"})
    assert (find_png_chunk(data, b"aaAa"), find_png_chunk(data, b"bbBb")) == (b"before", b"after")
    assert find_png_chunk(data, b"ccCc") is None
    assert find_png_chunk(b"", b"aaAa") is None
    assert find_png_chunk(data[:40], b"bbBb") is None


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_tags_of_a_tiff_are_read_in_either_byte_order(order, tiff_file):
    tags = tiff_tags(tiff_file(PIXELS, 2, order))
    assert {tag: tags[tag] for tag in (256, 257, 258, 262)} == {256: (1, 48), 257: (1, 64), 258: (3, 8), 262: (1, 2)}


def test_a_tiff_cut_anywhere_gives_the_tags_that_are_left(tiff_file):
    data = tiff_file(PIXELS[:2, :2], 2)
    whole = tiff_tags(data)
    for length in range(4, len(data)):
        assert tiff_tags(data[:length]).items() <= whole.items()


@pytest.mark.parametrize("compression", [6, 34_712, 34_887, 34_892, 34_925, 34_927, 50_000, 50_001, 52_546])
def test_a_tiff_of_a_rare_compression_is_another_kind(compression, tiff_file):
    with pytest.raises(OtherKind, match=f"compression {compression}; save it with one of none, CCITT"):
        check_structure(tiff_file(PIXELS, 2, tags={259: (3, (compression,))}))


@pytest.mark.parametrize("kind", [2, 7, 9])
@pytest.mark.parametrize("tag", [256, 257, 258, 259, 273, 284, 322, 323])
def test_a_tag_that_hides_its_number_in_another_type_is_suspicious(tag, kind, tiff_file):
    values = (b"\x01",) if kind == 2 else (1,)
    with pytest.raises(Suspicious, match=f"tag {tag}"):
        check_structure(tiff_file(PIXELS, 2, tags={tag: (kind, values)}))


@pytest.mark.parametrize("tag", [258, 273, 279, 324, 325, 338, 339])
def test_a_tiff_of_many_parts_is_suspicious(tag, tiff_file):
    with pytest.raises(Suspicious, match="more than 200,000"):
        check_structure(tiff_file(PIXELS, 2, tags={tag: (3, (1,) * (MAX_TIFF_PARTS + 1))}))


@pytest.mark.parametrize("tag", [322, 323])
def test_a_tiff_of_tiles_far_larger_than_itself_is_suspicious(tag, tiff_file):
    with pytest.raises(Suspicious, match="tiles of 40,000 px"):
        check_structure(tiff_file(PIXELS, 2, tags={tag: (3, (40_000,))}))
    check_structure(tiff_file(PIXELS, 2, tags={tag: (3, (1_024,))}))


@pytest.mark.parametrize("head", [b"II+\0", b"MM\0+", b"II\0*", b"MM*\0"])
def test_big_and_broken_tiffs_are_another_kind(head):
    with pytest.raises(OtherKind, match="plain TIFF"):
        check_structure(head + bytes(100))

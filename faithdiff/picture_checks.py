"""What is looked at in a picture file before anything decodes it: that its parts cannot cost more than a picture does.

Decoders trust what a file says of itself: a JPEG of thousands of empty scans over 25 megapixels, a PNG of millions of
empty chunks, a TIFF in tiles of two gigabytes are small files that take minutes or all memory.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

MAX_JPEG_SCANS = 128
MAX_JPEG_SEGMENTS = 2_000
MAX_PNG_CHUNKS = 2_000
MAX_TIFF_PARTS = 200_000
MAX_TIFF_TILE_PX = 1_024
# Compressions of scanners, cameras and image editors; the decoders of the others are little used and much attacked.
TIFF_COMPRESSIONS = {1: "none", 2: "CCITT", 3: "fax 3", 4: "fax 4", 5: "LZW", 7: "JPEG", 8: "deflate"}
TIFF_COMPRESSIONS |= {32_773: "PackBits", 32_946: "deflate"}

_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_TIFF_HEADERS = {b"II*\0": "<", b"MM\0*": ">"}
_OTHER_TIFF_HEADERS = (b"II+\0", b"MM\0+", b"II\0*", b"MM*\0", b"II\0+", b"MM+\0")
_COMPRESSION, _TILE_WIDTH, _TILE_LENGTH = 259, 322, 323
# Size, depth, compression, meaning, places, planes and tiles of the pixels: what is checked must be what is decoded.
_LAYOUT = (256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 284, 322, 323, 324, 325, 338, 339)
_WHOLE_NUMBERS = {1: (1, "B"), 3: (2, "H"), 4: (4, "I")}
_BYTES = (1, 2, 6, 7)


class Suspicious(ValueError):  # noqa: N818 - says what the file does
    """A file built in a way that no program writes pictures, or that would cost far more than its picture."""


class OtherKind(ValueError):  # noqa: N818 - says what the file is
    """A picture file of a kind that is not read."""


def check_structure(data: bytes) -> None:
    """Raises Suspicious or OtherKind; says nothing of files that it does not know, nor of damage."""
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data)
    elif data[:4] in _TIFF_HEADERS:
        _check_tiff(data)
    elif data[:4] in _OTHER_TIFF_HEADERS:
        raise OtherKind("a TIFF for files above 4 GiB, or with a broken header; save it as a plain TIFF")


def find_png_chunk(data: bytes, kind: bytes) -> bytes | None:
    """The body of the first chunk of that kind, wherever it stands; None if there is none."""
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        if data[position + 4 : position + 8] == kind:
            return data[position + 8 : position + 8 + length]
        position += 12 + length
    return None


def _check_png(data: bytes) -> None:
    position, num_chunks = 8, 0
    allowed = MAX_PNG_CHUNKS + len(data) // 256
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        if data[position + 4 : position + 8] == b"IEND":
            return
        position += 12 + length
        num_chunks += 1
        if num_chunks > allowed:
            raise Suspicious(f"more than {allowed:,} chunks")


def _check_jpeg(data: bytes) -> None:
    position, num_scans, num_segments = 2, 0, 0
    while position + 4 <= len(data):
        found = _JPEG_MARKER.search(data, position)
        if found is None or data[found.start() + 1] == 0xD9:
            return
        if found.start() - position > MAX_JPEG_SEGMENTS and not num_scans:
            raise Suspicious("nothing where its next part should begin")
        kind, start = data[found.start() + 1], found.end()
        num_scans += kind == 0xDA
        num_segments += 1
        if num_scans > MAX_JPEG_SCANS or num_segments > MAX_JPEG_SEGMENTS:
            raise Suspicious(f"more than {MAX_JPEG_SCANS} scans or {MAX_JPEG_SEGMENTS:,} parts")
        has_body = kind not in (0x01, 0xD8)
        position = start + (int.from_bytes(data[start : start + 2], "big") if has_body else 0)


def _check_tiff(data: bytes) -> None:
    for tag, kind, num_values, _ in _tiff_entries(data):
        if tag in _LAYOUT and kind not in _WHOLE_NUMBERS:
            raise Suspicious(f"tag {tag} of type {kind}, which is for whole numbers")
        if num_values > MAX_TIFF_PARTS and (kind not in _BYTES or tag in _LAYOUT):
            raise Suspicious(f"more than {MAX_TIFF_PARTS:,} numbers in tag {tag}")
    tags = tiff_tags(data)
    compression = tags.get(_COMPRESSION, (1, 1))[1]
    if compression not in TIFF_COMPRESSIONS:
        allowed = ", ".join(dict.fromkeys(TIFF_COMPRESSIONS.values()))
        raise OtherKind(f"a TIFF of compression {compression}; save it with one of {allowed}")
    for side, tile_side in ((256, _TILE_WIDTH), (257, _TILE_LENGTH)):
        tile_px, side_px = tags.get(tile_side, (1, 0))[1], tags.get(side, (1, 0))[1]
        if tile_px > max(MAX_TIFF_TILE_PX, side_px + 15):
            raise Suspicious(f"tiles of {tile_px:,} px in a picture of {side_px:,} px")


def tiff_tags(data: bytes) -> dict[int, tuple[int, int]]:
    """Number of values and first value of every tag of the first picture that holds whole numbers."""
    order = _TIFF_HEADERS[data[:4]]
    tags: dict[int, tuple[int, int]] = {}
    for tag, kind, num_values, place in _tiff_entries(data):
        if kind in _WHOLE_NUMBERS and tag not in tags:
            size_bytes, letter = _WHOLE_NUMBERS[kind]
            try:
                if size_bytes * num_values > 4:
                    (place,) = struct.unpack_from(f"{order}I", data, place)
                tags[tag] = (num_values, struct.unpack_from(f"{order}{letter}", data, place)[0])
            except struct.error:
                # Cut off: the decoder gives an account of it.
                continue
    return tags


def _tiff_entries(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Tag, type, number of values and place of the value or its offset of the first picture, while there are any."""
    order = _TIFF_HEADERS[data[:4]]
    if len(data) < 8:
        return
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    if start + 2 > len(data):
        return
    (count,) = struct.unpack_from(f"{order}H", data, start)
    for entry in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12):
        yield (*struct.unpack_from(f"{order}HHI", data, entry), entry + 8)

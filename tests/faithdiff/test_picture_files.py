import contextlib
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.ExifTags import Base

from faithdiff.errors import InputError
from faithdiff.picture_files import (
    OutputOptions,
    PictureLimits,
    PictureTooLarge,
    UnreadablePicture,
    UnsupportedPicture,
    read_picture,
    read_size,
)

LIMITS = PictureLimits()
SMALL = PictureLimits(max_upload_bytes=2**20, max_input_px=10_000, max_side_px=200)
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
REFUSED = (PictureTooLarge, UnreadablePicture, UnsupportedPicture)


def with_orientation(orientation):
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_comes_in_upright(file_format, orientation, to_file):
    quarters = np.zeros((16, 32, 3), np.uint8)
    quarters[:8, :16], quarters[:8, 16:], quarters[8:, :16] = 255, 160, 80
    data = to_file(quarters, file_format, exif=with_orientation(orientation), quality=100)
    source = read_picture(data, LIMITS)
    height, width = source.rgb.shape[:2]
    assert (width, height) == read_size(data, LIMITS) == ((16, 32) if orientation >= 5 else (32, 16))
    corners = {1: [255, 160, 80, 0], 2: [160, 255, 0, 80], 3: [0, 80, 160, 255], 4: [80, 0, 255, 160]}
    corners |= {5: [255, 80, 160, 0], 6: [80, 255, 0, 160], 7: [0, 160, 80, 255], 8: [160, 0, 255, 80]}
    seen = [source.rgb[y, x].mean() for y in (3, height - 4) for x in (3, width - 4)]
    assert seen == pytest.approx(corners[orientation], abs=3)
    assert source.format == file_format


HELD = {
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"),
}


@pytest.mark.parametrize(("file_format", "mode"), [(name, mode) for name, modes in HELD.items() for mode in modes])
def test_every_mode_that_a_format_holds_is_read(mode, file_format, to_file):
    image = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    if mode == "LAB":
        image = Image.new("LAB", (32, 24), (128, 128, 128))
    elif mode != "I;16":
        image = Image.fromarray(PIXELS).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(PIXELS[..., 1]))
    data = to_file(image, file_format)
    source = read_picture(data, LIMITS)
    assert source.rgb.shape == (24, 32, 3)
    assert source.rgb.dtype == (np.uint16 if mode == "I;16" and file_format in ("PNG", "TIFF") else np.uint8)
    assert source.is_grey == (mode in ("1", "L", "LA", "I;16") and file_format != "WEBP")
    assert (source.alpha is not None) == (mode in ("LA", "RGBA"))
    assert source.alpha is None or np.array_equal(source.alpha, PIXELS[..., 1])
    if mode in ("L", "RGB") and file_format in ("PNG", "TIFF"):
        assert np.array_equal(source.rgb, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    "settings", [("TIFF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("MPO", {"quality": 100})]
)
def test_of_several_pictures_the_first_is_read(settings, to_file):
    file_format, more = settings
    others = [Image.new("RGB", (32, 24), colour) for colour in ("red", "blue")]
    first = Image.new("RGB", (32, 24), (10, 200, 30))
    source = read_picture(to_file(first, file_format, save_all=True, append_images=others, **more), LIMITS)
    assert np.abs(source.rgb.astype(int) - [10, 200, 30]).max() <= 2
    assert source.format == ("JPEG" if file_format == "MPO" else file_format)


def test_below_transparent_pixels_goes_on_what_is_around(to_file):
    rgba = np.dstack([PIXELS, np.full((24, 32), 255, np.uint8)])
    rgba[..., :3], rgba[:12, :, 3] = (9, 200, 90), 0
    rgba[:12, :, :3] = (255, 0, 255)
    source = read_picture(to_file(rgba, "PNG"), LIMITS)
    assert np.abs(source.rgb.astype(int) - [9, 200, 90]).max() <= 1
    assert np.array_equal(source.alpha, rgba[..., 3])


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_profile_is_kept_and_a_broken_one_noted(file_format, to_file):
    good = read_picture(to_file(PIXELS, file_format, icc_profile=SRGB), LIMITS)
    assert (good.icc_profile, good.notes) == (SRGB, ())
    broken = read_picture(to_file(PIXELS, file_format, icc_profile=b"x" * 200), LIMITS)
    assert broken.icc_profile is None
    assert broken.notes == ("its colour profile was ignored: it is damaged",)
    other = read_picture(to_file(PIXELS[..., 0], "PNG", icc_profile=SRGB), LIMITS)
    assert "for RGB pixels of class 'mntr', not for GRAY" in other.notes[0]


def test_sixteen_bits_are_kept(png_file):
    wide = np.random.default_rng(1).integers(0, 65_536, (6, 5, 4), dtype=np.uint16)
    wide[..., 3] |= 1
    source = read_picture(png_file(wide), LIMITS)
    assert np.array_equal(np.dstack([source.rgb, source.alpha]), wide)


# Limits


@pytest.mark.parametrize("limits", [PictureLimits(max_input_px=767), PictureLimits(max_side_px=31)])
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_picture_beyond_the_limits_is_too_large(limits, file_format, to_file):
    for read in (read_picture, read_size):
        with pytest.raises(PictureTooLarge, match="32x24 px; at most"):
            read(to_file(PIXELS, file_format), limits)
    with pytest.raises(PictureTooLarge, match=r"bytes; at most 10 are allowed: send a smaller file"):
        read_picture(to_file(PIXELS, file_format), PictureLimits(max_upload_bytes=10))


def huge_files(png_file, tiff_file, to_file):
    pixel = np.zeros((1, 1, 3), np.uint8)
    jpeg = bytearray(to_file(PIXELS, "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    struct.pack_into(">HH", jpeg, frame + 5, 60_000, 60_000)
    yield png_file(pixel, size=(60_000, 60_000))
    yield tiff_file(pixel, 2, tags={256: (4, (60_000,)), 257: (4, (60_000,)), 278: (4, (60_000,))})
    yield bytes(jpeg)
    canvas = (16_382).to_bytes(3, "little") * 2
    webp = to_file(PIXELS, "WEBP", save_all=True, append_images=[Image.fromarray(255 - PIXELS)])
    place = webp.index(b"VP8X") + 12
    yield webp[:place] + canvas + webp[place + 6 :]


def test_a_header_of_60_000_by_60_000_is_refused_before_anything_is_allocated(png_file, tiff_file, to_file):
    for data in huge_files(png_file, tiff_file, to_file):
        for read in (read_picture, read_size):
            tracemalloc.start()
            began = time.process_time()
            with pytest.raises(PictureTooLarge, match=r"px|pixels"):
                read(data, LIMITS)
            assert tracemalloc.get_traced_memory()[1] < 2**20
            tracemalloc.stop()
            assert time.process_time() - began < 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt", b"IDAT"])
def test_what_unpacks_into_far_more_than_a_picture_is_refused_or_left_packed(kind, png_file):
    zeros = zlib.compress(bytes(50_000_000), 9)
    names = {b"iCCP": b"icc\0\0", b"zTXt": b"Comment\0\0", b"iTXt": b"Comment\0\1\0\0\0", b"IDAT": b""}
    data = png_file(PIXELS, {kind: names[kind] + zeros})
    tracemalloc.start()
    with contextlib.suppress(*REFUSED):
        read_picture(data, LIMITS)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore")
def test_tags_that_all_point_at_the_same_megabyte_cost_no_more_than_it(png_file, tiff_file):
    filler = bytes(1_000_000)
    entries = b"".join(struct.pack("<HHII", tag, 7, 900_000, 8) for tag in range(30_000, 34_000))
    block = b"II*\0" + struct.pack("<I", 8 + len(filler)) + filler + struct.pack("<H", 4_000) + entries + bytes(4)
    for data in (png_file(PIXELS, {b"eXIf": block}), block):
        tracemalloc.start()
        with contextlib.suppress(*REFUSED):
            read_picture(data, LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
        tracemalloc.stop()


# Damage


@pytest.mark.parametrize(
    "data", [b"", b"%PDF-1.7", b"GIF89a" + bytes(50), b"BM" + bytes(60), b"<svg/>", b"MMXXVI", bytes(99)]
)
def test_other_files_are_unsupported(data):
    with pytest.raises(UnsupportedPicture, match="send JPEG, PNG, WEBP or TIFF"):
        read_picture(data, LIMITS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_file_cut_off_is_unreadable(file_format, share, to_file):
    data = to_file(PIXELS, file_format)
    with pytest.raises((UnreadablePicture, UnsupportedPicture)):
        read_picture(data[: int(len(data) * share)], LIMITS)


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_hangs_on_behind_a_picture_changes_nothing(file_format, to_file):
    data = to_file(PIXELS, file_format)
    plain = read_picture(data, LIMITS)
    for tail in (b"PK\3\4" + bytes(100), b"<script>alert(1)</script>", b"%PDF-1.7\n", data):
        assert np.array_equal(read_picture(data + tail, LIMITS).rgb, plain.rgb)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", [*FORMATS, "wide PNG", "wide TIFF", "CMYK", "palette", "animated"])
def test_a_file_changed_anywhere_is_read_or_refused_by_name(file_format, to_file, png_file, tiff_file):
    files = {
        "wide PNG": lambda: png_file(PIXELS.astype(np.uint16) * 257, {b"tRNS": bytes(6)}),
        "wide TIFF": lambda: tiff_file(PIXELS.astype(np.uint16) * 257, 2),
        "CMYK": lambda: to_file(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"),
        "palette": lambda: to_file(Image.fromarray(PIXELS).quantize(16), "PNG", transparency=3),
        "animated": lambda: to_file(PIXELS, "WEBP", save_all=True, append_images=[Image.fromarray(255 - PIXELS)]),
    }
    make = files.get(file_format, lambda: to_file(PIXELS, file_format, exif=with_orientation(6), icc_profile=SRGB))
    good, rng = make(), np.random.default_rng(len(file_format))
    reasons = []
    for _ in range(60):
        broken = bytearray(good[: rng.integers(len(good))] if rng.random() < 0.2 else good)
        # Headers stand at the front, but for a TIFF's.
        reach = len(broken) if rng.random() < 0.5 else min(len(broken), 120)
        for place in rng.integers(0, max(1, reach), int(rng.integers(1, 8))):
            if file_format == "wide TIFF" and rng.random() < 0.7:
                place = len(broken) - 1 - place % 120
            if 0 <= place < len(broken):
                broken[place] = rng.integers(256)
        try:
            source = read_picture(bytes(broken), SMALL)
            assert source.rgb.ndim == 3
        except REFUSED as error:
            reasons.append(str(error))
    assert reasons
    assert all(reason.startswith("picture: ") for reason in reasons)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "gif"}, "must be one of png, jpeg, webp, tiff"),
        ({"quality": 0}, "from 1 to 100"),
        ({"quality": 101}, "from 1 to 100"),
        ({"quality": True}, "whole number"),
        ({"quality": 90.0}, "whole number"),
    ],
)
def test_options_out_of_range_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        OutputOptions(**settings)

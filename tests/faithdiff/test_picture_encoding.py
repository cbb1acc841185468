import dataclasses
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.ExifTags import Base

from faithdiff.errors import InputError
from faithdiff.picture_encoding import enlarged_alpha
from faithdiff.picture_files import OutputOptions, PictureFile, PictureLimits, read_picture, write_picture

FORMATS = ("png", "jpeg", "webp", "tiff")
RNG = np.random.default_rng(0)
# Smooth, so that lossy formats come close.
SLOPE = np.linspace(40, 210, 12 * 16).reshape(12, 16)
RGB = np.stack([SLOPE, SLOPE[::-1], SLOPE[:, ::-1]], -1).astype(np.uint8)
WIDE = RNG.integers(0, 65_536, (12, 16, 3), dtype=np.uint16)
ALPHA = np.zeros((12, 16), np.uint8)
ALPHA[3:9, 4:12] = 255
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def source_of(rgb, **more):
    kept = dict.fromkeys(("alpha", "icc_profile", "dpi", "exif")) | {"is_grey": False, "format": "PNG"} | more
    return PictureFile(rgb=rgb, **kept)


def enlarged(levels, scale):
    return levels.repeat(scale, axis=0).repeat(scale, axis=1)


def written(restored, source, scale=1, **options):
    data, media_type = write_picture(restored, source, scale, OutputOptions(**options))
    assert media_type == f"image/{options.get('format', 'png')}"
    return data


def back(data):
    return read_picture(data, PictureLimits())


def exif_block():
    exif = Image.Exif()
    exif[Base.Make] = "Maker"
    exif.get_ifd(0x8769)[Base.FNumber] = 2.8
    exif.get_ifd(0x8825)[1] = "N"
    return exif.tobytes().removeprefix(b"Exif\0\0")


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("alpha", [None, ALPHA], ids=["opaque", "alpha"])
@pytest.mark.parametrize("is_grey", [False, True])
def test_a_result_comes_back_as_it_was_written(file_format, scale, alpha, is_grey):
    rgb = np.repeat(RGB[..., :1], 3, axis=2) if is_grey else RGB
    restored = enlarged(rgb, scale)
    result = back(written(restored, source_of(rgb, alpha=alpha, is_grey=is_grey), scale, format=file_format))
    assert result.format == file_format.upper()
    assert result.is_grey == (is_grey and file_format != "webp")
    assert (result.alpha is None) == (alpha is None or file_format == "jpeg")
    if result.alpha is not None:
        assert np.array_equal(result.alpha, enlarged_alpha(alpha, scale, np.uint8))
    shown = np.full(restored.shape[:2], True) if alpha is None else enlarged_alpha(alpha, scale, np.uint8) == 255
    error = np.abs(result.rgb[shown].astype(int) - restored[shown])
    assert error.max() == 0 if file_format in ("png", "tiff") else error.mean() < 12


@pytest.mark.parametrize("file_format", ["png", "tiff"])
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("has_alpha", [False, True])
@pytest.mark.parametrize("is_grey", [False, True])
def test_sixteen_bits_stay_sixteen_bits_here_and_for_another_reader(file_format, scale, has_alpha, is_grey):
    rgb = np.repeat(WIDE[..., :1], 3, axis=2) if is_grey else WIDE
    alpha = ALPHA.astype(np.uint16) * 257 if has_alpha else None
    restored = enlarged(rgb, scale)
    data = written(restored, source_of(rgb, alpha=alpha, is_grey=is_grey), scale, format=file_format)
    other = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert other.dtype == np.uint16
    colours = other if other.ndim == 2 else other[..., 2::-1]
    assert np.array_equal(colours, restored if other.ndim == 3 else restored[..., 0])
    result = back(data)
    expected = None if alpha is None else enlarged_alpha(alpha, scale, np.uint16)
    assert (result.alpha is None) == (expected is None)
    assert expected is None or np.array_equal(result.alpha, expected)
    shown = np.full(restored.shape[:2], True) if expected is None else expected > 0
    assert np.array_equal(result.rgb[shown], restored[shown])


@pytest.mark.parametrize("file_format", ["jpeg", "webp"])
def test_sixteen_bits_are_rounded_where_a_format_holds_eight(file_format):
    wide = RGB.astype(np.uint16) * 257
    assert written(wide, source_of(wide), format=file_format) == written(RGB, source_of(RGB), format=file_format)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("file_format", FORMATS)
def test_profile_resolution_and_exif_go_along(file_format, wide):
    source = source_of(WIDE if wide else RGB, icc_profile=SRGB, dpi=(300.0, 150.0), exif=exif_block())
    result = back(written(source.rgb, source, format=file_format))
    assert result.icc_profile == SRGB
    assert result.notes == ()
    # WebP has no place for a resolution.
    assert result.dpi is None if file_format == "webp" else result.dpi == pytest.approx((300, 150), abs=0.1)
    exif = Image.Exif()
    exif.load(b"Exif\0\0" + result.exif)
    assert (exif[Base.Make], exif[Base.Orientation]) == ("Maker", 1)
    assert (float(exif.get_ifd(0x8769)[Base.FNumber]), exif.get_ifd(0x8825)[1]) == (2.8, "N")


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("file_format", FORMATS)
def test_metadata_that_is_not_wanted_is_nowhere_in_the_file(file_format, wide):
    source = source_of(WIDE if wide else RGB, icc_profile=SRGB, dpi=(300.0, 300.0), exif=exif_block())
    data = written(source.rgb, source, format=file_format, keep_metadata=False)
    assert b"Maker" in written(source.rgb, source, format=file_format)
    assert b"Maker" not in data
    assert (back(data).exif, back(data).icc_profile) == (None, SRGB)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("dpi", [(65_535.0, 65_535.0), (0.01, 0.01), (72.009, 96.5)])
def test_any_resolution_can_be_written(file_format, dpi):
    back(written(RGB, source_of(RGB, dpi=dpi), format=file_format))


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("wide", [False, True])
def test_the_same_result_gives_the_same_bytes(file_format, wide):
    rgb = WIDE if wide else RGB
    source = source_of(rgb, alpha=ALPHA, icc_profile=SRGB, dpi=(72.0, 72.0), exif=exif_block())
    files = {written(rgb, dataclasses.replace(source), format=file_format) for _ in range(3)}
    assert len(files) == 1


@pytest.mark.parametrize("file_format", ["jpeg", "webp"])
def test_quality_is_the_clients(file_format):
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sizes = [len(written(noise, source_of(noise), format=file_format, quality=quality)) for quality in (1, 50, 90, 100)]
    assert sizes == sorted(set(sizes))


def test_what_is_transparent_lies_on_white_in_a_jpeg():
    alpha = np.zeros((12, 16), np.uint8)
    assert back(written(RGB, source_of(RGB, alpha=alpha), format="jpeg")).rgb.min() >= 254
    grey = np.repeat(RGB[..., :1], 3, axis=2)
    assert back(written(grey, source_of(grey, alpha=alpha, is_grey=True), format="jpeg")).rgb.min() >= 254


def test_grey_is_the_luminance_of_what_the_network_made_of_it():
    coloured = np.zeros((12, 16, 3), np.uint8) + np.array([100, 200, 50], np.uint8)
    result = back(written(coloured, source_of(RGB, is_grey=True)))
    assert result.is_grey
    assert (result.rgb == round(0.2126 * 100 + 0.7152 * 200 + 0.0722 * 50)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("made", [np.uint8, np.uint16])
def test_alpha_is_enlarged_in_the_depth_of_the_result(dtype, made):
    alpha = ALPHA if made == np.uint8 else ALPHA.astype(np.uint16) * 257
    opaque = np.iinfo(dtype).max
    for scale in (1, 2, 4):
        large = enlarged_alpha(alpha, scale, dtype)
        assert (large.shape, large.dtype) == ((12 * scale, 16 * scale), dtype)
        assert (large.min(), large.max()) == (0, opaque)
        assert (large[0] == 0).all(), "no ripples"


def test_a_large_profile_that_a_png_cannot_give_back_is_not_embedded(to_file):
    data = to_file(RGB, "TIFF", icc_profile=SRGB + bytes(2 * 1024**2))
    source = read_picture(data, PictureLimits())
    assert source.icc_profile is None
    assert np.array_equal(source.rgb, RGB)


@pytest.mark.parametrize(
    "restored",
    [RGB[:-1], RGB[..., 0], RGB.astype(np.float32), RGB.astype(np.int32), np.zeros((12, 16, 4), np.uint8)],
)
def test_levels_that_do_not_fit_the_source_are_named(restored):
    with pytest.raises(InputError, match=r"need uint8 or uint16 \[12, 16, 3\]"):
        write_picture(restored, source_of(RGB), 1, OutputOptions())
    with pytest.raises(InputError, match=r"at scale 2 need uint8 or uint16 \[24, 32, 3\]"):
        write_picture(RGB, source_of(RGB), 2, OutputOptions())


@pytest.mark.parametrize(("file_format", "longest_px"), [("jpeg", 65_500), ("webp", 16_383)])
def test_a_side_that_a_format_cannot_hold_is_refused_before_it_is_encoded(file_format, longest_px):
    fits = np.zeros((1, longest_px, 3), np.uint8)
    with Image.open(BytesIO(written(fits, source_of(fits), format=file_format))) as image:
        assert image.size == (longest_px, 1)
    long = np.zeros((1, longest_px + 1, 3), np.uint8)
    with pytest.raises(InputError, match="ask for png or tiff"):
        written(long, source_of(long), format=file_format)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("file_format", ["png", "tiff"])
def test_a_picture_of_many_strips_is_whole(dtype, file_format):
    tall = RNG.integers(0, np.iinfo(dtype).max, (150, 9, 3), dtype=dtype)
    data = written(tall, source_of(tall), format=file_format)
    other = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(other[..., ::-1], tall)
    assert np.array_equal(back(data).rgb, tall)


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_exif_of_a_phone_goes_from_any_format_into_any(file_format, to_file):
    # With compression, Pillow writes no TIFF that has EXIF's inner groups.
    exif = Image.Exif()
    exif.load(b"Exif\0\0" + exif_block())
    for group in (0x8769, 0x8825):
        exif.get_ifd(group)
    for made in FORMATS:
        source = back(to_file(RGB, made.upper(), exif=exif))
        result = back(written(source.rgb, source, format=file_format))
        assert result.exif == source.exif

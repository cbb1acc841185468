from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from faithdiff.picture_checks import OtherKind
from faithdiff.picture_pixels import filled_below, read_pixels, upright

HEIGHT, WIDTH = 5, 7
WIDE = np.random.default_rng(0).integers(0, 65_536, (HEIGHT, WIDTH, 4), dtype=np.uint16)
NARROW = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)


def read(data):
    with Image.open(BytesIO(data)) as image:
        return read_pixels(image, data)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation):
    image = Image.fromarray(NARROW)
    image.getexif()[0x0112] = orientation
    assert np.array_equal(upright(NARROW, orientation), np.asarray(ImageOps.exif_transpose(image)))
    assert np.array_equal(upright(NARROW[..., 0], orientation), upright(NARROW, orientation)[..., 0])


@pytest.mark.parametrize("levels", [NARROW, WIDE], ids=["8", "16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_png_gives_its_exact_levels_with_alpha_apart(levels, channels, png_file):
    levels = levels[..., 0] if channels == 1 else levels[..., :channels]
    pixels = read(png_file(levels))
    assert pixels.is_grey == (channels <= 2)
    assert pixels.colours.dtype == levels.dtype
    colours = levels if channels == 1 else levels[..., 0] if channels == 2 else levels[..., :3]
    assert np.array_equal(pixels.colours, colours)
    assert pixels.alpha is None if channels % 2 else np.array_equal(pixels.alpha, levels[..., -1])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("levels", [NARROW, WIDE], ids=["8", "16"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_tiff_of_either_byte_order_gives_its_exact_levels(levels, channels, order, tiff_file):
    levels = levels[..., 0] if channels == 1 else levels[..., :channels]
    tags = {338: (3, (2,))} if channels == 4 else {}
    pixels = read(tiff_file(levels, 1 if channels == 1 else 2, order, tags))
    assert (pixels.colours.dtype, pixels.is_grey) == (levels.dtype, channels == 1)
    assert np.array_equal(pixels.colours, levels[..., :3] if channels == 4 else levels)
    assert pixels.alpha is None if channels != 4 else np.array_equal(pixels.alpha, levels[..., 3])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_of_a_turned_tiff_stay_whole(orientation, channels, tiff_file):
    levels = WIDE[..., 0] if channels == 1 else WIDE[..., :channels]
    tags = {274: (3, (orientation,)), **({338: (3, (2,))} if channels == 4 else {})}
    pixels = read(tiff_file(levels, 1 if channels == 1 else 2, tags=tags))
    turned = upright(levels, orientation)
    assert np.array_equal(pixels.colours, turned[..., :3] if channels == 4 else turned)
    if channels == 4:
        assert np.array_equal(pixels.alpha, turned[..., 3])


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("predictor", [1, 2])
def test_compressed_tiffs_give_their_exact_levels(compression, predictor, to_file):
    tags = {317: predictor} if compression != "packbits" else {}
    pixels = read(to_file(WIDE[..., 0], "TIFF", compression=compression, tiffinfo=tags))
    assert np.array_equal(pixels.colours, WIDE[..., 0])
    pixels = read(to_file(NARROW[..., :3], "TIFF", compression=compression, tiffinfo=tags))
    assert np.array_equal(pixels.colours, NARROW[..., :3])


@pytest.mark.parametrize("compression", [1, 5, 8, 32_946, 32_773])
def test_sixteen_bit_colours_of_another_writer_stay_whole(compression):
    written, data = cv2.imencode(".tiff", WIDE[..., 2::-1], [cv2.IMWRITE_TIFF_COMPRESSION, compression])
    assert written
    assert np.array_equal(read(data.tobytes()).colours, WIDE[..., :3])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("levels", [NARROW, WIDE], ids=["8", "16"])
def test_tiles_are_put_together(levels, order, tiff_file):
    tile = np.zeros((16, 16, 3), levels.dtype)
    tile[:HEIGHT, :WIDTH] = levels[..., :3]
    tags = {256: (4, (WIDTH,)), 257: (4, (HEIGHT,)), 322: (3, (16,)), 323: (3, (16,)), 324: (4, (8,))}
    tags |= {325: (4, (tile.nbytes,)), 273: None, 278: None, 279: None}
    assert np.array_equal(read(tiff_file(tile, 2, order, tags)).colours, levels[..., :3])


@pytest.mark.parametrize("order", ["<", ">"])
def test_premultiplied_sixteen_bits_are_divided_by_their_alpha(order, tiff_file):
    straight = np.array([[[65_535, 32_768, 1, 40_000], [9, 9, 9, 0], [1, 2, 65_535, 65_535]]], np.uint16)
    share = straight[..., 3:].astype(np.float64) / 65_535
    premultiplied = np.concatenate([(straight[..., :3] * share).round(), straight[..., 3:]], -1).astype(np.uint16)
    pixels = read(tiff_file(premultiplied, 2, order, {338: (3, (1,))}))
    shown = straight[..., 3] > 0
    assert np.abs(pixels.colours[shown].astype(int) - straight[shown][:, :3]).max() <= 1
    assert np.array_equal(pixels.alpha, straight[..., 3])


def test_a_fourth_channel_without_meaning_is_not_alpha(tiff_file):
    pixels = read(tiff_file(WIDE, 2, tags={338: (3, (0,))}))
    assert pixels.alpha is None
    assert np.array_equal(pixels.colours, WIDE[..., :3])


@pytest.mark.parametrize("levels", [NARROW[..., 0], WIDE[..., 0]], ids=["8", "16"])
def test_a_tiff_whose_white_is_zero_is_turned_the_right_way(levels, tiff_file):
    white = 255 if levels.dtype == np.uint8 else 65_535
    assert np.array_equal(read(tiff_file(white - levels, 0)).colours, levels)


def test_twelve_bits_are_stretched_to_sixteen(tiff_file):
    levels = np.array([[0, 4_095, 2_048, 1]], np.uint16)
    bits = (levels[..., None] >> np.arange(12)[::-1] & 1).astype(np.uint8)
    packed = np.packbits(bits.reshape(1, -1), axis=1)
    tags = {256: (4, (4,)), 258: (3, (12,)), 279: (4, (packed.size,))}
    assert read(tiff_file(packed, tags=tags)).colours.tolist() == [[0, 65_535, 2_048 << 4 | 8, 16]]


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_one_grey_that_a_png_calls_transparent_is(depth, png_file):
    highest = 2**depth - 1
    levels = np.array([[0, highest, 1], [highest, 1, 0]], np.uint16 if depth == 16 else np.uint8)
    pixels = read(png_file(levels, {b"tRNS": int(highest).to_bytes(2, "big")}, depth=depth))
    opaque = 65_535 if depth == 16 else 255
    assert pixels.is_grey
    assert pixels.alpha.tolist() == np.where(levels == highest, 0, opaque).tolist()
    assert pixels.colours.max() == opaque


@pytest.mark.parametrize("levels", [NARROW, WIDE], ids=["8", "16"])
def test_the_one_colour_that_a_png_calls_transparent_is(levels, png_file):
    key = b"".join(int(level).to_bytes(2, "big") for level in levels[2, 3, :3])
    pixels = read(png_file(levels[..., :3], {b"tRNS": key}))
    assert np.array_equal(pixels.colours, levels[..., :3])
    assert np.argwhere(pixels.alpha == 0).tolist() == [[2, 3]]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("transparency", [None, b"\xff\0", b"\x80\x40"])
def test_palettes_become_colours(depth, transparency, png_file):
    palette = b"\xff\0\0\0\0\xff"
    levels = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    before = {b"PLTE": palette, **({} if transparency is None else {b"tRNS": transparency})}
    pixels = read(png_file(levels, before, depth=depth, colour_type=3))
    assert np.array_equal(pixels.colours, np.array([[255, 0, 0], [0, 0, 255]])[levels])
    assert (
        pixels.alpha is None
        if transparency is None
        else np.array_equal(pixels.alpha, np.frombuffer(transparency, np.uint8)[levels])
    )


def test_black_and_white_becomes_grey(to_file, png_file):
    levels = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    image = Image.fromarray(levels * 255).convert("1")
    files = [png_file(levels, depth=1), to_file(image, "TIFF"), to_file(image, "TIFF", compression="group4")]
    for data in files:
        pixels = read(data)
        assert pixels.is_grey
        assert np.array_equal(pixels.colours, levels * 255)


def test_cmyk_is_read_as_cmyk_however_its_file_stores_it(to_file):
    cmyk = np.zeros((16, 16, 4), np.uint8) + np.array([255, 128, 0, 30], np.uint8)
    image = Image.frombytes("CMYK", (16, 16), cmyk.tobytes())
    assert np.array_equal(read(to_file(image, "TIFF")).colours, cmyk)
    # Pillow writes an Adobe marker, and levels upside down as that asks for.
    from_jpeg = read(to_file(image, "JPEG", quality=100))
    assert from_jpeg.space == "CMYK"
    assert np.abs(from_jpeg.colours.astype(int) - cmyk).max() <= 2


@pytest.mark.parametrize(("kind", "bits"), [(3, 32), (2, 16), (2, 32)])
def test_floating_point_and_signed_levels_are_another_kind(kind, bits, tiff_file):
    pixels = np.zeros((2, 2), np.uint16 if bits == 16 else np.uint32)
    with pytest.raises(OtherKind, match=r"whole|floating-point"):
        read(tiff_file(pixels, tags={339: (3, (kind,))}))


def test_planes_of_sixteen_bits_are_another_kind(tiff_file):
    # Pillow would take every second byte of them for a picture.
    plane = 2 * HEIGHT * WIDTH
    tags = {284: (3, (2,)), 273: (4, (8, 8 + plane, 8 + 2 * plane)), 279: (4, (plane,) * 3)}
    with pytest.raises(OtherKind, match="separate planes"):
        read(tiff_file(WIDE[..., :3], 2, tags=tags))


def test_planes_of_eight_bits_are_read(tiff_file):
    plane = HEIGHT * WIDTH
    tags = {284: (3, (2,)), 273: (4, (8, 8 + plane, 8 + 2 * plane)), 279: (4, (plane,) * 3)}
    planes = np.ascontiguousarray(NARROW[..., :3].transpose(2, 0, 1)).reshape(HEIGHT, WIDTH, 3)
    assert np.array_equal(read(tiff_file(planes, 2, tags=tags)).colours, NARROW[..., :3])


@pytest.mark.parametrize("wide", [False, True])
def test_hidden_pixels_take_the_colour_around_them(wide):
    rgb = np.zeros((9, 11, 3), np.uint16 if wide else np.uint8)
    rgb[:] = (200, 100, 50)
    alpha = np.full((9, 11), 255, np.uint8)
    rgb[2:7, 3:8], alpha[2:7, 3:8] = (0, 255, 0), 0
    rgb = rgb * 257 if wide else rgb
    filled = filled_below(rgb, alpha)
    assert filled.dtype == rgb.dtype
    assert np.array_equal(filled[alpha > 0], rgb[alpha > 0])
    assert np.abs(filled.astype(int) - np.array([200, 100, 50]) * (257 if wide else 1)).max() <= (257 if wide else 1)


def test_a_picture_that_hides_nothing_or_everything_is_left_alone():
    rgb = NARROW[..., :3]
    for level in (0, 1, 255):
        assert filled_below(rgb, np.full((HEIGHT, WIDTH), level, np.uint8)) is rgb


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 64)])
def test_one_visible_pixel_fills_a_picture_of_any_shape(shape):
    rgb = np.zeros((*shape, 3), np.uint8)
    alpha = np.zeros(shape, np.uint8)
    rgb[0, 0], alpha[0, 0] = (10, 20, 30), 1
    assert np.abs(filled_below(rgb, alpha).astype(int) - [10, 20, 30]).max() <= 1

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from faithdiff.picture_profiles import UnusableProfile, read_curves, read_profile

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Primaries of Display P3 and of sRGB, adapted to D50.
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
PRIMARIES = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))
LEVELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
WIDE = np.random.default_rng(1).integers(0, 65_536, (16, 24, 3), dtype=np.uint16)


def fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65_536)) for value in values)


def curve(*points):
    return b"curv" + bytes(4) + struct.pack(f">I{len(points)}H", len(points), *points)


def parametric(kind, *values):
    return b"para" + bytes(4) + struct.pack(">HH", kind, 0) + fixed(*values)


SRGB_CURVE = parametric(3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def profile(tags, space=b"RGB ", kind=b"mntr", connection=b"XYZ "):
    """An ICC profile of version 4, byte by byte."""
    text = b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 2, 28) + "t".encode("utf-16-be")
    tags = {b"desc": text, b"cprt": text, b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249), **tags}
    table, body, place = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        table += struct.pack(">4sII", name, place + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    head = struct.pack(
        ">I4sI4s4s4s12s4s", place + len(body), bytes(4), 0x04300000, kind, space, connection, bytes(12), b"acsp"
    )
    head += bytes(68 - len(head)) + fixed(0.9642, 1, 0.8249)
    return head + bytes(128 - len(head)) + table + body


def rgb_profile(primaries=P3, tone=SRGB_CURVE, **more):
    tags = {}
    for letter, values in zip(b"rgb", primaries, strict=True):
        tags[bytes([letter]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*values)
        tags[bytes([letter]) + b"TRC"] = tone
    return profile({**tags, **{name.encode(): tag for name, tag in more.items()}})


def grey_profile(tone):
    return profile({b"kTRC": tone}, space=b"GRAY")


def table_profile(space, channels):
    """A profile whose way to Lab is a table of 2 points per channel: lightness falls with the first channel alone."""
    corners = np.stack(np.meshgrid(*[[0, 1]] * channels, indexing="ij"), -1).reshape(-1, channels)
    light = corners.mean(1) if space == b"RGB " else 1 - corners.mean(1)
    lab = np.stack([light * 0xFF00, np.full(len(light), 0x8000), np.full(len(light), 0x8000)], 1).round().astype(">u2")
    identity = np.array([0, 65_535], ">u2").tobytes()
    table = b"mft2" + bytes(4) + struct.pack(">BBBB", channels, 3, 2, 0) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += struct.pack(">HH", 2, 2) + identity * channels + lab.tobytes() + identity * 3
    return profile({b"A2B0": table}, space=space, kind=b"prtr", connection=b"Lab ")


def test_srgb_is_known_by_what_it_does_and_changes_nothing():
    for data in (SRGB, rgb_profile(PRIMARIES)):
        known = read_profile(data, "RGB")
        assert known.is_srgb
        assert known.to_srgb(LEVELS) is LEVELS
        assert known.from_srgb(WIDE) is WIDE


def test_a_wider_gamut_is_converted_as_little_cms_does_and_back():
    wide_gamut = read_profile(rgb_profile(), "RGB")
    assert not wide_gamut.is_srgb
    # Colours that sRGB can hold come back.
    inside = wide_gamut.from_srgb(LEVELS)
    error = np.abs(wide_gamut.to_srgb(inside).astype(int) - LEVELS)
    assert error.mean() < 0.5
    assert error.max() <= 8, "saturated colours are far apart in 8 bits"
    assert np.abs(inside.astype(int) - LEVELS).max() > 10
    red = wide_gamut.from_srgb(np.array([[[255, 0, 0]]], np.uint8))[0, 0]
    assert np.abs(red.astype(int) - [234, 51, 35]).max() <= 1, "sRGB's red in Display P3"


def test_sixteen_bits_are_converted_as_eight_are():
    wide_gamut = read_profile(rgb_profile(), "RGB")
    for convert in (wide_gamut.to_srgb, wide_gamut.from_srgb):
        wide = convert(LEVELS.astype(np.uint16) * 257)
        assert wide.dtype == np.uint16
        assert np.abs(wide / 257 - convert(LEVELS)).max() <= 1.5


def test_sixteen_bits_there_and_back_keep_their_depth():
    wide_gamut = read_profile(rgb_profile(), "RGB")
    back = wide_gamut.to_srgb(wide_gamut.from_srgb(WIDE))
    # Levels near black are closer together than the curves' points.
    assert np.abs(back.astype(int) - WIDE).max() <= 8


@pytest.mark.parametrize("tone", [curve(), curve(int(2.2 * 256)), curve(0, 20_000, 65_535), SRGB_CURVE])
def test_grey_profiles_keep_grey_and_come_back(tone):
    grey = read_profile(grey_profile(tone), "GRAY")
    levels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    rgb = grey.to_srgb(levels)
    assert rgb.shape == (8, 32, 3)
    assert (rgb == rgb[..., :1]).all()
    wide = grey.to_srgb(levels.astype(np.uint16) * 257)
    assert np.abs(wide / 257 - rgb).max() <= 2
    back = grey.from_srgb(wide)
    assert np.abs(back.astype(int) - levels.astype(int) * 257).max() <= 64
    assert grey.from_srgb(rgb).shape == (8, 32)


def test_profiles_of_tables_serve_eight_bits_one_way():
    for space, channels, name in ((b"RGB ", 3, "RGB"), (b"CMYK", 4, "CMYK")):
        tables = read_profile(table_profile(space, channels), name)
        assert (tables.has_way_back, tables.curves) == (False, None)
        rgb = tables.to_srgb(np.zeros((2, 3, channels), np.uint8))
        assert rgb.shape == (2, 3, 3)
        assert rgb.min() >= 254 if space == b"CMYK" else rgb.max() <= 1


def test_curves_beside_tables_are_not_believed():
    with pytest.raises(UnusableProfile, match="tables"):
        read_curves(rgb_profile(A2B0=b"mft2"))


@pytest.mark.parametrize(
    ("data", "space"),
    [
        (b"", "RGB"),
        (b"not a profile at all", "RGB"),
        (SRGB[:200], "RGB"),
        (SRGB, "GRAY"),
        (SRGB, "CMYK"),
        (grey_profile(curve()), "RGB"),
        (profile({}), "RGB"),
        (profile({}, kind=b"link"), "RGB"),
        (SRGB + bytes(4 * 1024**2), "RGB"),
    ],
    # Not by their bytes, of which some are the time of day: two processes would collect different tests.
    ids=["empty", "text", "cut", "of grey", "of CMYK", "grey", "without tables", "a link", "4 MiB"],
)
def test_a_profile_that_cannot_be_used_says_so(data, space):
    with pytest.raises(UnusableProfile):
        read_profile(data, space)


def test_every_form_of_a_curve_is_read():
    x = np.linspace(0, 1, 65_536)
    forms = {
        curve(): x,
        curve(512): x**2,
        curve(0, 65_535): x,
        parametric(0, 2.0): x**2,
        parametric(1, 2.0, 1.0, 0.0): x**2,
        parametric(2, 2.0, 0.5, 0.0, 0.25): x**2 / 4 + 0.25,
        parametric(3, 2.0, 1.0, 0.0, 0.5, 0.5): np.where(x >= 0.5, x**2, x / 2),
        parametric(4, 2.0, 0.5, 0.0, 0.5, 0.5, 0.25, 0.0625): np.where(x >= 0.5, x**2 / 4 + 0.25, x / 2 + 0.0625),
    }
    for tone, expected in forms.items():
        assert np.abs(read_curves(grey_profile(tone)).light[0] - expected).max() < 2e-4, tone


def test_falling_curves_are_made_level():
    light = read_curves(grey_profile(curve(0, 40_000, 10_000, 65_535))).light[0]
    assert (np.diff(light) >= 0).all()


@pytest.mark.parametrize(
    "tone",
    [
        b"curv",
        b"curv" + bytes(4) + struct.pack(">IH", 4, 1),
        b"curv" + bytes(4) + struct.pack(">I", 2**31),
        parametric(5, 1.0),
        parametric(0, -1.0),
        parametric(1, 1.0, 0.0, 0.0),
        parametric(4, 1.0),
        b"mluc" + bytes(20),
    ],
)
def test_a_broken_curve_is_no_curve(tone):
    with pytest.raises((UnusableProfile, struct.error)):
        read_curves(grey_profile(tone))


def test_a_profile_cut_or_changed_anywhere_is_used_or_refused_but_never_fails():
    rng = np.random.default_rng(0)
    data = rgb_profile()
    image = Image.fromarray(LEVELS)
    assert image.mode == "RGB"
    for _ in range(60):
        broken = bytearray(data[: rng.integers(len(data))] if rng.random() < 0.2 else data)
        for place in rng.integers(0, max(1, len(broken)), int(rng.integers(1, 4))):
            if broken:
                broken[place % len(broken)] = rng.integers(256)
        try:
            usable = read_profile(bytes(broken), "RGB")
        except UnusableProfile:
            continue
        assert usable.to_srgb(LEVELS).shape == LEVELS.shape
        if usable.curves is not None:
            assert usable.to_srgb(WIDE).dtype == np.uint16
        if usable.has_way_back:
            usable.from_srgb(LEVELS)
            assert usable.curves is None or usable.from_srgb(WIDE).shape == WIDE.shape

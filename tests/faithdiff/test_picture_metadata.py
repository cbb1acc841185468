import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import GPS, IFD, Base

from faithdiff.picture_metadata import MAX_EXIF_BYTES, orientation_of, read_metadata, upright_size

PIXELS = np.zeros((8, 16, 3), np.uint8)
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


def exif_of(orientation=6, **more):
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    exif[Base.Make], exif[Base.Copyright], exif[Base.XResolution] = "Maker", "(c) me", 72.0
    exif.get_ifd(IFD.Exif).update({Base.FNumber: 2.8, Base.DateTimeOriginal: "2026:01:02 03:04:05"})
    exif.get_ifd(IFD.Exif).update({Base.ExifImageWidth: 16, Base.ExifImageHeight: 8, **more.get("inner", {})})
    exif.get_ifd(IFD.GPSInfo).update({GPS.GPSLatitudeRef: "N", GPS.GPSLatitude: (52.0, 31.0, 12.5)})
    # Pillow writes the inner groups into a TIFF only if it has read them.
    loaded = Image.Exif()
    loaded.load(exif.tobytes())
    for group in (IFD.Exif, IFD.GPSInfo):
        loaded.get_ifd(group)
    return loaded


def metadata_of(data):
    with Image.open(BytesIO(data)) as image:
        image.load()
        return read_metadata(image, data)


def block(exif):
    loaded = Image.Exif()
    loaded.load(b"Exif\0\0" + exif)
    return loaded


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_and_upright_size_are_known_from_the_header(file_format, orientation, to_file):
    data = to_file(PIXELS, file_format, exif=exif_of(orientation))
    with Image.open(BytesIO(data)) as image:
        assert upright_size(image, data) == ((8, 16) if orientation >= 5 else (16, 8))
        assert orientation_of(image, data) == orientation


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_orientation_that_makes_no_sense_is_none(orientation, to_file):
    data = to_file(PIXELS, "JPEG", exif=exif_of(orientation))
    with Image.open(BytesIO(data)) as image:
        assert orientation_of(image, data) == 1


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_describes_the_picture_is_kept_and_what_is_stale_is_not(file_format, to_file):
    metadata = metadata_of(to_file(PIXELS, file_format, exif=exif_of()))
    assert metadata.notes == ()
    kept = block(metadata.exif)
    assert (kept[Base.Make], kept[Base.Copyright], kept[Base.Orientation]) == ("Maker", "(c) me", 1)
    assert set(kept) == {Base.Make, Base.Copyright, Base.Orientation, IFD.Exif, IFD.GPSInfo}
    inner = kept.get_ifd(IFD.Exif)
    assert set(inner) == {Base.FNumber, Base.DateTimeOriginal}
    assert float(inner[Base.FNumber]) == 2.8
    assert kept.get_ifd(IFD.GPSInfo)[GPS.GPSLatitude] == (52.0, 31.0, 12.5)


def test_the_thumbnail_is_gone(to_file):
    thumbnail = to_file(PIXELS, "JPEG")
    exif = bytearray(exif_of().tobytes().removeprefix(b"Exif\0\0"))
    order = "<" if exif[:2] == b"II" else ">"
    (count,) = struct.unpack_from(f"{order}H", exif, 8)
    struct.pack_into(f"{order}I", exif, 10 + 12 * count, len(exif))
    entries = ((513, 4, 1, len(exif) + 30), (514, 4, 1, len(thumbnail)))
    exif += struct.pack(f"{order}H", 2) + b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    exif += bytes(4) + thumbnail
    data = to_file(PIXELS, "JPEG", exif=b"Exif\0\0" + bytes(exif))
    with Image.open(BytesIO(data)) as image:
        assert image.getexif().get_ifd(IFD.IFD1)[514] == len(thumbnail)
    kept = metadata_of(data).exif
    assert thumbnail[:20] not in kept
    assert block(kept).get_ifd(IFD.IFD1) == {}


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_picture_without_metadata_has_none(file_format, to_file):
    metadata = metadata_of(to_file(PIXELS, file_format))
    assert (metadata.exif, metadata.dpi, metadata.notes) == (None, None, ())


def test_an_orientation_alone_leaves_nothing_to_keep(to_file):
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    assert metadata_of(to_file(PIXELS, "JPEG", exif=exif)).exif is None


def test_exif_behind_the_pixels_of_a_png_counts(png_file):
    data = png_file(PIXELS, after={b"eXIf": exif_of().tobytes().removeprefix(b"Exif\0\0")})
    with Image.open(BytesIO(data)) as image:
        assert upright_size(image, data) == (8, 16)
    assert block(metadata_of(data).exif)[Base.Make] == "Maker"


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize(("orientation", "expected"), [(1, (300, 150)), (6, (150, 300))])
def test_resolution_turns_with_the_picture(file_format, orientation, expected, to_file):
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    dpi = metadata_of(to_file(PIXELS, file_format, dpi=(300, 150), exif=exif)).dpi
    assert dpi == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("dpi", [(0, 0), (-1, 72), (float("nan"), 72), (1e9, 72), (72,), None, ("a", "b")])
def test_a_resolution_that_makes_no_sense_is_none(dpi):
    image = Image.fromarray(PIXELS)
    image.info["dpi"] = dpi
    assert read_metadata(image, b"").dpi is None


def test_what_is_bulky_goes_before_everything_does(to_file):
    exif = exif_of(inner={IFD.MakerNote: bytes(50_000), Base.UserComment: bytes(20_000)})
    metadata = metadata_of(to_file(PIXELS, "PNG", exif=exif))
    assert len(metadata.exif) < MAX_EXIF_BYTES
    assert block(metadata.exif).get_ifd(IFD.Exif)[Base.DateTimeOriginal] == "2026:01:02 03:04:05"
    exif[Base.ImageDescription] = "x" * MAX_EXIF_BYTES
    metadata = metadata_of(to_file(PIXELS, "PNG", exif=exif))
    assert metadata.exif is None
    assert "more than 65,000 bytes" in metadata.notes[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "exif", [b"garbage", b"", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0\x08\0\0\0"]
)
def test_damaged_exif_costs_nothing_but_itself(exif, png_file):
    data = png_file(PIXELS, {b"eXIf": exif})
    with Image.open(BytesIO(data)) as image:
        assert orientation_of(image, data) == 1
    assert metadata_of(data).exif is None


@pytest.mark.filterwarnings("ignore")
def test_exif_changed_anywhere_is_kept_or_noted_but_never_fails(png_file):
    rng = np.random.default_rng(0)
    good = exif_of().tobytes().removeprefix(b"Exif\0\0")
    for _ in range(100):
        broken = bytearray(good)
        for place in rng.integers(0, len(good), int(rng.integers(1, 6))):
            broken[place] = rng.integers(256)
        data = png_file(PIXELS, {b"eXIf": bytes(broken)})
        with Image.open(BytesIO(data)) as image:
            assert upright_size(image, data) in ((16, 8), (8, 16))
        metadata = metadata_of(data)
        if metadata.exif is not None:
            assert block(metadata.exif).get(Base.Orientation, 1) == 1

"""Restored levels as the bytes of a picture file, with what its source had: alpha, profile, resolution, EXIF."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.ExifTags import IFD

from faithdiff.errors import InputError
from faithdiff.image_modes import to_eight_bits
from faithdiff.picture_profiles import Profile, read_profile

if TYPE_CHECKING:
    from faithdiff.picture_files import OutputOptions, PictureFile

Levels = npt.NDArray[Any]

_MAX_SIDE_PX = {"jpeg": 65_500, "webp": 16_383}
_SIXTEEN_BITS = ("png", "tiff")
# Level 3 is about three times as fast as the default and a few per cent larger.
_PNG_LEVEL = 3
_PNG_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
_DEFLATE, _PREDICTOR = "tiff_adobe_deflate", 317
_WIDTH, _BITS_PER_SAMPLE = 256, 258


def encode(restored_rgb: Levels, source: PictureFile, scale: int, options: OutputOptions) -> bytes:
    """As `picture_files.write_picture`, which documents it."""
    _check(restored_rgb, source, scale, options)
    levels = restored_rgb if options.format in _SIXTEEN_BITS else to_eight_bits(restored_rgb)
    alpha = None if source.alpha is None else enlarged_alpha(source.alpha, scale, levels.dtype)
    colours, icc_profile = _in_profile(levels, source, options)
    if alpha is not None and options.format == "jpeg":
        colours, alpha = _on_white(colours, alpha), None
    picture = colours if alpha is None else np.dstack([colours, alpha])
    exif = source.exif if options.keep_metadata else None
    return _file(picture, options, icc_profile, source.dpi, exif)


def enlarged_alpha(alpha: Levels, scale: int, dtype: npt.DTypeLike) -> Levels:
    """[scale H, scale W] of alpha [H, W], in the depth of `dtype`. Bicubic: it leaves no ripples off an edge."""
    if alpha.dtype == np.uint16 and np.dtype(dtype) == np.uint8:
        alpha = to_eight_bits(alpha)
    elif alpha.dtype == np.uint8 and np.dtype(dtype) == np.uint16:
        alpha = alpha.astype(np.uint16) * 257
    if scale == 1:
        return alpha
    size = (alpha.shape[1] * scale, alpha.shape[0] * scale)
    if alpha.dtype == np.uint8:
        return np.asarray(Image.fromarray(alpha).resize(size, Image.Resampling.BICUBIC))
    resized = np.asarray(Image.fromarray(alpha.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
    return resized.round().clip(0, 65_535).astype(np.uint16)


def _check(restored_rgb: Levels, source: PictureFile, scale: int, options: OutputOptions) -> None:
    height, width = source.rgb.shape[:2]
    expected = (height * scale, width * scale, 3)
    if restored_rgb.shape != expected or restored_rgb.dtype not in (np.uint8, np.uint16):
        raise InputError(
            f"output: got {restored_rgb.dtype} {list(restored_rgb.shape)}; "
            f"{width}x{height} px at scale {scale} need uint8 or uint16 {list(expected)}"
        )
    longest, allowed = max(expected), _MAX_SIDE_PX.get(options.format)
    if allowed is not None and longest > allowed:
        raise InputError(
            f"output: {options.format} holds sides of at most {allowed:,} px, this picture has {longest:,}; "
            "ask for png or tiff"
        )


def _in_profile(levels: Levels, source: PictureFile, options: OutputOptions) -> tuple[Levels, bytes | None]:
    """Colours [H, W, 3], or [H, W] of a grey picture, in the source's profile, and the profile to embed."""
    is_grey = source.is_grey and options.format != "webp"
    if source.is_grey:
        levels = _grey(levels)
    profile = _profile(source)
    if profile is None or (profile.space == "GRAY" and not is_grey):
        return (levels[..., 0] if is_grey else levels), None
    if levels.dtype == np.uint16 and profile.curves is None and not profile.is_srgb:
        levels = to_eight_bits(levels)
    return profile.from_srgb(levels), profile.data


def _profile(source: PictureFile) -> Profile | None:
    return None if source.icc_profile is None else read_profile(source.icc_profile, "GRAY" if source.is_grey else "RGB")


def _grey(levels: Levels) -> Levels:
    """The luminance (ITU-R BT.709) in every channel."""
    result = np.empty_like(levels)
    weights = np.array([0.2126, 0.7152, 0.0722], np.float32)
    for top in range(0, len(levels), 256):
        result[top : top + 256] = (levels[top : top + 256] @ weights).round()[..., None]
    return result


def _on_white(colours: Levels, alpha: Levels) -> Levels:
    result = np.empty_like(colours)
    for top in range(0, len(colours), 256):
        share = alpha[top : top + 256].astype(np.uint32)
        share = share if colours.ndim == 2 else share[..., None]
        result[top : top + 256] = (colours[top : top + 256] * share + 255 * (255 - share) + 127) // 255
    return result


def _file(
    picture: Levels,
    options: OutputOptions,
    icc_profile: bytes | None,
    dpi: tuple[float, float] | None,
    exif: bytes | None,
) -> bytes:
    kept: dict[str, Any] = {}
    if icc_profile is not None:
        kept["icc_profile"] = icc_profile
    if exif is not None:
        kept["exif"] = b"Exif\0\0" + exif
    if dpi is not None and options.format != "webp":
        kept["dpi"] = dpi
    if options.format == "tiff":
        return _tiff(picture, kept)
    if picture.dtype == np.uint16:
        return _wide_png(picture, icc_profile, dpi, exif)
    settings: dict[str, dict[str, Any]] = {
        "png": {"compress_level": _PNG_LEVEL},
        "jpeg": {"quality": options.quality, "subsampling": 0 if options.quality >= 90 else 2},
        "webp": {"quality": options.quality, "method": 4},
    }
    return _saved(_image(picture), options.format, **settings[options.format], **kept)


def _image(picture: Levels) -> Image.Image:
    if picture.ndim == 3 and picture.shape[2] == 2:
        return Image.merge("LA", [Image.fromarray(np.ascontiguousarray(picture[..., c])) for c in range(2)])
    return Image.fromarray(picture)


def _saved(image: Image.Image, file_format: str, **settings: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **settings)
    return buffer.getvalue()


def _tiff(picture: Levels, kept: dict[str, Any]) -> bytes:
    if "exif" in kept:
        exif = Image.Exif()
        exif.load(kept.pop("exif"))
        for group in (IFD.Exif, IFD.GPSInfo):
            exif.get_ifd(group)
        kept["exif"] = exif
    if picture.dtype == np.uint8:
        kept.setdefault("exif", Image.Exif())[_PREDICTOR] = 2
        return _saved(_image(picture), "tiff", compression=_DEFLATE, **kept)
    if picture.ndim == 3 and picture.shape[2] == 2:
        # Hardly any program reads 16-bit grey with alpha in a TIFF.
        picture = picture[..., [0, 0, 0, 1]]
    # Pillow writes no 16-bit RGB, but 8-bit rows of twice the width are the same bytes.
    narrow = np.ascontiguousarray(picture.astype("<u2")).view(np.uint8)
    channels = 1 if picture.ndim == 2 else picture.shape[2]
    narrow = narrow.reshape(picture.shape[0], 2 * picture.shape[1], channels)
    data = _saved(_image(narrow[..., 0] if channels == 1 else narrow), "tiff", compression=_DEFLATE, **kept)
    return _widened(bytearray(data), picture.shape[1])


def _widened(data: bytearray, width_px: int) -> bytes:
    """A little-endian TIFF of 8-bit samples, told that pairs of its bytes are samples of 16 bits."""
    assert data[:4] == b"II*\0", "not the TIFF that was written"
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, num_values, place = struct.unpack_from("<HHII", data, entry)
        if tag == _WIDTH:
            struct.pack_into("<HHII", data, entry, tag, 4, 1, width_px)
        elif tag == _BITS_PER_SAMPLE:
            assert kind == 3, "bits per sample are SHORTs"
            struct.pack_into(f"<{num_values}H", data, place if num_values > 2 else entry + 8, *[16] * num_values)
    return bytes(data)


def _wide_png(picture: Levels, icc_profile: bytes | None, dpi: tuple[float, float] | None, exif: bytes | None) -> bytes:
    """A PNG of 16 bits per sample (W3C PNG, third edition), which Pillow writes of grey alone."""
    height, width = picture.shape[:2]
    channels = 1 if picture.ndim == 2 else picture.shape[2]
    parts = [b"\x89PNG\r\n\x1a\n"]
    parts.append(_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, _PNG_COLOUR_TYPES[channels], 0, 0, 0)))
    if icc_profile is not None:
        parts.append(_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile)))
    if dpi is not None:
        parts.append(_chunk(b"pHYs", struct.pack(">IIB", *(round(side / 0.0254) for side in dpi), 1)))
    if exif is not None:
        parts.append(_chunk(b"eXIf", exif))
    parts.append(_chunk(b"IDAT", _deflated(picture.reshape(height, width, channels))))
    parts.append(_chunk(b"IEND", b""))
    return b"".join(parts)


def _deflated(picture: Levels) -> bytes:
    """Rows as differences to the pixel on the left (filter type 1), compressed."""
    packer, parts = zlib.compressobj(_PNG_LEVEL), []
    height, width, channels = picture.shape
    for top in range(0, height, 64):
        band = np.ascontiguousarray(picture[top : top + 64].astype(">u2")).view(np.uint8)
        band = band.reshape(-1, width, 2 * channels)
        rows = np.ones((len(band), 1 + band[0].size), np.uint8)
        differences = band.copy()
        differences[:, 1:] -= band[:, :-1]
        rows[:, 1:] = differences.reshape(len(band), -1)
        parts.append(packer.compress(rows.tobytes()))
    return b"".join([*parts, packer.flush()])


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

"""Restored levels as the bytes of a picture file, with what its source had: alpha, profile, resolution, EXIF."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffTags
from PIL.ExifTags import IFD
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from faithdiff.errors import InputError
from faithdiff.image_modes import to_eight_bits
from faithdiff.picture_profiles import Profile, read_profile

if TYPE_CHECKING:
    from faithdiff.picture_files import OutputOptions, PictureFile

Levels = npt.NDArray[Any]

_MAX_SIDE_PX = {"jpeg": 65_500, "webp": 16_383}
_SIXTEEN_BITS = ("png", "tiff")
# Level 3 is about three times as fast as the default and a few per cent larger.
_DEFLATE_LEVEL = 3
_PNG_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
# Adobe's number for it.
_DEFLATE = 8
_STRIP_ROWS = 64


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
    if options.format == "tiff":
        return _tiff(picture, icc_profile, dpi, exif)
    if picture.dtype == np.uint16:
        return _wide_png(picture, icc_profile, dpi, exif)
    kept: dict[str, Any] = {}
    if icc_profile is not None:
        kept["icc_profile"] = icc_profile
    if exif is not None:
        kept["exif"] = b"Exif\0\0" + exif
    if dpi is not None and options.format != "webp":
        kept["dpi"] = dpi
    settings: dict[str, dict[str, Any]] = {
        "png": {"compress_level": _DEFLATE_LEVEL},
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


def _tiff(picture: Levels, icc_profile: bytes | None, dpi: tuple[float, float] | None, exif: bytes | None) -> bytes:
    """A TIFF of strips, each compressed. Pillow writes neither 16-bit RGB nor, with compression, all of the EXIF."""
    if picture.dtype == np.uint16 and picture.ndim == 3 and picture.shape[2] == 2:
        # Hardly any program reads 16-bit grey with alpha in a TIFF.
        picture = picture[..., [0, 0, 0, 1]]
    height, width = picture.shape[:2]
    channels = 1 if picture.ndim == 2 else picture.shape[2]
    strips = _strips(picture.reshape(height, width, channels))
    sizes = [len(strip) for strip in strips]
    tags: dict[int, Any] = {
        **{
            256: width,
            257: height,
            258: (8 * picture.itemsize,) * channels,
            259: _DEFLATE,
            262: 1 if channels < 3 else 2,
        },
        **{
            273: tuple(np.cumsum([0, *sizes[:-1]]).tolist()),
            277: channels,
            278: _STRIP_ROWS,
            279: tuple(sizes),
            317: 2,
        },
    }
    if channels in (2, 4):
        tags[338] = 2
    if dpi is not None:
        tags |= {282: dpi[0], 283: dpi[1], 296: 2}
    directory = ImageFileDirectory_v2()
    for tag in (273, 279):
        directory.tagtype[tag] = TiffTags.LONG
    if icc_profile is not None:
        tags[34_675], directory.tagtype[34_675] = icc_profile, TiffTags.UNDEFINED
    for tag, value in (tags | _exif_tags(exif)).items():
        directory[tag] = value
    buffer = BytesIO()
    # It counts the places of the strips from its own end.
    directory.save(buffer)
    return b"".join([buffer.getvalue(), *strips])


def _exif_tags(block: bytes | None) -> dict[int, Any]:
    if block is None:
        return {}
    exif = Image.Exif()
    exif.load(b"Exif\0\0" + block)
    groups = {int(group): dict(exif.get_ifd(group)) for group in (IFD.Exif, IFD.GPSInfo)}
    return {**exif, **{group: values for group, values in groups.items() if values}}


def _strips(picture: Levels) -> list[bytes]:
    """Bands of rows as differences to the pixel on the left, compressed."""
    strips = []
    for top in range(0, len(picture), _STRIP_ROWS):
        band = picture[top : top + _STRIP_ROWS]
        differences = band.copy()
        differences[:, 1:] -= band[:, :-1]
        strips.append(zlib.compress(differences.astype(differences.dtype.newbyteorder("<")).tobytes(), _DEFLATE_LEVEL))
    return strips


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
    packer, parts = zlib.compressobj(_DEFLATE_LEVEL), []
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

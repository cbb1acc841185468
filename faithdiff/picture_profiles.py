"""Colour profiles of pictures: from the profile that a file embeds to sRGB, which the network sees, and back into it.

8 bits go through Little CMS. It takes 16 bits of RGB nowhere in Pillow, so those are converted here, from the curves
and primaries of the profile; a profile that describes colours by tables alone serves 8 bits only. Grey is converted
here too: Little CMS draws straight lines between 33 levels, which parts dark ones from a linear profile by up to 6.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BytesIO
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from faithdiff.image_modes import to_eight_bits

Levels = npt.NDArray[Any]
Space = Literal["RGB", "GRAY", "CMYK"]

MAX_PROFILE_BYTES = 4 * 1024**2
# Pillow, and so we, would refuse to read a PNG with a larger one.
_MAX_KEPT_BYTES = 1024**2
_MODES: dict[str, str] = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_PIXEL_CLASSES = ("mntr", "scnr", "prtr", "spac")
_BAND_PX = 1 << 20
_ALL_LEVELS = np.arange(256, dtype=np.uint16)[None] * 257
# Linear sRGB to the D50 connection space, as in the sRGB profile of the ICC.
_SRGB_TO_XYZ = np.array(
    [
        [0.4360747, 0.3850649, 0.1430804],
        [0.2225045, 0.7168786, 0.0606169],
        [0.0139322, 0.0971045, 0.7141733],
    ]
)


class UnusableProfile(ValueError):  # noqa: N818 - the picture is still good
    """A profile that is damaged, or for another kind of pixels."""


@dataclass(frozen=True)
class Profile:
    """An embedded profile that is known to work. `has_way_back`: colours can be converted into it too."""

    data: bytes
    space: Space
    has_way_back: bool

    def to_srgb(self, levels: Levels) -> Levels:
        """uint8 or uint16 [H, W, 3] in sRGB of levels of the profile, [H, W] for grey, [H, W, 4] for CMYK."""
        if self.is_srgb:
            return levels
        if levels.dtype == np.uint16:
            assert self.curves is not None, "16 bits of a profile made of tables"
            return self.curves.to_srgb(levels)
        if self.space == "GRAY" and self.curves is not None:
            return to_eight_bits(self.curves.to_srgb(_ALL_LEVELS))[0][levels]
        rgb = _apply(self.data, self.space, levels, is_back=False)
        # Rounding may part the channels of a grey by a level.
        return np.repeat(rgb[..., 1:2], 3, axis=2) if self.space == "GRAY" else rgb

    def from_srgb(self, levels: Levels) -> Levels:
        """Levels of the profile, of uint8 or uint16 [H, W, 3] in sRGB; [H, W] of a grey profile."""
        assert self.has_way_back, "a way back that the profile does not have"
        if self.is_srgb:
            return levels
        if levels.dtype == np.uint16:
            assert self.curves is not None, "16 bits of a profile made of tables"
            return self.curves.from_srgb(levels)
        if self.space == "GRAY" and self.curves is not None:
            grey = np.repeat(_ALL_LEVELS[..., None], 3, axis=2)
            return to_eight_bits(self.curves.from_srgb(grey))[0][levels[..., 1]]
        return _apply(self.data, self.space, levels, is_back=True)

    @cached_property
    def is_srgb(self) -> bool:
        """Whether it is sRGB but for rounding; most are, and conversion would only cost."""
        if self.space != "RGB":
            return False
        steps = np.linspace(0, 255, 9).round().astype(np.uint8)
        cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(9, 81, 3)
        return int(np.abs(_apply(self.data, "RGB", cube, is_back=False).astype(int) - cube).max()) <= 1

    @cached_property
    def curves(self) -> Curves | None:
        """The profile as curves and primaries, None where it has tables instead."""
        try:
            return read_curves(self.data)
        except (UnusableProfile, struct.error, np.linalg.LinAlgError):
            return None


def read_profile(data: bytes, space: Space) -> Profile:
    """The profile in `data` for pixels of `space`.

    Raises:
        UnusableProfile: damaged, too large, or for other pixels.
    """
    if len(data) > MAX_PROFILE_BYTES:
        raise UnusableProfile(f"it has {len(data):,} bytes, more than {MAX_PROFILE_BYTES:,}")
    try:
        about = ImageCms.ImageCmsProfile(BytesIO(data)).profile
        found, kind = about.xcolor_space.strip(), about.device_class
    except (OSError, ValueError, TypeError) as error:
        raise UnusableProfile("it is damaged") from error
    if found != space or kind not in _PIXEL_CLASSES:
        raise UnusableProfile(f"it is for {found or 'unknown'} pixels of class {kind!r}, not for {space}")
    try:
        _transform(data, space, False)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise UnusableProfile("it cannot be converted from") from error
    return Profile(data, space, len(data) <= _MAX_KEPT_BYTES and _has_way_back(data, space))


def _has_way_back(data: bytes, space: Space) -> bool:
    if space == "CMYK":
        return False
    try:
        _transform(data, space, True)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return False
    return True


@lru_cache(maxsize=8)
def _transform(data: bytes, space: Space, is_back: bool) -> ImageCms.ImageCmsTransform:
    own = ImageCms.ImageCmsProfile(BytesIO(data))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    mode = _MODES[space]
    return ImageCms.buildTransform(
        srgb if is_back else own,
        own if is_back else srgb,
        "RGB" if is_back else mode,
        mode if is_back else "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def _apply(data: bytes, space: Space, levels: Levels, *, is_back: bool) -> Levels:
    mode = "CMYK" if space == "CMYK" else None
    image = Image.fromarray(levels) if mode is None else Image.frombytes(mode, levels.shape[1::-1], levels.tobytes())
    converted = ImageCms.applyTransform(image, _transform(data, space, is_back))
    assert converted is not None
    return np.asarray(converted)


@dataclass(frozen=True)
class Curves:
    """A profile as curves and primaries. `light`: [channels, 65536], of each level, in [0, 1]."""

    light: npt.NDArray[np.float64]
    to_linear: npt.NDArray[np.float64] | None
    """Its linear RGB to linear sRGB; None for grey."""

    def to_srgb(self, levels: Levels) -> Levels:
        """uint16 [H, W, 3] in sRGB of uint16 levels [H, W, 3], or [H, W] of a grey profile."""
        result = np.empty((*levels.shape[:2], 3), np.uint16)
        for rows in _bands(levels):
            if self.to_linear is None:
                result[rows] = _quantised(_srgb_curve(self.light[0][levels[rows]]))[..., None]
                continue
            linear = np.stack([self.light[c][levels[rows, :, c]] for c in range(3)], axis=-1)
            result[rows] = _quantised(_srgb_curve(linear @ self.to_linear.T))
        return result

    def from_srgb(self, levels: Levels) -> Levels:
        """uint16 levels of the profile of uint16 [H, W, 3] in sRGB; [H, W] for grey, of the green channel."""
        result = np.empty(levels.shape[:2] if self.to_linear is None else levels.shape, np.uint16)
        grid = np.linspace(0, 1, 65_536)
        for rows in _bands(levels):
            if self.to_linear is None:
                result[rows] = _quantised(np.interp(_srgb_light()[levels[rows, :, 1]], self.light[0], grid))
                continue
            linear = _srgb_light()[levels[rows]] @ np.linalg.inv(self.to_linear).T
            for c in range(3):
                result[rows, :, c] = _quantised(np.interp(linear[..., c], self.light[c], grid))
        return result


def read_curves(data: bytes) -> Curves:
    """The curves and primaries of an ICC profile (ICC.1:2022, 9.2 and 10.6, 10.18, 10.31). Raises UnusableProfile."""
    tags = _tags(data)
    if b"kTRC" in tags:
        return Curves(_curve(tags[b"kTRC"])[None], None)
    # With tables beside them the curves are a rough copy: what the profile means is in the tables.
    if b"A2B0" in tags or b"A2B1" in tags or not {b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC"} <= set(tags):
        raise UnusableProfile("it has tables, no curves")
    primaries = np.array([struct.unpack(">3i", tags[name][8:20]) for name in (b"rXYZ", b"gXYZ", b"bXYZ")]).T / 65_536
    to_linear = np.linalg.inv(_SRGB_TO_XYZ) @ primaries
    np.linalg.inv(to_linear)
    return Curves(np.stack([_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC")]), to_linear)


def _tags(data: bytes) -> dict[bytes, bytes]:
    (count,) = struct.unpack_from(">I", data, 128)
    if count > 100:
        raise UnusableProfile(f"it has {count} tags")
    entries = [struct.unpack_from(">4sII", data, 132 + 12 * index) for index in range(count)]
    return {name: data[offset : offset + size] for name, offset, size in entries}


def _curve(tag: bytes) -> npt.NDArray[np.float64]:
    """Light per level [65536] of a "curv" or "para" tag."""
    x = np.linspace(0, 1, 65_536)
    if tag[:4] == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        if 12 + 2 * count > len(tag):
            raise UnusableProfile("a curve is cut off")
        points = np.array(struct.unpack_from(f">{count}H", tag, 12))
        y = x if count == 0 else x ** (points[0] / 256) if count == 1 else _through(points / 65_535, x)
    elif tag[:4] == b"para":
        with np.errstate(all="ignore"):
            y = _parametric(tag, x)
    else:
        raise UnusableProfile(f"a curve is of type {tag[:4]!r}")
    if not np.isfinite(y).all():
        raise UnusableProfile("a curve has no finite values")
    # The way back needs a curve that never falls.
    return np.maximum.accumulate(np.clip(y, 0, 1))


def _through(points: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.interp(x, np.linspace(0, 1, len(points)), points)


def _parametric(tag: bytes, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    (kind,) = struct.unpack_from(">H", tag, 8)
    if kind > 4:
        raise UnusableProfile(f"a curve is of parametric type {kind}")
    c = d = e = f = 0.0
    values = [value / 65_536 for value in struct.unpack_from(f">{(1, 3, 4, 5, 7)[kind]}i", tag, 12)]
    if kind == 0:
        return np.asarray(x ** values[0])
    g, a, b = values[:3]
    if kind in (1, 2):
        if a == 0:
            raise UnusableProfile("a curve divides by zero")
        d = -b / a
        e = f = values[3] if kind == 2 else 0.0
    else:
        c, d = values[3:5]
        e, f = values[5:] if kind == 4 else (0.0, 0.0)
    return np.where(x >= d, np.maximum(a * x + b, 0) ** g + e, c * x + f)


def _srgb_curve(light: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@lru_cache(maxsize=1)
def _srgb_light() -> npt.NDArray[np.float64]:
    x = np.linspace(0, 1, 65_536)
    return np.asarray(np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4))


def _quantised(levels: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    return np.asarray((np.clip(levels, 0, 1) * 65_535).round(), np.uint16)


def _bands(levels: Levels) -> Iterator[slice]:
    height, width = levels.shape[:2]
    rows = max(1, _BAND_PX // width)
    return (slice(top, top + rows) for top in range(0, height, rows))

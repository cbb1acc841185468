"""Typefaces for drawn text: the TrueType fonts inside the matplotlib wheel, so that nothing is downloaded.

DejaVu (Bitstream Vera licence), STIX (SIL Open Font Licence) and Computer Modern (BaKoMa licence). These licences
cover the font files; pictures of text set in them are free.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from PIL import ImageFont

from sr_platform.errors import InputDataError

SANS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "cmss10")
SERIF = (
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmr10",
    "cmb10",
)
MONOSPACED = ("DejaVuSansMono", "DejaVuSansMono-Bold", "cmtt10")
BOLD = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "STIXGeneralBol", "cmb10", "DejaVuSansMono-Bold")
ALL = SANS + SERIF + MONOSPACED


@functools.lru_cache(maxsize=256)
def font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    """A typeface at a size in px.

    Raises:
        InputDataError: matplotlib is not installed, or lies without its fonts.
    """
    # The basic layout, because the other one depends on a library that not every machine has.
    return ImageFont.truetype(fonts_path() / f"{name}.ttf", size_px, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def fonts_path() -> Path:
    """The folder of the fonts. Found without importing matplotlib, which would read the user's own settings."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise InputDataError(
            "fonts: matplotlib is not installed, and text is drawn with its fonts; pip install matplotlib"
        )
    path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    missing = [name for name in ALL if not (path / f"{name}.ttf").is_file()]
    if missing:
        raise InputDataError(f"fonts: {missing[0]}.ttf is missing from {path}; install another version of matplotlib")
    return path

"""What results are called: the sub-folders of the input, and a name from a template.

output_name("holidays/beach.JPG", template="{stem}_x{scale}{suffix}", wanted="same", scale=4, ...)
    -> "holidays/beach_x4.JPG"
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

from sr_platform.errors import InputDataError

Format = Literal["png", "jpeg", "webp", "tiff"]

_FORMATS: dict[str, Format] = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "jpeg"),
    ".png": "png",
    ".webp": "webp",
    **dict.fromkeys((".tif", ".tiff"), "tiff"),
}
_SUFFIXES: dict[Format, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "tiff": ".tif"}
_FIELDS = ("stem", "suffix", "scale", "seed", "steps")
_MAX_NAME_BYTES = 255


def written_format(path: str, wanted: str) -> Format:
    """`wanted`, or for "same" that of the input by the end of its name; png where results cannot have the same."""
    if wanted == "same":
        return _FORMATS.get(PurePosixPath(path).suffix.lower(), "png")
    return next(known for known in _SUFFIXES if known == wanted)


def check_template(template: str) -> None:
    """Raises ValueError, with what to change, when results could not be named by it."""
    known = ", ".join(f"{{{name}}}" for name in _FIELDS)
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        unknown = [name for name in fields if name not in _FIELDS]
        if unknown:
            raise ValueError(f"got {template!r}; {{{unknown[0]}}} is not one of {known}")
        _filled(template, stem="a", suffix=".png", scale=4, seed=0, steps=20)
    except (ValueError, LookupError, AttributeError) as error:
        message = str(error)
        raise ValueError(
            message if message.startswith("got ") else f"got {template!r} ({message}); it is made of text and {known}"
        ) from None
    if "/" in template or "\\" in template:
        raise ValueError(f"got {template!r}; folders are kept as they are, leave the slash out")
    if template.startswith("."):
        raise ValueError(f"got {template!r}; results are not hidden files, start it with something else than a dot")
    if "stem" not in fields:
        raise ValueError(f"got {template!r}; without {{stem}} all pictures of a folder would get one name, add it")
    if not template.endswith("{suffix}"):
        raise ValueError(f"got {template!r}; it must end with {{suffix}}, which tells the file's format")


def output_name(path: str, *, template: str, wanted: str, scale: int, seed: int, steps: int) -> str:
    """Of the result of the input at `path`, below the output."""
    folder, _, base = path.rpartition("/")
    stem, suffix = PurePosixPath(base).stem, PurePosixPath(base).suffix
    kept = wanted == "same" and suffix.lower() in _FORMATS
    suffix = suffix if kept else _SUFFIXES[written_format(path, wanted)]
    name = _filled(template, stem=stem, suffix=suffix, scale=scale, seed=seed, steps=steps)
    return f"{folder}/{name}" if folder else name


def name_problem(output: str) -> str:
    """Why no file can have this name, as "reason: detail"; empty where it can."""
    longest = max(output.split("/"), key=lambda part: len(os.fsencode(part)))
    size = len(os.fsencode(longest))
    if size <= _MAX_NAME_BYTES:
        return ""
    return f"name too long: {longest[:40]}... has {size} bytes, file systems take {_MAX_NAME_BYTES}; rename the input"


def refuse_collisions(outputs: Mapping[str, str]) -> None:
    """Raises InputDataError when two results would have one name, or one's name is another's folder.

    `outputs` are names of results by the paths of their inputs.
    """
    first: dict[str, str] = {}
    for path, output in outputs.items():
        if output in first:
            raise InputDataError(
                f"restore: {first[output]} and {path} would both become {output}; rename one, exclude one, "
                "or choose another name_template or output.format"
            )
        first[output] = path
    for path, output in outputs.items():
        for folder in _folders(output):
            if folder in first:
                raise InputDataError(
                    f"restore: {first[folder]} would become {folder}, which is a folder of the result of {path}; "
                    "rename one, exclude one, or choose another name_template"
                )


def _folders(name: str) -> Iterable[str]:
    parts = name.split("/")
    return ("/".join(parts[:n]) for n in range(1, len(parts)))


def _filled(template: str, **fields: Any) -> str:
    return string.Formatter().vformat(template, (), fields)

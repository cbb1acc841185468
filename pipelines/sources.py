"""Where pictures come from, what may be done with them, and which files of a published layout are meant.

A recipe names sources; what it leaves out is filled from the catalogue (`recipes/sources.yaml`) by name:

    sources:
      - {name: div2k, uri: "s3://pictures/DIV2K"}              # layout, licence and terms from the catalogue
      - {name: holidays, uri: "photographs/", licence: "own"}  # any folder
"""

from __future__ import annotations

import difflib
import functools
import re
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import pydantic
import yaml
from fsspec.utils import glob_translate

from sr_platform.config import RECIPES_PATH, StrictConfig, validate
from sr_platform.errors import ConfigError

# What macOS leaves in folders and archives.
_NEVER = ("**/__MACOSX/**", "**/._*")
CATALOGUE_PATH = RECIPES_PATH / "sources.yaml"


class QualityConfig(StrictConfig):
    """A threshold on a no-reference metric."""

    metric: str
    """Name of a pyiqa metric, such as topiq_nr-face."""
    minimum: float | None = None
    """Pictures below it are left out."""
    maximum: float | None = None
    """Pictures above it are left out; for metrics of which less is better, such as niqe."""
    weights: str = ""
    """Weights of the metric, as a file; empty: those that pyiqa fetches."""

    @pydantic.model_validator(mode="after")
    def _has_a_limit(self) -> QualityConfig:
        if self.minimum is None and self.maximum is None:
            raise ValueError(f"quality of {self.metric} has no limit; give minimum, or maximum where less is better")
        return self

    def accepts(self, score: float) -> bool:
        return (self.minimum is None or score >= self.minimum) and (self.maximum is None or score <= self.maximum)

    @property
    def wanted(self) -> str:
        """The limits in words, such as "at least 0.72"."""
        limits = [("at least", self.minimum), ("at most", self.maximum)]
        return " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)


class SourceConfig(StrictConfig):
    """A folder of pictures and archives of pictures, and what is known about it."""

    name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_-]+$")]
    """First part of the name of each of its pictures; the catalogue is searched for it."""
    uri: str = ""
    """A folder or one archive: a path, file:// or s3:// URI. A relative one lies below the job's input."""
    include: tuple[str, ...] = ("**",)
    """Which pictures are taken: patterns for the path below `uri`, in which an archive counts as a folder."""
    exclude: tuple[str, ...] = ()
    """Which of those are not. `**/` stands for any folders, `*` for anything within a name; case does not matter."""
    licence: str = ""
    """Licence of the pictures; it travels into the manifest. Empty, and not in the catalogue: unknown."""
    terms: str = ""
    """What the licence asks of those who use the pictures, in a sentence."""
    homepage: str = ""
    group: str = "nature"
    """What the recipe mixes by, such as nature and faces."""
    max_pictures: pydantic.PositiveInt | None = None
    """At most so many of them are used."""
    cut: Literal["tiles", "whole"] = "tiles"
    """Whether pictures are cut into tiles or kept whole."""
    resize_px: tuple[pydantic.PositiveInt, pydantic.PositiveInt] | None = None
    """Shortest and longest side that a whole picture is resized to; the side is drawn between them."""
    quality: QualityConfig | None = None

    @pydantic.field_validator("include", "exclude")
    @classmethod
    def _patterns_are_possible(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if any("**" in part and part != "**" for part in pattern.split("/")):
                raise ValueError(f"pattern {pattern!r}: ** stands for whole folders; write **/ or /**, or a single *")
        return patterns

    @pydantic.model_validator(mode="after")
    def _sizes_are_ordered(self) -> SourceConfig:
        if self.resize_px and self.resize_px[0] > self.resize_px[1]:
            raise ValueError(f"resize_px goes from {self.resize_px[0]} down to {self.resize_px[1]}; give (least, most)")
        return self

    def takes(self, path: str) -> bool:
        """Whether the picture at this path below the URI is one of the source's."""
        # The URI may name the folder that the layout is about, such as .../DIV2K_train_HR.
        inside = f"{PurePosixPath(self.uri).name}/{path}"
        included = _matches(self.include, path) or _matches(self.include, inside)
        return included and not _matches((*self.exclude, *_NEVER), path)

    def takes_nothing_below(self, folder: str) -> bool:
        """Whether `exclude` rules out everything in a folder or archive, so that it need not be looked into."""
        whole = [pattern for pattern in self.exclude if pattern.endswith("/**")]
        return _matches(whole, f"{folder}/\0")


def source_of(name: str) -> str:
    """The source of a picture, from its name "<source>/<path>"."""
    return name.partition("/")[0]


def resolve_sources(sources: Sequence[SourceConfig], catalogue: str | PathLike[str] = "") -> list[SourceConfig]:
    """The sources with what they leave out filled from the catalogue; the one that ships unless another is given.

    Raises:
        ConfigError: two sources share a name; a name is nearly one of the catalogue; the catalogue cannot be read.
    """
    known = read_catalogue(catalogue)
    repeated = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
    if repeated:
        raise ConfigError(f"sources: {repeated[0]!r} is given twice; pictures are named by their source, rename one")
    return [_filled(source, known) for source in sources]


def read_catalogue(path: str | PathLike[str] = "") -> dict[str, dict[str, Any]]:
    """Source name -> its other fields, checked. Raises ConfigError when it cannot be read."""
    path = Path(path) if path else CATALOGUE_PATH
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"sources: catalogue {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ConfigError(f"sources: catalogue {path} must be a mapping of names to settings")
    for name, entry in entries.items():
        validate(SourceConfig, {**entry, "name": name}, where=f"sources: catalogue {path}: {name}")
    return entries


def _filled(source: SourceConfig, known: dict[str, dict[str, Any]]) -> SourceConfig:
    # By value: the command line sets every field, most of them to their defaults.
    fields = SourceConfig.model_fields
    given = {name: value for name, value in source if value != fields[name].default}
    entry = known.get(source.name, {})
    if not entry and set(given) <= {"name", "uri"} and (close := difflib.get_close_matches(source.name, known, n=1)):
        raise ConfigError(
            f"sources: {source.name!r} is not in the catalogue; did you mean {close[0]!r}? "
            "If it is a source of your own, give its licence"
        )
    filled = SourceConfig.model_validate({**entry, **given})
    return filled if filled.licence else filled.model_copy(update={"licence": "unknown"})


def _matches(patterns: Sequence[str], path: str) -> bool:
    return any(_pattern(pattern).match(path) for pattern in patterns)


@functools.lru_cache(maxsize=1024)
def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(glob_translate(pattern), re.IGNORECASE)

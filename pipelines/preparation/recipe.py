"""The recipe of `prepare.py`: everything that decides what becomes of which pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import PurePosixPath
from typing import Annotated, Any

import pydantic

from faithdiff.degradation import find_recipe
from pipelines.preparation.ceiling import QuarantineConfig
from pipelines.sources import SourceConfig, resolve_sources
from pipelines.stages.caption import NOT_CONTENT as CAPTION_NOT_CONTENT
from pipelines.stages.caption import CaptionConfig
from pipelines.stages.crop import CropConfig
from pipelines.stages.degrade import DegradeConfig
from pipelines.stages.encode import EncodeConfig
from pipelines.stages.filter import FilterConfig
from pipelines.stages.workers import WorkersConfig
from sr_platform.config import StrictConfig
from sr_platform.errors import ConfigError

_NOT_CONTENT: Any = {"input", "out", "workers", "quarantine", "dry_run", "catalogue", "source", "sources"}


class PrepareConfig(StrictConfig):
    """From pictures to shards."""

    input: str = ""
    """Folder of pictures: a path, file:// or s3:// URI. Relative URIs of sources lie below it."""
    out: str
    """Where the dataset goes: a path, file:// or s3:// URI."""
    name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_-]+$")] = "data"
    """Shards are called <name>-000000.tar."""
    seed: pydantic.NonNegativeInt = 0
    """Everything random derives from it and the name of the picture."""
    samples_per_shard: pydantic.PositiveInt = 128
    """A shard is closed when it has this many crops; a picture's crops stay together. A task holds a whole shard in
    memory: about 7 MiB for each crop of 512 px."""
    source: SourceConfig = SourceConfig(name="pictures")
    """The one source of a recipe that lists none."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources; what they leave out is filled in from the catalogue by their names."""
    catalogue: str = ""
    """Licences, terms and layouts of known sources, as a YAML file; empty: pipelines/recipes/sources.yaml."""
    mixture: dict[str, pydantic.PositiveFloat] = pydantic.Field(default_factory=dict)
    """Group -> share of the draws in training, such as {nature: 0.875, faces: 0.125}; empty: as many as there are."""
    quarantine: QuarantineConfig = QuarantineConfig()
    filter: FilterConfig = FilterConfig()
    crop: CropConfig = CropConfig()
    caption: CaptionConfig = CaptionConfig()
    degrade: DegradeConfig = DegradeConfig()
    encode: EncodeConfig = EncodeConfig()
    workers: WorkersConfig = WorkersConfig()
    dry_run: bool = False
    """Print the plan with estimates from a small measured sample, and make nothing."""

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> PrepareConfig:
        if self.mixture and abs(sum(self.mixture.values()) - 1) > 1e-6:
            raise ValueError(f"mixture: shares add up to {sum(self.mixture.values()):g}; they must add up to 1")
        return self

    def resolved_sources(self) -> list[SourceConfig]:
        """Every source with its catalogue entry filled in and an absolute URI. Raises ConfigError for a wrong one."""
        filled = resolve_sources(self.sources or (self.source,), self.catalogue)
        if not self.sources:
            # The input of a single source is its own folder, not one that holds it.
            filled = [filled[0].model_copy(update={"uri": self.source.uri})]
        resolved = [source.model_copy(update={"uri": _below(self.input, source)}) for source in filled]
        self._check_cuts(resolved)
        self._check_mixture({source.group for source in resolved})
        return resolved

    def _check_cuts(self, sources: Sequence[SourceConfig]) -> None:
        tiled = [source for source in sources if source.cut == "tiles"]
        if tiled and self.filter.min_side_px < self.crop.size_px:
            raise ConfigError(
                f"prepare: filter.min_side_px is {self.filter.min_side_px}, smaller than crop.size_px "
                f"{self.crop.size_px}; raise the one or lower the other"
            )
        if small := [s.name for s in tiled if s.resize_px and s.resize_px[0] < self.crop.size_px]:
            raise ConfigError(
                f"prepare: {', '.join(small)} is resized to less than crop.size_px {self.crop.size_px} and then cut "
                "into tiles; raise resize_px, or cut it whole"
            )
        if self.encode.model and (whole := [s.name for s in sources if s.cut == "whole" or s.resize_px]):
            raise ConfigError(
                f"prepare: encode works on tiles of the training crop's size, and {', '.join(whole)} is cut whole or "
                "resized; leave encode.model empty or those sources out"
            )

    def _check_mixture(self, groups: Set[str]) -> None:
        if self.mixture and (other := sorted(set(self.mixture) ^ groups)):
            raise ConfigError(
                f"prepare: mixture names {', '.join(sorted(self.mixture))} and the sources are of "
                f"{', '.join(sorted(groups))}; give every group a share ({', '.join(other)})"
            )

    def recipe(self, sources: Sequence[SourceConfig], encoders: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The settings that decide the content of the shards; not where they lie or who works on them.

        `encoders` are the digests of the weights that encode, where the recipe encodes.
        """
        content = self.model_dump(mode="json", exclude=_NOT_CONTENT)
        content["caption"] = self.caption.model_dump(mode="json", exclude=CAPTION_NOT_CONTENT)
        content["degrade"]["content"] = find_recipe(self.degrade.recipe).as_dict()
        content["encode"]["weights"] = dict(encoders or {})
        content["sources"] = [source.model_dump(mode="json", exclude={"uri"}) for source in sources]
        return content


def _below(base: str, source: SourceConfig) -> str:
    """The source's URI, or the place that a relative one names below `base`. Raises ConfigError when there is none."""
    if "://" in source.uri or PurePosixPath(source.uri).is_absolute():
        return source.uri
    if not base:
        raise ConfigError(f"prepare: source {source.name} has no absolute uri; give one, or --input to find it below")
    return f"{base.rstrip('/') or '/'}/{source.uri}" if source.uri else base

"""Which pictures are used and which shard each goes to: decided by the driver, before a shard is begun.

In : the listing, what the survey measured, the recipe.
Out: `Plan`: for every picture its shard or the reason why it is left out; the same for the same inputs and recipe.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.preparation.duplicates import find_duplicates
from pipelines.sources import SourceConfig, source_of
from pipelines.stages.crop import CropConfig, num_crops
from pipelines.stages.filter import Facts, FilterConfig, judge
from pipelines.stages.ingest import Picture
from sr_platform.shards import Source, json_digest

PLAN_NAME = "plan.json"

CHOICES = frozenset(
    {
        "too small",
        "too flat",
        "too blurred",
        "low quality",
        "duplicate",
        "near duplicate",
        "not drawn",
        "crop too flat",
    }
)
"""Reasons that the recipe asks for. Every other reason means that something is wrong with the input."""


@dataclass(frozen=True)
class PlannedShard:
    """The pictures of one shard, in the order in which they are written."""

    index: int
    pictures: tuple[Picture, ...]
    num_crops: int
    """Before flat crops are left out."""


@dataclass(frozen=True)
class Plan:
    """What will be made."""

    recipe: dict[str, Any]
    pictures: Sequence[Picture]
    facts: Mapping[str, Facts]
    problems: Mapping[str, str]
    """Picture -> "reason: detail", for those that are left out."""
    shards: Sequence[PlannedShard]

    @property
    def sha256(self) -> dict[str, str]:
        """Contents of every picture that is used."""
        return {picture.name: self.facts[picture.name].sha256 for s in self.shards for picture in s.pictures}

    @property
    def digest(self) -> str:
        """Of everything that decides what the shards hold."""
        return json_digest([self.recipe, self._contents(self.pictures)])

    def record(self) -> dict[str, Any]:
        """What plan.json keeps: enough to recognise the same request, and to say how another differs."""
        return {
            "recipe": self.recipe,
            "num_pictures": len(self.pictures),
            "num_shards": len(self.shards),
            "contents_digest": json_digest(self._contents(self.pictures)),
            "listing_digest": listing_digest(self.pictures),
        }

    def sources(self, configs: Sequence[SourceConfig]) -> list[Source]:
        """The manifest's account of where pictures came from."""
        of: dict[str, list[Picture]] = {config.name: [] for config in configs}
        for picture in self.pictures:
            of[source_of(picture.name)].append(picture)
        return [
            Source(
                name=config.name,
                uri=config.uri,
                licence=config.licence or "unknown",
                terms=config.terms or "",
                homepage=config.homepage or "",
                group=config.group or "",
                num_pictures=len(of[config.name]),
                sha256=json_digest(self._contents(of[config.name])),
            )
            for config in configs
        ]

    def _contents(self, pictures: Sequence[Picture]) -> list[list[str]]:
        return [[picture.name, self.facts[picture.name].sha256 or picture.problem] for picture in pictures]


def listing_digest(pictures: Sequence[Picture]) -> str:
    """Changes when any file may have changed; tells without reading pictures that nothing did."""
    return json_digest([[p.name, p.size_bytes, p.fingerprint, p.problem] for p in pictures])


def make_plan(
    pictures: Sequence[Picture],
    facts: Mapping[str, Facts],
    sources: Sequence[SourceConfig],
    *,
    recipe: dict[str, Any],
    filter_cfg: FilterConfig,
    crop_cfg: CropConfig,
    seed: int,
    samples_per_shard: int,
) -> Plan:
    """Decides about every picture; `pictures` are in the order of the listing."""
    by_name = {source.name: source for source in sources}
    problems = {
        picture.name: problem
        for picture in pictures
        if (problem := judge(facts[picture.name], filter_cfg, by_name[source_of(picture.name)]))
    }
    good = [picture for picture in pictures if picture.name not in problems]
    problems |= _repeated(good, facts, filter_cfg.duplicate_bits)
    drawn = _drawn([p for p in good if p.name not in problems], seed)
    problems |= _beyond_limits(drawn, by_name)
    used = [picture for picture in drawn if picture.name not in problems]
    sizes = [_crops_of(facts[p.name], crop_cfg, by_name[source_of(p.name)]) for p in used]
    return Plan(recipe, pictures, facts, problems, _dealt(used, sizes, samples_per_shard))


def count_reasons(problems: Sequence[str]) -> Counter[str]:
    return Counter(problem.partition(": ")[0] for problem in problems)


def _repeated(pictures: Sequence[Picture], facts: Mapping[str, Facts], max_bits: int) -> dict[str, str]:
    """Pictures that repeat another; of equals the one with the most pixels stays, then the first listed."""
    order = sorted(
        range(len(pictures)), key=lambda i: -facts[pictures[i].name].height_px * facts[pictures[i].name].width_px
    )
    ranked = [pictures[index] for index in order]
    first: dict[str, str] = {}
    problems = {}
    for picture in ranked:
        kept = first.setdefault(facts[picture.name].sha256, picture.name)
        if kept != picture.name:
            problems[picture.name] = f"duplicate: the same file as {kept}"
    if max_bits < 0:
        return problems
    unique = [picture for picture in ranked if picture.name not in problems]
    originals = find_duplicates([facts[picture.name].phash for picture in unique], max_bits=max_bits)
    for picture, original in zip(unique, originals.tolist(), strict=True):
        if original >= 0:
            problems[picture.name] = f"near duplicate: looks like {unique[original].name}"
    return problems


def _drawn(pictures: Sequence[Picture], seed: int) -> list[Picture]:
    """In an order drawn from the seed: every shard becomes a small mixture, and limits take a fair draw."""
    return sorted(pictures, key=lambda p: hashlib.sha256(f"{seed} order {p.name}".encode()).digest())


def _beyond_limits(drawn: Sequence[Picture], sources: Mapping[str, SourceConfig]) -> dict[str, str]:
    taken: Counter[str] = Counter()
    problems = {}
    for picture in drawn:
        source = sources[source_of(picture.name)]
        taken[source.name] += 1
        if source.max_pictures is not None and taken[source.name] > source.max_pictures:
            problems[picture.name] = f"not drawn: source {source.name} gives at most {source.max_pictures} pictures"
    return problems


def _crops_of(facts: Facts, cfg: CropConfig, source: SourceConfig) -> int:
    return num_crops(facts.height_px, facts.width_px, cfg, source)


def _dealt(pictures: Sequence[Picture], sizes: Sequence[int], samples_per_shard: int) -> list[PlannedShard]:
    """Pictures in order, a shard closed when it has enough crops; a picture's crops stay together."""
    shards: list[PlannedShard] = []
    held: list[Picture] = []
    crops = 0
    for position, (picture, size) in enumerate(zip(pictures, sizes, strict=True)):
        held.append(picture)
        crops += size
        if crops >= samples_per_shard or position == len(pictures) - 1:
            shards.append(PlannedShard(len(shards), tuple(held), crops))
            held, crops = [], 0
    return shards

"""The plan is the same for the same inputs, takes every picture once or says why not, and deals even shards."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pipelines.preparation.plan import Plan, listing_digest, make_plan
from pipelines.sources import SourceConfig
from pipelines.stages.crop import CropConfig
from pipelines.stages.filter import Facts, FilterConfig
from pipelines.stages.ingest import Picture


def picture(name: str, **fields: Any) -> Picture:
    return Picture(name=name, place="{}", **{"size_bytes": 1, "fingerprint": "f", **fields})


def facts_of(name: str, number: int, **fields: Any) -> Facts:
    known = {"sha256": f"sha {name}", "height_px": 1024, "width_px": 1024, "deviation": 50.0, "sharpness": 100.0}
    return Facts(name, **{**known, "phash": f"{number * 7919:064x}", **fields})


def plan(facts: list[Facts], *sources: SourceConfig, seed: int = 0, **filter_settings: Any) -> Plan:
    return make_plan(
        [picture(fact.name) for fact in facts],
        {fact.name: fact for fact in facts},
        sources or (SourceConfig(name="a"),),
        recipe={},
        filter_cfg=FilterConfig(**{"duplicate_bits": -1, **filter_settings}),
        crop_cfg=CropConfig(size_px=512, max_per_picture=3),
        seed=seed,
        samples_per_shard=6,
    )


def dealt(made: Plan) -> list[list[str]]:
    return [[p.name for p in shard.pictures] for shard in made.shards]


def test_pictures_are_dealt_in_an_order_of_the_seed_to_shards_of_equally_many_crops() -> None:
    facts = [facts_of(f"a/{i}", i) for i in range(7)]
    made = plan(facts)
    assert [shard.num_crops for shard in made.shards] == [6, 6, 6, 3]
    assert sorted(name for names in dealt(made) for name in names) == [fact.name for fact in facts]
    assert dealt(plan(facts)) == dealt(made)
    assert dealt(plan(facts, seed=1)) != dealt(made)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"height_px": 511}, "too small: 1024x511 px, less than 512 px"),
        ({"deviation": 4.0}, "too flat: gray levels deviate by 4.0, less than 5.0"),
        ({"sharpness": 1.0}, "too blurred: sharpness 1.0, less than 2.0"),
        ({"problem": "unreadable: cut off"}, "unreadable: cut off"),
    ],
)
def test_a_picture_that_is_left_out_has_its_reason(change: dict[str, Any], problem: str) -> None:
    made = plan([facts_of("a/good", 1), facts_of("a/bad", 2, **change)], min_sharpness=2.0)
    assert made.problems == {"a/bad": problem}
    assert dealt(made) == [["a/good"]]


def test_of_equal_files_and_of_pictures_that_look_alike_the_largest_stays() -> None:
    facts = [
        facts_of("a/small", 1),
        facts_of("a/large", 2, height_px=2048, phash=f"{7919:064x}"),
        facts_of("a/copy", 3, sha256="sha a/large", height_px=2048),
        facts_of("a/other", 4, phash="f" * 64),
    ]
    made = plan(facts, duplicate_bits=4)
    assert made.problems == {
        "a/copy": "duplicate: the same file as a/large",
        "a/small": "near duplicate: looks like a/large",
    }
    assert plan(facts).problems == {"a/copy": "duplicate: the same file as a/large"}


def test_a_source_gives_no_more_than_its_limit_and_whole_pictures_count_as_one_crop() -> None:
    sources = SourceConfig(name="a"), SourceConfig(name="faces", group="faces", max_pictures=2, cut="whole")
    facts = [facts_of("a/1", 1), *(facts_of(f"faces/{i}", 10 + i) for i in range(5))]
    made = plan(facts, *sources)
    assert sum(name.startswith("faces/") for names in dealt(made) for name in names) == 2
    assert set(made.problems.values()) == {"not drawn: source faces gives at most 2 pictures"}
    assert sum(shard.num_crops for shard in made.shards) == 3 + 2
    assert [(s.name, s.group, s.num_pictures) for s in made.sources(sources)] == [
        ("a", "nature", 1),
        ("faces", "faces", 5),
    ]


def test_a_quality_threshold_counts_where_a_source_has_one() -> None:
    quality = {"metric": "topiq_nr-face", "minimum": 0.72}
    source = SourceConfig.model_validate({"name": "a", "quality": quality})
    made = plan([facts_of("a/1", 1, quality=0.8), facts_of("a/2", 2, quality=0.7)], source)
    assert made.problems == {"a/2": "low quality: topiq_nr-face 0.7000, not at least 0.72"}


def test_records_tell_other_contents_from_files_that_were_merely_touched() -> None:
    facts = [facts_of("a/1", 1)]
    before = plan(facts).record()
    changed = plan([dataclasses.replace(facts[0], sha256="other")]).record()
    assert before["contents_digest"] != changed["contents_digest"]
    assert listing_digest([picture("a/1")]) == before["listing_digest"]
    assert listing_digest([picture("a/1", fingerprint="g")]) != before["listing_digest"]

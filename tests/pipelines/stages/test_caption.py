"""Captions come from beside the picture, from its name, or from a model; never empty, never from the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.data

from faithdiff.captions import build_tiny_llava
from faithdiff.errors import InputError
from pipelines.stages.caption import (
    NOT_CONTENT,
    CaptionConfig,
    LlavaCaption,
    TextCaption,
    caption_from_name,
    caption_stage,
    check_captioner,
)
from pipelines.stages.caption_endpoint import EndpointConfig
from pipelines.stages.sample import Sample, read_table, to_table
from pipelines.stages.workers import WorkersConfig


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("old/red_motorcycle-2.jpg", "A photograph: red motorcycle"),
        ("DSC 0042 Harbour.png", "A photograph: dsc harbour"),
        ("0001x4.png", "A photograph"),
    ],
)
def test_a_name_gives_a_caption_that_claims_no_more_than_it_says(name: str, caption: str) -> None:
    assert caption_from_name(name) == caption


def test_the_text_beside_the_picture_wins_over_its_name(make_crop: Callable[..., Any]) -> None:
    crops = [make_crop(caption="A quiet harbour."), make_crop(), make_crop(problem="crop too flat: x", hq=b"")]
    rows = read_table(TextCaption()(to_table(crops)))
    assert [row.caption for row in rows] == ["A quiet harbour.", "A photograph", ""]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> CaptionConfig:
    path = build_tiny_llava(tmp_path_factory.mktemp("llava"))
    return CaptionConfig(mode="llava", model=str(path), dtype="float32", temperature=1.0, top_p=0.95, max_new_tokens=8)


def test_llava_captions_do_not_depend_on_the_batch_size(make_crop: Callable[..., Any], llava: CaptionConfig) -> None:
    crops = [make_crop(f"k{index}") for index in range(5)]
    crops.insert(2, make_crop("bad", problem="crop too flat: x", hq=b""))
    by_batch = [read_table(LlavaCaption(llava, seed=0, batch_size=n)(to_table(crops))) for n in (1, 2, 5)]
    assert by_batch[0] == by_batch[1] == by_batch[2]
    captions = [row.caption for row in by_batch[0] if not row.problem]
    assert len(set(captions)) == 5
    assert all(captions)
    assert by_batch[0][2] == crops[2]


def test_an_empty_answer_goes_to_quarantine(make_crop: Callable[..., Any], llava: CaptionConfig) -> None:
    captioner = LlavaCaption(llava, seed=0, batch_size=4)
    captioner.captioner = lambda pictures, *, keys, seed: [" "] * len(pictures)
    (row,) = read_table(captioner(to_table([make_crop()])))
    assert row.problem == "empty caption: the model said nothing, 4 times"


def test_a_picture_about_which_nothing_was_said_is_described_again(
    make_crop: Callable[..., Any], llava: CaptionConfig
) -> None:
    captioner = LlavaCaption(llava, seed=0, batch_size=2)
    asked: list[list[str]] = []

    def answer(pictures: list[np.ndarray], *, keys: list[str], seed: int) -> list[str]:
        asked.append(keys)
        return ["..." if key in ("k1", "k1 again 1") else f"The image shows {key}." for key in keys]

    captioner.captioner = answer
    rows = read_table(captioner(to_table([make_crop(f"k{index}") for index in range(3)])))
    assert [row.caption for row in rows] == ["K0.", "K1 again 2.", "K2."]
    assert asked == [["k0", "k1"], ["k2"], ["k1 again 1"], ["k1 again 2"]]


def test_a_caption_beside_the_picture_is_kept_unless_the_recipe_wants_it_new(
    make_crop: Callable[..., Any], llava: CaptionConfig
) -> None:
    table = to_table([make_crop("a", caption="A quiet harbour."), make_crop("b", caption=" "), make_crop("c")])
    kept = read_table(LlavaCaption(llava, seed=0, batch_size=4)(table))
    assert kept[0].caption == "A quiet harbour."
    all_new = llava.model_copy(update={"reuse_existing": False})
    new = read_table(LlavaCaption(all_new, seed=0, batch_size=4)(table))
    assert new[0].caption not in ("", "A quiet harbour.")
    assert [row.caption for row in new[1:]] == [row.caption for row in kept[1:]]


def test_the_words_that_the_model_opens_with_are_the_recipes_to_count(
    make_crop: Callable[..., Any], llava: CaptionConfig
) -> None:
    captioner = LlavaCaption(llava.model_copy(update={"opening_words": 0}), seed=0, batch_size=4)
    captioner.captioner = lambda pictures, *, keys, seed: ["a red barn. It is old. It stands."]
    (row,) = read_table(captioner(to_table([make_crop()])))
    assert row.caption == "A red barn. It is old."


def test_a_folder_without_a_model_is_named_before_any_work(tmp_path: Path) -> None:
    check_captioner(CaptionConfig())
    with pytest.raises(InputError, match="holds no LLaVA model"):
        check_captioner(CaptionConfig(mode="llava", model=str(tmp_path)))


ADDRESS = {"base_url": "http://host:8000/v1"}


@pytest.mark.parametrize(
    ("config", "together"),
    [
        ({"mode": "llava"}, "caption.mode and caption.model"),
        ({"mode": "text", "model": "x"}, "caption.mode and caption.model"),
        ({"mode": "endpoint", "endpoint": ADDRESS}, "caption.mode and caption.model"),
        ({"mode": "endpoint", "model": "x"}, "caption.mode and caption.endpoint.base_url"),
        ({"mode": "llava", "model": "x", "endpoint": ADDRESS}, "caption.mode and caption.endpoint.base_url"),
    ],
)
def test_mode_model_and_address_belong_together(config: dict[str, Any], together: str) -> None:
    with pytest.raises(ValueError, match=f"set {together} together"):
        CaptionConfig(**config)


def test_what_is_no_content_is_a_setting() -> None:
    assert set(CaptionConfig.model_fields) >= NOT_CONTENT


def test_only_a_stage_with_a_model_may_be_silent_for_long() -> None:
    endpoint = CaptionConfig(mode="endpoint", model="x", endpoint=EndpointConfig(**ADDRESS, give_up_after_s=7200))
    llava = CaptionConfig(mode="llava", model="x")
    assert CaptionConfig().longest_shard_s() == 0 < llava.longest_shard_s()
    assert endpoint.longest_shard_s() == llava.longest_shard_s() + 7200


@pytest.mark.ray
def test_an_actor_gives_the_captions_of_this_process(
    local_ray: None, make_crop: Callable[..., Any], llava: CaptionConfig
) -> None:
    tables = [to_table([make_crop(f"k{shard}-{index}", shard=shard) for index in range(3)]) for shard in range(2)]
    here = [row for table in tables for row in read_table(LlavaCaption(llava, seed=0, batch_size=1)(table))]
    workers = WorkersConfig(num_cpus=0.5, caption_batch_size=2)
    ds = caption_stage(ray.data.from_arrow(tables), llava, workers, seed=0)
    rows = [Sample(**row) for row in ds.iter_rows()]
    assert sorted(rows, key=lambda row: row.key) == here

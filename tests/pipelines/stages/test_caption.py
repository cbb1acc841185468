"""Captions come from beside the picture, from its name, or from a LLaVA model; never empty, never from the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from faithdiff.captions import build_tiny_llava
from pipelines.stages.caption import CaptionConfig, LlavaCaption, TextCaption, caption_from_name
from pipelines.stages.sample import read_table, to_table


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
    by_batch = [read_table(LlavaCaption(llava, seed=0, batch_size=n)(to_table(crops))) for n in (1, 4)]
    assert by_batch[0] == by_batch[1]
    captions = [row.caption for row in by_batch[0] if not row.problem]
    assert len(set(captions)) == 5
    assert all(captions)
    assert by_batch[0][2] == crops[2]


def test_an_empty_answer_goes_to_quarantine(make_crop: Callable[..., Any], llava: CaptionConfig) -> None:
    captioner = LlavaCaption(llava, seed=0, batch_size=4)
    captioner.captioner = lambda pictures, *, keys, seed: [" "] * len(pictures)
    (row,) = read_table(captioner(to_table([make_crop()])))
    assert row.problem == "empty caption: the model said nothing, 4 times"


@pytest.mark.parametrize("config", [{"mode": "llava"}, {"mode": "text", "model": "x"}])
def test_mode_and_model_belong_together(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"set caption.mode and caption.model together"):
        CaptionConfig(**config)

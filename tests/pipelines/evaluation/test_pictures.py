"""Pictures are found, paired and loaded as everywhere else, and what does not fit is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from faithdiff.degradation import degrade
from pipelines.evaluation.pictures import (
    EvaluationPicture,
    Place,
    all_problems,
    data_digest,
    list_pictures,
    load,
    outputs_of,
)
from pipelines.evaluation.protocol import EvaluateConfig
from pipelines.evaluation.text_reading import ILLEGIBLE, Word, dump_words
from sr_platform.config import validate
from sr_platform.errors import InputDataError


def config(folder: Path | str, kind: str = "hq", **changes: Any) -> EvaluateConfig:
    pictures = {"kind": kind, **changes.pop("pictures", {})}
    degradation = "level_I" if kind == "hq" else ""
    values = {"name": "t", "dataset": "d", "data": str(folder), "metrics": [{"name": "color_drift"}]}
    return validate(
        EvaluateConfig, {**values, "pictures": pictures, "degradation": degradation, **changes}, where="test"
    )


@pytest.fixture
def folder(tmp_path: Path, make_noise: Callable[..., np.ndarray]) -> Path:
    """hq pictures a and deep/b with a caption and words beside a."""
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    Image.fromarray(make_noise(40, 50)).save(data / "a.png")
    Image.fromarray(make_noise(41, 43)).save(data / "deep" / "b.jpg", quality=95)
    (data / "a.txt").write_text(" A cat.\n")
    (data / "a.words.json").write_bytes(dump_words([Word("cat", ((0, 0), (20, 0), (20, 10), (0, 10)))]))
    (data / "notes.md").write_text("no picture")
    return data


@pytest.fixture
def make_noise() -> Callable[..., np.ndarray]:
    return lambda height, width, seed=0: np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_a_folder_gives_names_without_suffixes_and_what_lies_beside(folder: Path) -> None:
    cfg = config(folder)
    a, b = list_pictures(cfg)
    assert (a.name, b.name) == ("a", "deep/b")
    assert EvaluationPicture.parse(a.dump()) == a
    loaded = load(a, cfg)
    assert (loaded.caption, loaded.words[0].text) == ("A cat.", "cat")
    assert np.array_equal(loaded.hq, np.asarray(Image.open(folder / "a.png"))[:, :48]), "cut to multiples of 4"
    assert np.array_equal(loaded.lq, degrade(loaded.hq, "level_I", key="a", seed=0))
    assert load(b, cfg).words is None
    assert load(a, config(folder, pictures={"captions": "none"})).caption == ""
    assert [p.name for p in list_pictures(config(folder, pictures={"max_pictures": 1}))] == ["a"]


def test_the_middle_is_cut_and_words_move_with_it(folder: Path) -> None:
    words = [Word("in", ((20, 20), (30, 20), (30, 25), (20, 25))), Word("cut", ((5, 20), (25, 20), (25, 25), (5, 25)))]
    words.append(Word("out", ((0, 0), (3, 0), (3, 3), (0, 3))))
    (folder / "a.words.json").write_bytes(dump_words(words))
    cfg = config(folder, pictures={"crop_px": 20})
    loaded = load(list_pictures(cfg)[0], cfg)
    assert loaded.hq.shape == (20, 20, 3)
    assert [word.text for word in loaded.words] == ["in", ILLEGIBLE]
    assert loaded.words[0].box == ((5, 10), (15, 10), (15, 15), (5, 15))
    with pytest.raises(InputDataError, match="a: is 50x40 px, smaller than 64 px"):
        load(list_pictures(cfg)[0], config(folder, pictures={"crop_px": 64}))


def test_the_digest_is_of_content_and_names(folder: Path) -> None:
    cfg = config(folder)

    def digest() -> str:
        return data_digest({picture.name: load(picture, cfg).digest for picture in list_pictures(cfg)})

    before = digest()
    (folder / "notes.md").write_text("changed")
    assert digest() == before
    (folder / "a.txt").write_text("A dog.")
    changed = digest()
    assert changed != before
    (folder / "a.png").rename(folder / "c.png")
    assert digest() not in (before, changed)


@pytest.fixture
def pairs(tmp_path: Path, make_noise: Callable[..., np.ndarray]) -> Path:
    for name in ("a", "b"):
        for role, side in (("hq", 32), ("lq", 8)):
            path = tmp_path / "pairs" / role / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(make_noise(side, side)).save(path)
    return tmp_path / "pairs"


def test_pairs_are_pairs_by_name(pairs: Path) -> None:
    cfg = config(pairs, "pairs")
    assert [p.name for p in list_pictures(cfg)] == ["a", "b"]
    assert load(list_pictures(cfg)[0], cfg).lq.shape == (8, 8, 3)
    (pairs / "lq" / "b.png").rename(pairs / "lq" / "B.png")
    with pytest.raises(InputDataError, match=r"2 pictures have no partner .*: hq/b, lq/B; hq/a\.png belongs"):
        list_pictures(cfg)


def test_a_prepared_dataset_is_pairs_with_captions(prepared_dataset: str) -> None:
    cfg = config(prepared_dataset, "pairs")
    pictures = list_pictures(cfg)
    assert len(pictures) == 12
    loaded = load(pictures[0], cfg)
    assert loaded.hq.shape == (64, 72, 3)
    assert loaded.caption == "picture 0 of shard 0"
    with pytest.raises(InputDataError, match="is a prepared dataset, which holds pairs"):
        list_pictures(config(prepared_dataset))


def test_low_quality_pictures_need_no_partner(folder: Path) -> None:
    cfg = config(folder, "lq", restoration={"scale": 2})
    loaded = load(list_pictures(cfg)[0], cfg)
    assert loaded.hq is None
    assert loaded.lq.shape == (40, 50, 3)


def test_sizes_that_do_not_fit_are_told_with_the_name(pairs: Path) -> None:
    cfg = config(pairs, "pairs", restoration={"scale": 2})
    with pytest.raises(InputDataError, match="a: hq is 32x32 px and lq 8x8 px, which is not 2 times smaller"):
        load(list_pictures(cfg)[0], cfg)


def test_a_damaged_picture_is_told_with_its_name(folder: Path) -> None:
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:300])
    cfg = config(folder)
    with pytest.raises(InputDataError, match="a: its hq picture cannot be read"):
        load(list_pictures(cfg)[0], cfg)


@pytest.mark.parametrize("what", ["empty", "no pictures", "absent"])
def test_a_folder_without_pictures_is_refused(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "nothing"
    if what != "absent":
        folder.mkdir()
    if what == "no pictures":
        (folder / "a.json").write_text(json.dumps({}))
    with pytest.raises(InputDataError, match="nothing holds no picture"):
        list_pictures(config(folder))


def test_two_pictures_of_one_name_are_refused(folder: Path) -> None:
    shutil.copy(folder / "a.png", folder / "a.webp")
    with pytest.raises(InputDataError, match=r"a\.png and a\.webp have one name"):
        list_pictures(config(folder))


def test_outputs_of_others_are_found_by_name_whatever_their_suffix(folder: Path) -> None:
    found, unknown = outputs_of("SeeSR", str(folder), ["deep/b", "c"])
    assert found == {"deep/b": Place(str(folder), "deep/b.jpg")}
    assert unknown == ["a"]
    with pytest.raises(
        InputDataError, match=r"--method SeeSR=.*: holds a, deep/b, and none of the data's names \(c, d\)"
    ):
        outputs_of("SeeSR", str(folder), ["c", "d"])


def test_all_problems_are_told_at_once() -> None:
    problems = {f"p{i}": f"p{i}: damaged" for i in range(7)}
    message = str(all_problems(problems, 9, "/data"))
    assert message.startswith("evaluate: 7 of 9 pictures of /data cannot be used: p0: damaged; p1: damaged")
    assert "and 2 more" in message

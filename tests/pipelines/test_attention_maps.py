import json

import numpy as np
import pytest
from PIL import Image
from skimage import data

from faithdiff.errors import InputError
from faithdiff.pipeline import FaithDiffPipeline
from pipelines.attention_maps import device_of, file_stem, main, sheet
from sr_platform.errors import ConfigError

PROMPT = "a cat on a stone wall"


def flags(photo, out, *words, **changed):
    settings = {"model": "nano", "input": photo, "prompt": PROMPT, "out": out, "scale": 1}
    settings |= {"num_inference_steps": 1, "tile_px": 64, **changed}
    named = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return [*named, "--words", *words]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "cat.png"
    Image.fromarray(data.chelsea()).resize((72, 56)).save(path)
    return path


@pytest.fixture(scope="module")
def made(photo, tmp_path_factory):
    out = tmp_path_factory.mktemp("attention")
    main(flags(photo, out, "cat", "stone wall"))
    return out


def test_every_word_gets_an_overlay_of_the_pictures_size(made):
    names = sorted(path.name for path in made.iterdir())
    assert names == [
        "1_cat.png",
        "2_stone_wall.png",
        "attention_maps.json",
        "attention_maps.npz",
        "restored.png",
        "sheet.png",
    ]
    for name in ("1_cat.png", "2_stone_wall.png", "restored.png"):
        with Image.open(made / name) as image:
            assert image.size == (72, 56)
    with Image.open(made / "sheet.png") as image:
        assert image.width == 3 * 360 + 4 * 16


def test_the_restored_picture_is_the_one_without_maps(made, photo):
    with Image.open(photo) as lq:
        plain = FaithDiffPipeline.from_pretrained("nano")(
            lq.convert("RGB"), 1, PROMPT, num_inference_steps=1, tile_px=64
        )
    with Image.open(made / "restored.png") as restored:
        assert np.array_equal(np.asarray(restored), np.asarray(plain.image))


def test_shares_and_settings_are_kept_as_numbers(made):
    arrays = np.load(made / "attention_maps.npz")
    about = json.loads((made / "attention_maps.json").read_text())
    assert arrays["words"].tolist() == ["cat", "stone wall"] == list(about["shares"])
    assert arrays["shares"].shape == (2, 7, 9)
    assert 0 < about["shares"]["cat"]["least"] <= about["shares"]["cat"]["greatest"] < 1
    assert about["shares"]["cat"]["mean"] == pytest.approx(float(arrays["shares"][0].mean()))
    assert about["settings"]["prompt"] == PROMPT


def test_wrong_requests_are_refused_before_anything_is_written(photo, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="'dog' is not a word of the prompt"):
        main(flags(photo, out, "cat", "dog"))
    with pytest.raises(InputError, match="not a picture"):
        main(flags(tmp_path / "none.png", out, "cat"))
    with pytest.raises(InputError, match="num_inference_steps"):
        main(flags(photo, out, "cat", num_inference_steps=1001))
    with pytest.raises(ConfigError, match="prompt"):
        main(flags(photo, out, "cat", prompt=""))
    assert not out.exists()


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert (device_of("auto"), device_of("cpu")) == ("cpu", "cpu")
    with pytest.raises(InputError, match="no GPU that torch can use"):
        device_of("cuda")


def test_sheets_and_file_names_take_any_picture_and_word():
    assert sheet({"a": Image.new("RGB", (4000, 10)), "b": Image.new("RGB", (4, 4))}).height > 34
    assert file_stem("../a cat/") == "_a_cat_"

"""Synthesizing is deterministic, exactly once, any number, and refuses to mix."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.contact_sheet import CONTACT_SHEET_NAME
from pipelines.synthesize import PLAN_NAME, Synthesize, SynthesizeConfig, main, synthesize
from sr_platform.config import validate
from sr_platform.errors import ConfigError
from sr_platform.sample_reader import SampleReader
from sr_platform.shards import read_manifest


def config(out: Path, num_images: int = 7, **changes: Any) -> SynthesizeConfig:
    values = {"out": str(out), "num_images": num_images, "size_px": 64, "images_per_shard": 3, **changes}
    return validate(SynthesizeConfig, values, where="test")


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def members(cfg: SynthesizeConfig, number: int) -> dict[str, bytes]:
    return Synthesize(cfg.model_dump(mode="json")).draw(number)[1]


@pytest.mark.ray
def test_the_same_bytes_for_any_number_of_workers_and_after_a_crash(
    tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    one = synthesize(config(tmp_path / "one", num_cpus=6))
    assert one.num_samples == 7
    assert one.licences == ["CC0-1.0"]
    assert one.counts == {"pictures": 7, "samples": 7}
    assert "pictures     7" in capsys.readouterr().out

    # A run that was killed after its second shard, while it wrote its third.
    two = config(tmp_path / "two", num_cpus=0.5)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / PLAN_NAME).write_text(json.dumps({"recipe": two.recipe()}))
    Synthesize(two.model_dump(mode="json")).publish(1)
    published = tmp_path / "two" / "shards" / "synthetic-000001.tar"
    written_at = published.stat().st_mtime_ns
    (tmp_path / "two" / "shards" / "synthetic-000002.tar").write_bytes(b"cut off")
    assert synthesize(two) == one
    assert published.stat().st_mtime_ns == written_at
    assert contents(tmp_path / "one") == contents(tmp_path / "two")

    assert synthesize(config(tmp_path / "one")) == one
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"was made with other settings \(num_images, seed\)"):
        synthesize(config(tmp_path / "one", num_images=8, seed=1))


@pytest.mark.ray
def test_a_single_picture_that_is_not_square(tmp_path: Path, local_ray: None) -> None:
    synthesize(config(tmp_path, num_images=1, height_px=96, mixture={"dead_leaves": 0, "textures": 0}))
    reader = SampleReader(str(tmp_path))
    assert reader.keys == ["synthetic-000000"]
    about = json.loads(reader[0]["json"])
    assert about["size"] == [96, 64]
    assert (about["kind"], about["seed"], about["number"]) == ("text", 0, 0)
    assert about["caption"]
    assert all(line["string"] and len(line["box"]) == 4 for line in about["text"])
    with Image.open(io.BytesIO(reader[0]["png"])) as image:
        assert image.size == (64, 96)
    assert (tmp_path / CONTACT_SHEET_NAME).is_file()


def test_a_picture_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    few, many = config(tmp_path), config(tmp_path / "other", num_images=1000, images_per_shard=64, name="more")
    for number in range(4):
        assert members(few, number) == members(many, number)
    assert members(few, 0)["png"] != members(config(tmp_path, seed=1), 0)["png"]
    assert [few.numbers(shard) for shard in range(few.num_shards)] == [range(3), range(3, 6), range(6, 7)]


def test_the_place_of_another_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds another dataset; choose an empty place"):
        synthesize(config(tmp_path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-images", "0"], "num_images: got 0; input should be greater than 0"),
        (["--num-images", "2", "--size-px", "510"], "size_px: got 510; input should be a multiple of 4"),
        (["--num-images", "2", "--size-px", "32"], "size_px: got 32; input should be greater than or equal to 64"),
        (["--num-images", "2", "--name", "a.b"], "name: got 'a.b'"),
        (["--num-imags", "2"], "num-images"),
    ],
)
def test_wrong_flags_are_named_at_once(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "python pipelines/synthesize.py --out out/synthetic --num-images 1000" in text
    assert "--mixture.dead-leaves" in text


@pytest.mark.ray
def test_a_manifest_without_its_shards_is_made_again(tmp_path: Path, local_ray: None) -> None:
    cfg = config(tmp_path, num_images=2, images_per_shard=1)
    before = synthesize(cfg)
    (tmp_path / before.shards[1].name).unlink()
    (tmp_path / CONTACT_SHEET_NAME).unlink()
    assert synthesize(cfg) == before == read_manifest(str(tmp_path))
    assert len(contents(tmp_path)) == 7

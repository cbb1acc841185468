"""Preparing is deterministic, leaves nothing unaccounted, does nothing twice and refuses what it cannot do."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.data

from faithdiff.captions import build_tiny_llava
from faithdiff.degradation import PASD, degrade
from faithdiff.encodings import Encoding
from pipelines.preparation.recipe import PrepareConfig
from pipelines.prepare import main, prepare
from pipelines.synthesize import SynthesizeConfig, synthesize
from sr_platform.cluster import REPOSITORY_PATH
from sr_platform.config import read_recipe, validate
from sr_platform.errors import ConfigError, InputDataError
from sr_platform.sample_reader import SampleReader
from sr_platform.shards import Manifest, read_manifest
from sr_platform.storage import open_storage
from sr_platform.verification import verify_dataset

RECIPE: dict[str, Any] = {
    "name": "test",
    "samples_per_shard": 5,
    "filter": {"min_side_px": 64},
    "crop": {"size_px": 32, "max_per_picture": 3},
}


def config(folder: Path | str, out: Path | str, **changes: Any) -> PrepareConfig:
    return validate(PrepareConfig, {**RECIPE, "input": str(folder), "out": str(out), **changes}, where="test")


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def content(out: Path) -> dict[str, bytes]:
    """Without what knows the times of the input files."""
    return {name: data for name, data in contents(out).items() if name not in ("plan.json", "survey.parquet")}


@pytest.mark.ray
def test_shards_and_digest_do_not_depend_on_workers_or_batches_and_nothing_is_lost(
    picture_folder: Path, tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    one = prepare(config(picture_folder, tmp_path / "one", workers={"num_cpus": 6.0}))
    two = prepare(config(picture_folder, tmp_path / "two", workers={"num_cpus": 0.5, "caption_batch_size": 3}))
    assert one == two
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert_everything_is_accounted_for(tmp_path / "one", one)
    assert "samples      15" in capsys.readouterr().out

    again = prepare(config(picture_folder, tmp_path / "one", workers={"num_cpus": 2.0}))
    assert again == one
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"was made with other settings \(crop.max_per_picture, seed\)"):
        prepare(config(picture_folder, tmp_path / "one", seed=1, crop={"size_px": 32, "max_per_picture": 2}))
    (picture_folder / "flat.png").touch()
    assert prepare(config(picture_folder, tmp_path / "one")) == one
    (picture_folder / "small.png").unlink()
    with pytest.raises(ConfigError, match=r"was made with other pictures \(9 then, 8 now\)"):
        prepare(config(picture_folder, tmp_path / "one"))
    assert content(tmp_path / "one") == content(tmp_path / "two")


def assert_everything_is_accounted_for(out: Path, manifest: Manifest) -> None:
    rejected = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    reasons = {line["source"]: line["reason"] for line in rejected}
    assert reasons == {
        "pictures/flat.png": "too flat",
        "pictures/small.png": "too small",
        "pictures/truncated.png": "unreadable",
        "pictures/zero.jpg": "unreadable",
    }
    assert manifest.counts == {
        "pictures": 9,
        "samples": 15,
        "quarantined: too flat": 1,
        "quarantined: too small": 1,
        "quarantined: unreadable": 2,
    }
    reader = SampleReader(str(out))
    abouts = [json.loads(reader[index]["json"]) for index in range(len(reader))]
    assert {about["source"] for about in abouts} == {
        "pictures/deep/0.png",
        *(f"pictures/red_house_{i}.png" for i in range(4)),
    }
    assert {about["caption"] for about in abouts} == {"A quiet harbour.", "A photograph: red house"}
    assert len(set(reader.keys)) == 15
    assert verify_dataset(str(out)) == []
    assert_a_sample_can_be_made_again(reader)


def assert_a_sample_can_be_made_again(reader: SampleReader) -> None:
    import cv2
    import numpy as np

    def pixels(data: bytes) -> np.ndarray:
        return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)

    sample = reader[7]
    seed = json.loads(sample["json"])["seed"]
    lq = degrade(pixels(sample["hq.png"]), PASD, key=reader.keys[7], seed=seed)
    np.testing.assert_array_equal(lq, pixels(sample["lq.png"]))


@pytest.mark.ray
def test_the_size_of_blocks_changes_nothing(
    picture_folder: Path, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = prepare(config(picture_folder, tmp_path / "large"))
    monkeypatch.setattr("pipelines.preparation.survey._PICTURES_PER_PART", 2)
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1000
    with ray.data.DataContext.current(context):
        assert prepare(config(picture_folder, tmp_path / "small")) == large
    assert content(tmp_path / "small") == content(tmp_path / "large")


@pytest.mark.ray
def test_an_interrupted_run_redoes_only_what_is_unfinished(
    picture_folder: Path, tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(picture_folder, tmp_path / "out")
    sources = cfg.resolved_sources()
    whole = prepare(config(picture_folder, tmp_path / "whole"))
    out = open_storage(cfg.out)
    half_done(cfg)
    kept = (tmp_path / "out" / "shards" / "test-000001.tar").stat()
    assert not out.exists("manifest.json")
    capsys.readouterr()
    assert prepare(cfg) == whole
    assert f"1 of {len(whole.shards)} shards are there already" in capsys.readouterr().out
    assert (tmp_path / "out" / "shards" / "test-000001.tar").stat().st_ino == kept.st_ino
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert [source.name for source in sources] == ["pictures"]


def half_done(cfg: PrepareConfig) -> None:
    """What a run leaves behind that was killed after its second shard."""
    from pipelines.preparation.ceiling import Ceiling
    from pipelines.preparation.passes import make_shards, plan_of, quiet_ray_data, survey_pictures
    from pipelines.stages.ingest import list_pictures
    from sr_platform.publication import json_lines

    out, sources = open_storage(cfg.out), cfg.resolved_sources()
    pictures = list_pictures(sources, open_storage(f"{out.uri}/listing"))
    ceiling = Ceiling(cfg.quarantine, len(pictures), out)
    with quiet_ray_data():
        plan = plan_of(cfg, sources, pictures, survey_pictures(cfg, sources, pictures, ceiling), cfg.recipe(sources))
        out.write_bytes_atomic("plan.json", json_lines([plan.record()]))
        make_shards(cfg, sources, dataclasses.replace(plan, shards=plan.shards[1:2]), ceiling)


@pytest.mark.ray
def test_a_picture_that_changes_while_the_job_runs_stops_it(
    picture_folder: Path, picture_file: Callable[..., bytes], tmp_path: Path, local_ray: None
) -> None:
    from pipelines.preparation.ceiling import Ceiling
    from pipelines.preparation.passes import make_shards, plan_of, quiet_ray_data, survey_pictures
    from pipelines.stages.ingest import list_pictures

    cfg = config(picture_folder, tmp_path / "out")
    out, sources = open_storage(cfg.out), cfg.resolved_sources()
    pictures = list_pictures(sources, open_storage(f"{out.uri}/listing"))
    ceiling = Ceiling(cfg.quarantine, len(pictures), out)
    with quiet_ray_data():
        plan = plan_of(cfg, sources, pictures, survey_pictures(cfg, sources, pictures, ceiling), cfg.recipe(sources))
        (picture_folder / "red_house_1.png").write_bytes(picture_file(90, 90, 77))
        with pytest.raises(InputDataError, match=r"red_house_1\.png.*changed"):
            make_shards(cfg, sources, plan, ceiling)
    assert not out.exists("manifest.json")


@pytest.mark.ray
def test_variants_groups_and_kept_parameters_reach_the_shards(
    picture_folder: Path, tmp_path: Path, local_ray: None
) -> None:
    (tmp_path / "faces").mkdir()
    for index in range(3):
        shutil.copy(picture_folder / f"red_house_{index}.png", tmp_path / "faces" / f"{index}.png")
        (picture_folder / f"red_house_{index}.png").unlink()
    sources = [
        {"name": "houses", "uri": "pictures", "licence": "CC0"},
        {"name": "people", "uri": "faces", "licence": "own", "group": "faces", "cut": "whole", "resize_px": [64, 96]},
    ]
    cfg = config(
        tmp_path,
        tmp_path / "out",
        sources=sources,
        mixture={"nature": 0.75, "faces": 0.25},
        degrade={"variants": 2, "keep_parameters": True},
    )
    manifest = prepare(cfg)
    assert (manifest.mixture, manifest.licences) == ({"faces": 0.25, "nature": 0.75}, ["CC0", "own"])
    reader = SampleReader(str(tmp_path / "out"))
    assert {name: len(indices) for name, indices in reader.groups.items()} == {"nature": 6, "faces": 3}
    face = reader[int(reader.groups["faces"][0])]
    assert set(face) == {"hq.png", "lq.png", "lq1.png", "json"}
    about = json.loads(face["json"])
    assert 64 <= about["size"][0] <= 96
    assert len(about["degradation"]) == 2


@pytest.mark.ray
@pytest.mark.parametrize(
    "splits", [((1, 1), (4, 8)), pytest.param(((1, 1), (2, 3), (3, 5), (4, 2)), marks=pytest.mark.soak)], ids=str
)
def test_a_model_captions_every_crop_alike_for_any_number_of_workers_and_any_batch(
    picture_folder: Path, tmp_path: Path, local_ray: None, splits: tuple[tuple[int, int], ...]
) -> None:
    model = build_tiny_llava(tmp_path / "llava")
    caption = {"mode": "llava", "model": str(model), "dtype": "float32", "max_new_tokens": 8, "temperature": 1.0}
    settings = {"caption": caption, "samples_per_shard": 3, "degrade": {"variants": 2}}
    manifests = []
    for workers, batch_size in splits:
        resources = {"num_cpus": 3 / workers, "caption_actors": workers, "caption_batch_size": batch_size}
        out = tmp_path / f"{workers}-{batch_size}"
        manifests.append(prepare(config(picture_folder, out, workers=resources, **settings)))
        assert content(out) == content(tmp_path / "1-1")
    assert len({manifest.digest for manifest in manifests}) == 1
    assert len(manifests[0].shards) == 5
    reader = SampleReader(str(tmp_path / "1-1"))
    captions = [json.loads(found["json"])["caption"] for found in reader.read_many(range(len(reader)), ["json"])]
    assert "A quiet harbour." in captions
    assert len(set(captions)) > 5
    assert all(captions)


@pytest.mark.ray
def test_samples_are_encoded_where_the_recipe_names_a_model(
    picture_folder: Path, tmp_path: Path, local_ray: None
) -> None:
    cfg = config(picture_folder, tmp_path / "out", encode={"model": "nano"}, samples_per_shard=50)
    manifest = prepare(cfg)
    assert set(manifest.recipe["encode"]["weights"]) == {"vae", "text"}
    reader = SampleReader(str(tmp_path / "out"))
    encodings = [Encoding.from_bytes(found["latents.safetensors"]) for found in reader.read_many(range(15))]
    assert {tuple(encoding.mean.shape) for encoding in encodings} == {(2, 4, 4, 4)}
    weights = manifest.recipe["encode"]["weights"]
    assert (encodings[0].digests.vae, encodings[0].digests.text) == (weights["vae"], weights["text"])


def test_tiles_of_pictures_that_are_resized_below_a_tile_are_refused(picture_folder: Path, tmp_path: Path) -> None:
    source = {"name": "pictures", "resize_px": [16, 64]}
    with pytest.raises(ConfigError, match=r"pictures is resized to less than crop\.size_px 32"):
        prepare(config(picture_folder, tmp_path / "out", source=source))


@pytest.mark.ray
def test_shards_of_another_plan_are_not_taken_even_if_the_plan_itself_is_gone(
    picture_folder: Path, tmp_path: Path, local_ray: None
) -> None:
    half_done(config(picture_folder, tmp_path / "out", seed=7))
    (tmp_path / "out" / "plan.json").unlink()
    (tmp_path / "out" / "shards" / ".unfinished-0").write_bytes(b"of a killed writer")
    assert prepare(config(picture_folder, tmp_path / "out")) == prepare(config(picture_folder, tmp_path / "whole"))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.ray
def test_too_many_bad_pictures_stop_the_job_and_are_listed(
    picture_folder: Path, tmp_path: Path, local_ray: None
) -> None:
    for index in range(12):
        (picture_folder / f"bad{index}.jpg").write_bytes(b"no picture")
    ceiling = {"max_fraction": 0.5, "always_allowed": 3}
    with pytest.raises(InputDataError, match=r"of 21 pictures are bad so far \(.*, and 10 are allowed; .*mend them or"):
        prepare(config(picture_folder, tmp_path / "out", quarantine=ceiling))
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) > 10
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = prepare(config(picture_folder, tmp_path / "out", quarantine={"max_fraction": 0.9}))
    assert manifest.counts["quarantined: unreadable"] == 14


@pytest.mark.ray
def test_webdataset_shards_are_a_source_whose_captions_and_texts_travel_along(tmp_path: Path, local_ray: None) -> None:
    synthesize(SynthesizeConfig(out=str(tmp_path / "drawn"), num_images=6, size_px=96, images_per_shard=4))
    manifest = prepare(config(tmp_path / "drawn", tmp_path / "out"))
    assert manifest.counts["pictures"] == 6
    reader = SampleReader(str(tmp_path / "out"))
    abouts = [json.loads(found["json"]) for found in reader.read_many(range(len(reader)), ["json"])]
    assert {about["source"].rpartition("/")[0] for about in abouts} == {
        f"pictures/shards/synthetic-00000{index}.tar" for index in (0, 1)
    }
    assert all(about["meta"]["kind"] and about["caption"] for about in abouts)
    assert any(line["string"] for about in abouts for line in about["meta"]["text"])


def test_encoding_together_with_resized_sources_is_refused(picture_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pictures is cut whole or resized"):
        prepare(
            config(
                picture_folder, tmp_path / "out", encode={"model": "nano"}, source={"name": "pictures", "cut": "whole"}
            )
        )


def test_a_missing_llava_model_is_named_before_anything_is_begun(picture_folder: Path, tmp_path: Path) -> None:
    caption = {"mode": "llava", "model": str(tmp_path / "nothing")}
    with pytest.raises(ValueError, match="holds no LLaVA model"):
        prepare(config(picture_folder, tmp_path / "out", caption=caption))
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_pictures_of_which_none_is_usable_leave_nothing_behind(tmp_path: Path, local_ray: None) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputDataError, match=r"holds no usable picture \(1 unreadable; pictures/a.png: not a picture"):
        prepare(config(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_the_command_works_from_s3_to_s3_in_a_process_of_its_own(picture_folder: Path, s3_uri: str) -> None:
    source = open_storage(f"{s3_uri}/pictures")
    for name, data in contents(picture_folder).items():
        source.write_bytes_atomic(name, data)
    args = ["prepare_nano.yaml", "--input", source.uri, "--out", f"{s3_uri}/data", "--crop.size-px", "64"]
    done = run_command([*args, "--filter.min-side-px", "64", "--source.licence", "CC0"])
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(f"{s3_uri}/data")
    assert manifest.licences == ["CC0"]
    assert len(SampleReader(f"{s3_uri}/data")) == manifest.num_samples == 7
    assert f"manifest     {s3_uri}/data/manifest.json" in done.stdout


def run_command(args: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY_PATH / "pipelines" / "prepare.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=dict(os.environ), check=False)


def test_a_wrong_request_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = run_command(["prepare_nano.yaml", "--input", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"prepare: source pictures: {tmp_path}/nowhere holds nothing, or does not exist")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("seeed: 1", "did you mean 'seed'"),
        ("crop: {size_px: 100}", "crop.size_px: got 100; .*multiple of 32"),
        ("degrade: {recipe: pazd}", "no recipe 'pazd'.*did you mean 'pasd'"),
        ("caption: {mode: llava}", "modes llava and endpoint need a model"),
        ("filter: {min_side_px: 100}", "smaller than crop.size_px 512"),
        ("samples_per_shard: 0", "samples_per_shard: got 0"),
        ("name: a/b", "name: got 'a/b'"),
        ("- 1", "must be a mapping"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_setting_and_what_is_allowed(
    recipe: str, message: str, picture_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(ConfigError, match=message):
        main([str(path), "--input", str(picture_folder), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["prepare_nano.yaml", "prepare_sdxl.yaml", "prepare_validation.yaml"])
def test_shipped_recipes_are_complete_and_valid(name: str) -> None:
    recipe = read_recipe(name, job="prepare")
    cfg = validate(PrepareConfig, {**recipe, "input": "in", "out": "out"}, where=name)
    assert {"filter", "crop", "caption", "degrade", "workers"} <= set(recipe)
    assert all(source.licence for source in cfg.resolved_sources())
    assert cfg.degrade.recipe == ("level_II" if "validation" in name else "pasd")


def test_uris_come_from_the_recipe_the_catalogue_or_the_input(tmp_path: Path) -> None:
    def uris(**settings: Any) -> list[str]:
        cfg = validate(PrepareConfig, {**RECIPE, "out": "out", **settings}, where="test")
        return [source.uri for source in cfg.resolved_sources()]

    own = {"name": "own", "uri": "s3://bucket/own", "licence": "CC0"}
    named = {"name": "div2k"}
    assert uris(input="/raw", sources=[named, own]) == ["/raw/DIV2K", "s3://bucket/own"]
    assert uris(input="raw", sources=[{"name": "div2k", "uri": "elsewhere"}]) == ["raw/elsewhere"]
    assert uris(input="/raw/my_div2k", source=named) == ["/raw/my_div2k"]
    assert uris(source={"name": "a", "uri": "/raw/a"}) == ["/raw/a"]
    with pytest.raises(ConfigError, match="source div2k has no absolute uri; give one, or --input"):
        uris(sources=[named])


def test_an_output_inside_the_input_is_refused(picture_folder: Path) -> None:
    with pytest.raises(ConfigError, match="lies inside source pictures; choose a place outside"):
        prepare(config(picture_folder, picture_folder / "data"))
    assert not (picture_folder / "data").exists()


def test_a_place_that_holds_a_foreign_dataset_is_refused(picture_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds another dataset; choose an empty place"):
        prepare(config(picture_folder, tmp_path / "data"))

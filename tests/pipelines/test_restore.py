"""Restoring a folder keeps names, gives the pipeline's own bytes, repeats nothing, and no picture stops the others."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from faithdiff import FaithDiffPipeline
from faithdiff.caption_text import clean_caption
from faithdiff.picture_files import OutputOptions, PictureLimits, read_picture, write_picture
from pipelines.restoration.recipe import RestoreConfig
from pipelines.restore import estimate, excess_of_failures, main, restore
from sr_platform.cluster import REPOSITORY_PATH
from sr_platform.config import read_recipe, validate
from sr_platform.errors import ConfigError, InputDataError
from sr_platform.storage import Storage, open_storage

RECIPE: dict[str, Any] = {"model": "nano", "scale": 2, "num_inference_steps": 2, "tile_px": 64, "seed": 3}


def config(folder: Path | str, out: Path | str, **changes: Any) -> RestoreConfig:
    return validate(RestoreConfig, {**RECIPE, "input": str(folder), "out": str(out), **changes}, where="test")


@pytest.fixture
def folder(tmp_path: Path, make_picture: Callable[..., np.ndarray]) -> Path:
    """Pictures of many kinds in sub-folders, one with a caption, one broken, and a file that is none."""
    folder = tmp_path / "pictures"
    (folder / "deep" / "er").mkdir(parents=True)
    rgb = make_picture(24, 40)
    upright = Image.Exif()
    upright[0x0112] = 6
    Image.fromarray(rgb).save(folder / "turned.JPG", exif=upright, quality=95)
    (folder / "deep" / "deep16.png").write_bytes(_png16(rgb))
    Image.fromarray(rgb).quantize(16).save(folder / "deep" / "palette.png")
    Image.fromarray(np.dstack([rgb, np.full(rgb.shape[:2], 90, np.uint8)])).save(folder / "deep" / "er" / "alpha.webp")
    Image.fromarray(rgb).convert("L").save(folder / "grey.tiff")
    (folder / "grey.txt").write_text("A grey\nharbour.")
    (folder / "broken.png").write_bytes(_png16(rgb)[:200])
    (folder / "notes.md").write_text("not a picture")
    return folder


def _png16(rgb: np.ndarray) -> bytes:
    import cv2

    done, data = cv2.imencode(".png", rgb[..., ::-1].astype(np.uint16) * 257 + 3)
    assert done
    return data.tobytes()


RESULTS = {
    "turned.JPG": ("turned_x2.JPG", "jpeg", ""),
    "deep/deep16.png": ("deep/deep16_x2.png", "png", ""),
    "deep/palette.png": ("deep/palette_x2.png", "png", ""),
    "deep/er/alpha.webp": ("deep/er/alpha_x2.webp", "webp", ""),
    "grey.tiff": ("grey_x2.tiff", "tiff", "A grey harbour."),
}


def directly(pipeline: FaithDiffPipeline, data: bytes, file_format: Any, prompt: str) -> bytes:
    """What anybody gets from the pipeline, without a job."""
    source = read_picture(data, PictureLimits())
    restored = pipeline(source.rgb, 2, prompt, num_inference_steps=2, tile_px=64, seed=3)
    return write_picture(restored.array, source, 2, OutputOptions(file_format))[0]


def files(out: Path) -> dict[str, Path]:
    """Visible ones, besides the report."""
    found = (path for path in sorted(out.rglob("*")) if path.is_file() and ".restore" not in path.parts)
    return {path.relative_to(out).as_posix(): path for path in found if not path.name.startswith("restore_report")}


@pytest.mark.ray
def test_a_folder_is_restored_as_by_the_pipeline_and_nothing_is_done_twice(
    folder: Path, tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    report = restore(config(folder, out))
    assert report.counts == {"done": 5, "skipped": 0, "failed": 1, "waiting": 0, "pictures": 6}
    assert set(files(out)) == {output for output, _, _ in RESULTS.values()}
    pipeline = FaithDiffPipeline.from_pretrained("nano")
    for path, (output, file_format, prompt) in RESULTS.items():
        assert (out / output).read_bytes() == directly(pipeline, (folder / path).read_bytes(), file_format, prompt), (
            path
        )
    assert Image.open(out / "turned_x2.JPG").size == (48, 80)
    assert read_picture((out / "deep/deep16_x2.png").read_bytes(), PictureLimits()).rgb.dtype == np.uint16
    assert_the_report_tells_all(out)
    assert "1 of 6 pictures failed (1 unreadable) and all others are done" in excess_of_failures(report, 0.1)
    assert excess_of_failures(report, 0.2) == ""

    inodes = {name: path.stat().st_ino for name, path in files(out).items()}
    (folder / "grey.tiff").touch()
    Image.new("RGB", (32, 24), "teal").save(folder / "turned.JPG")
    (folder / "broken.png").unlink()
    capsys.readouterr()
    again = restore(config(folder, out))
    assert again.counts == {"done": 1, "skipped": 4, "failed": 0, "waiting": 0, "pictures": 5}
    assert "5 pictures, 3 are done already, 2 to do (2 of changed inputs)" in capsys.readouterr().out
    changed = {name for name, path in files(out).items() if path.stat().st_ino != inodes[name]}
    assert changed == {"turned_x2.JPG"}
    assert restore(config(folder, out, workers={"num_actors": 2})).counts["skipped"] == 5
    assert_results_of_other_settings_are_replaced_only_when_told(folder, out)


def assert_results_of_other_settings_are_replaced_only_when_told(folder: Path, out: Path) -> None:
    some = {"include": ("deep/p*", "turned.*")}
    before = {name: path.read_bytes() for name, path in files(out).items()}
    with pytest.raises(ConfigError, match=r"2 results in .* were made otherwise \(seed\), such as deep/.*--overwrite"):
        restore(config(folder, out, seed=4, **some))
    (out / "turned_x2.JPG").write_bytes(b"of somebody else")
    with pytest.raises(ConfigError, match=r"1 files in .* bear names of results.*\(turned_x2\.JPG\)"):
        restore(config(folder, out, **some))
    assert (out / "turned_x2.JPG").read_bytes() == b"of somebody else"
    assert restore(config(folder, out, seed=4, overwrite=True, **some)).counts["done"] == 2
    after = {name: path.read_bytes() for name, path in files(out).items()}
    assert {name for name in before if before[name] != after[name]} == {"deep/palette_x2.png", "turned_x2.JPG"}


def assert_the_report_tells_all(out: Path) -> None:
    report = json.loads((out / "restore_report.json").read_text())
    entries = {picture["input"]: picture for picture in report["pictures"]}
    assert report["counts"]["done"] == 5
    assert report["failures"] == {"unreadable": 1}
    assert entries["broken.png"]["state"] == "failed"
    assert "damaged or incomplete" in entries["broken.png"]["error"]["detail"]
    assert entries["grey.tiff"]["prompt"] == "A grey harbour."
    assert entries["turned.JPG"]["output_size_px"] == [48, 80]
    assert entries["turned.JPG"]["seconds"] > 0
    assert {p["model_version"].partition("@")[0] for p in report["pictures"] if p["state"] == "done"} == {"nano"}
    assert report["settings"]["digest"] == entries["grey.tiff"]["settings_digest"]
    assert "| broken.png | unreadable |" in (out / "restore_report.md").read_text()


@pytest.mark.ray
def test_the_estimate_counts_what_is_to_do_measures_a_rate_and_leaves_nothing(
    folder: Path, tmp_path: Path, local_ray: None
) -> None:
    text = estimate(config(folder, tmp_path / "out", num_inference_steps=10))
    assert re.search(r"pictures     6\n  done       0, skipped\n  to do      6, ", text)
    assert "  will fail  1: unreadable" not in text, "only its pixels tell"
    assert "0.01 in, 0.02 out" in text
    assert re.search(r"tiles        \d+ of 64 px", text)
    assert re.search(r"seconds      about \d+ of one device \(measured on the CPU: ", text)
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_pictures_without_a_caption_are_described_by_an_endpoint(folder: Path, tmp_path: Path, local_ray: None) -> None:
    spec = importlib.util.spec_from_file_location(
        "caption_server", Path(__file__).with_name("stages") / "test_caption_endpoint.py"
    )
    assert spec is not None
    assert spec.loader is not None
    captions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(captions)
    with captions.serving() as server:
        caption = {"mode": "endpoint", "model": captions.MODEL, "endpoint": {"base_url": server.base_url}}
        report = restore(config(folder, tmp_path / "out", caption=caption, include=("grey.tiff", "deep/p*")))
        said = clean_caption(captions.words_of(server.bodies[-1]))
    prompts = {picture["input"]: picture["prompt"] for picture in report.pictures}
    assert prompts["grey.tiff"] == "A grey harbour."
    assert prompts["deep/palette.png"] == said
    pipeline = FaithDiffPipeline.from_pretrained("nano")
    expected = directly(pipeline, (folder / "deep/palette.png").read_bytes(), "png", prompts["deep/palette.png"])
    assert (tmp_path / "out/deep/palette_x2.png").read_bytes() == expected


@pytest.mark.ray
def test_a_killed_actor_costs_the_picture_in_hand_at_most(
    tmp_path: Path, picture_file: Callable[..., bytes], local_ray: None
) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    for index in range(9):
        (folder / f"{index}.png").write_bytes(picture_file(24, 32, index))
    published: dict[str, int] = {}

    def kill() -> None:
        while len(found := _recorded(out)) < 3:
            time.sleep(0.01)
        _kill_actor()
        published.update({name: (out / name).stat().st_ino for name in found})

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    report = restore(config(folder, out, num_inference_steps=20))
    killer.join(timeout=20)
    assert len(published) >= 3
    assert report.counts["done"] == 9
    assert published.items() <= {name: path.stat().st_ino for name, path in files(out).items()}.items()


def _recorded(out: Path) -> list[str]:
    return [json.loads(path.read_bytes())["output"] for path in (out / ".restore").glob("done-*.json")]


def _kill_actor() -> None:
    for process in psutil.Process().children(recursive=True):
        if "RestoreActor" in " ".join(process.cmdline()):
            process.kill()
            return
    raise AssertionError("no actor is running")


@pytest.mark.ray
@pytest.mark.soak
def test_a_job_from_s3_to_s3_that_is_killed_goes_on_where_it_was(
    tmp_path: Path, picture_file: Callable[..., bytes], s3_uri: str
) -> None:
    source, out = open_storage(f"{s3_uri}/in"), open_storage(f"{s3_uri}/out")
    for index in range(8):
        source.write_bytes_atomic(f"sub {index % 2}/{index}.png", picture_file(24, 32, index))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**RECIPE, "num_inference_steps": 100}))
    args = [str(recipe), "--input", source.uri, "--out", out.uri]
    process = subprocess.Popen(_command(args), start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        _wait_for_records(out, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
    before, recorded = _when_still(out)
    assert len(before) < 8
    done = subprocess.run(_command(args), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_bytes("restore_report.json"))
    assert report["counts"] == {"done": 8 - recorded, "skipped": recorded, "failed": 0, "waiting": 0, "pictures": 8}
    after = _changed_at(out)
    assert set(after) == {f"sub {index % 2}/{index}_x2.png" for index in range(8)}
    # What was published and not yet recorded was in hand.
    repeated = [name for name in before if after[name] != before[name]]
    assert len(before) - recorded == len(repeated) <= 1


def _command(args: list[str]) -> list[str]:
    return [sys.executable, str(REPOSITORY_PATH / "pipelines" / "restore.py"), *args]


def _wait_for_records(out: Storage, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 200
    while len(out.list(".restore/done-")) < 2:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline_s, "no picture was restored"
        time.sleep(0.1)


def _when_still(out: Storage) -> tuple[dict[str, str], int]:
    """The results and the number of records, when the last of the killed job's processes is gone."""
    found, last = ({}, 0), None
    while found != last:
        last = found
        time.sleep(1.5)
        found = (_changed_at(out), len(out.list(".restore/done-")))
    return found


def _changed_at(out: Storage) -> dict[str, str]:
    import boto3

    bucket, _, prefix = out.uri.removeprefix("s3://").partition("/")
    listed = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/sub")["Contents"]
    return {entry["Key"].removeprefix(f"{prefix}/"): str(entry["LastModified"]) for entry in listed}


def test_two_pictures_that_would_get_one_name_are_both_named(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "grey.png")
    with pytest.raises(InputDataError, match=r"grey\.png and grey\.tiff would both become grey_x2\.png"):
        restore(config(folder, tmp_path / "out", output={"format": "png"}))
    assert files(tmp_path / "out") == {}


def test_an_output_inside_the_input_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="lies inside --input"):
        restore(config(folder, folder / "restored"))


def test_a_wrong_request_is_one_line_and_status_2(tmp_path: Path) -> None:
    args = ["restore_nano.yaml", "--input", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    done = subprocess.run(_command(args), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"restore: source input: {tmp_path}/nowhere holds nothing, or does not exist; give a folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name_template": "{stem}"}, r"must end with \{suffix\}"),
        ({"name_template": "a{suffix}"}, r"without \{stem\}"),
        ({"name_template": "{stem}/{suffix}"}, "leave the slash out"),
        ({"name_template": "{nmae}{suffix}"}, r"\{nmae\} is not one of \{stem\}"),
        ({"name_template": "{stem{suffix}"}, "it is made of text and"),
        ({"name_template": ".{stem}{suffix}"}, "not hidden"),
        ({"scale": 17}, "scale is 17; it must be a whole number from 1 to 16"),
        ({"endpoint": "http://host:1"}, "give a model, which is run here, or an endpoint"),
        ({"model": ""}, "got neither"),
        ({"model": "", "endpoint": "http://a:b@host"}, r"with a user.*service\.api_key_env"),
        ({"model": "", "endpoint": "host:80"}, "no http address"),
        ({"output": {"format": "gif"}}, r"output\.format: got 'gif'"),
        ({"sede": 1}, "did you mean 'seed'"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_setting_and_what_is_allowed(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path / "in", tmp_path / "out", **changes)


@pytest.mark.parametrize("name", ["restore_nano.yaml", "restore_sdxl_8xh100.yaml"])
def test_shipped_recipes_are_valid(name: str) -> None:
    recipe = {"model": "models:/faithdiff@champion", **read_recipe(name, job="restore")}
    cfg = validate(RestoreConfig, {**recipe, "input": "in", "out": "out"}, where=name)
    assert {"scale", "num_inference_steps", "caption", "workers", "limits", "output"} <= set(recipe)
    assert cfg.workers.num_gpus + cfg.workers.caption_num_gpus <= 1


def test_no_failures_allowed_means_status_1(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "broken.png":
            path.unlink()
    (folder / "broken.png").rename(folder / f"{'long' * 60}.png")
    args = ["restore_nano.yaml", "--input", str(folder), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main([*args, "--name-template", "{stem}_restored_at_scale_{scale}{suffix}"])
    assert stop.value.code == 1
    assert "1 of 1 pictures failed (1 name too long) and all others are done" in capsys.readouterr().err
    main([*args, "--max-failed-fraction", "1", "--name-template", "{stem}_restored_at_scale_{scale}{suffix}"])

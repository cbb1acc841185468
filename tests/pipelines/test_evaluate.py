"""An evaluation is the same however often it is killed and whoever works; nothing is averaged over in silence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from faithdiff.degradation import degrade
from pipelines.evaluate import Evaluation, evaluate, main
from pipelines.evaluation.protocol import EvaluateConfig
from pipelines.evaluation.text_reading import Word, dump_words
from pipelines.synthetic.text_pictures import text_picture
from sr_platform.cluster import REPOSITORY_PATH
from sr_platform.config import read_recipe, validate
from sr_platform.errors import ConfigError, InputDataError, RequestError
from sr_platform.mlflow_client import open_client

SMALL: dict[str, Any] = {
    "pictures": {"kind": "hq", "crop_px": 96},
    "restoration": {"num_inference_steps": 2, "tile_px": 64, "seed": 42},
}
NAMES = ("cat", "coffee", "deep/rocket", "space")


def config(
    folder: Path | str, report: Path, *, recipe: str = "protocol_table1_nano.yaml", **changes: Any
) -> EvaluateConfig:
    values = {**read_recipe(recipe, job="test"), **SMALL, "data": str(folder), "report": str(report), "model": "nano"}
    return validate(EvaluateConfig, {**values, **changes}, where="test")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name, photograph in zip(NAMES, (data.chelsea, data.coffee, data.rocket, data.astronaut), strict=True):
        path = folder / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photograph()[100:228, 150:278]).save(path)
        path.with_suffix(".txt").write_text(f"A picture of {path.stem}.\n")
    return folder


@pytest.fixture(scope="module")
def undisturbed(photographs: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Evaluation:
    result = evaluate(config(photographs, tmp_path_factory.mktemp("undisturbed") / "report"))
    assert result is not None
    return result


def scores_of(report: Path | str) -> list[tuple[Any, ...]]:
    """Rows without the seconds, which nobody can repeat."""
    columns = ("method", "picture", "metric", "value", "reason")
    return [tuple(row[c] for c in columns) for row in pq.read_table(Path(report) / "scores.parquet").to_pylist()]


def assert_same_report(one: Path | str, other: Path | str) -> None:
    assert scores_of(one) == scores_of(other)
    for name in ("report.md", "report.json"):
        texts = [(Path(report) / name).read_text() for report in (one, other)]
        assert texts[0] == texts[1], name
    pictures = [sorted(Path(report, "pictures").rglob("*.png")) for report in (one, other)]
    assert [p.relative_to(one) for p in pictures[0]] == [p.relative_to(other) for p in pictures[1]]
    assert [p.read_bytes() for p in pictures[0]] == [p.read_bytes() for p in pictures[1]]


@pytest.mark.ray
def test_a_report_holds_a_row_per_method_picture_and_metric_with_values_that_are_true(
    undisturbed: Evaluation, photographs: Path
) -> None:
    report = Path(undisturbed.report)
    rows = scores_of(report)
    assert len(rows) == 3 * 4 * 8
    values = {row[:3]: row[3] for row in rows}
    for name in NAMES:
        hq, ours, lq = (
            np.asarray(Image.open(report / "pictures" / method / f"{name}.png")) for method in ("hq", "ours", "lq")
        )
        assert values["ours", name, "psnr"] == pytest.approx(peak_signal_noise_ratio(hq, ours))
        assert np.array_equal(lq, degrade(hq, "level_III", key=name, seed=0))
        assert np.array_equal(hq, np.asarray(Image.open(photographs / f"{name}.png"))[16:112, 16:112])
        assert values["hq", name, "degrade_again_psnr"] == 100
    reasons = {row[2]: row[4] for row in rows if row[0] == "ours" and row[3] is None}
    assert set(reasons) <= {"lpips", "musiq"}
    text = (report / "report.md").read_text()
    assert undisturbed.header["protocol_digest"] in text
    assert (report / "report.html").is_file()
    assert (report / "figures" / "psnr.png").is_file()


@pytest.mark.ray
def test_the_run_in_mlflow_holds_protocol_means_and_files(undisturbed: Evaluation) -> None:
    client = open_client(f"sqlite:///{undisturbed.report}/mlflow.db")
    run = client.get_run(undisturbed.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["degradation"] == "level_III"
    assert run.data.tags["evaluation_protocol_digest"] == undisturbed.header["protocol_digest"]
    values = [row[3] for row in scores_of(undisturbed.report) if row[0] == "ours" and row[2] == "psnr"]
    assert run.data.metrics["eval/ours/psnr"] == pytest.approx(np.mean(values))
    assert run.data.metrics["eval/ours/psnr.pictures"] == 4
    assert {file.path for file in client.list_artifacts(undisturbed.run_id)} >= {
        "report.json",
        "report.md",
        "scores.parquet",
    }


@pytest.mark.ray
@pytest.mark.slow
def test_what_is_half_done_is_finished_by_other_workers_to_the_identical_report(
    undisturbed: Evaluation, photographs: Path, tmp_path: Path
) -> None:
    """From what a killed evaluation leaves: pictures and scores that are done, and a picture without its record."""
    report = tmp_path / "report"
    shutil.copytree(Path(undisturbed.report) / "cache", report / "cache")
    known, *lost = sorted((report / "cache" / "restored").glob("*.json"))
    for record in lost:
        record.unlink()
    for picture in (record.with_suffix(".png") for record in lost[1:]):
        picture.unlink()
    for scores in sorted((report / "cache" / "scores").iterdir())[::2]:
        scores.unlink()
    time_ns = known.stat().st_mtime_ns
    evaluate(config(photographs, report, workers={"restorers": 2, "scorers": 2, "num_cpus": 1.0}))
    assert_same_report(undisturbed.report, report)
    assert known.stat().st_mtime_ns == time_ns, "restored once"


@pytest.mark.ray
@pytest.mark.soak
def test_killed_half_way_and_finished_by_other_workers_on_two_nodes_the_report_is_identical(
    undisturbed: Evaluation, photographs: Path, tmp_path: Path, make_cluster: Callable[..., Any]
) -> None:
    """Two restorers and two scorers find room on three CPUs of a node and one of the other at least."""
    report = tmp_path / "report"
    kill_half_way(photographs, report)
    assert not (report / "report.json").exists()
    restored = {path: path.stat().st_mtime_ns for path in (report / "cache" / "restored").glob("*.json")}
    assert 1 <= len(restored) < len(NAMES)
    workers = ["--workers.restorers", "2", "--workers.scorers", "2"]
    job = start_job(photographs, report, *workers, ray_address=make_cluster(2, num_cpus=3).address)
    assert job.wait(300) == 0
    assert_same_report(undisturbed.report, report)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in restored.items()), "restored once"


def start_job(photographs: Path, report: Path, *flags: str, ray_address: str = "") -> subprocess.Popen[bytes]:
    """The command as its user types it, on a cluster or on a Ray of its own."""
    recipe = report.parent / "protocol.yaml"
    recipe.write_text(json.dumps({**read_recipe("protocol_table1_nano.yaml", job="test"), **SMALL}))
    command = [sys.executable, str(REPOSITORY_PATH / "pipelines" / "evaluate.py"), str(recipe), "--model", "nano"]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY_PATH / 'platform'}{os.pathsep}{REPOSITORY_PATH}"}
    environment.pop("RAY_ADDRESS", None)
    environment |= {"RAY_ADDRESS": ray_address} if ray_address else {}
    places = ["--data", str(photographs), "--report", str(report)]
    return subprocess.Popen([*command, *places, *flags], env=environment, start_new_session=True)


def kill_half_way(photographs: Path, report: Path) -> None:
    """Kills the job, and the Ray it has started, after the first restored picture."""
    job = start_job(photographs, report)
    deadline_s = time.monotonic() + 200
    while not list((report / "cache" / "restored").glob("*.json")):
        assert job.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline_s, "it restored nothing"
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()


@pytest.mark.ray
def test_outputs_of_others_are_scored_by_the_same_rules_and_gaps_are_counted(
    undisturbed: Evaluation, tmp_path: Path, photographs: Path
) -> None:
    outputs = tmp_path / "outputs"
    shutil.copytree(Path(undisturbed.report) / "pictures" / "ours", outputs)
    (outputs / "coffee.png").unlink()
    Image.new("RGB", (10, 10)).save(outputs / "cat.png")
    Image.new("RGB", (10, 10)).save(outputs / "nobody.png")
    cfg = config(photographs, tmp_path / "report", model="", method=[f"SeeSR={outputs}"])
    result = evaluate(cfg)
    assert result is not None
    values = {row[:3]: row[3:] for row in scores_of(result.report)}
    ours = {row[:3]: row[3] for row in scores_of(undisturbed.report)}
    for name in ("deep/rocket", "space"):
        assert values["SeeSR", name, "psnr"] == (ours["ours", name, "psnr"], None)
    assert values["SeeSR", "coffee", "psnr"] == (None, "SeeSR has no picture of this name")
    assert values["SeeSR", "cat", "psnr"] == (None, "cat.png has 10x10 px, and 96x96 px are needed")
    text = (Path(result.report) / "report.md").read_text()
    assert "(2 of 4)" in text
    assert "SeeSR has no picture of this name: psnr of SeeSR (1)" in text
    assert result.header["unknown_outputs"] == {"SeeSR": ["nobody"]}
    assert result.header["protocol_digest"] == undisturbed.header["protocol_digest"]


@pytest.mark.ray
def test_a_report_belongs_to_one_protocol_and_model(
    undisturbed: Evaluation, photographs: Path, local_ray: None
) -> None:
    with pytest.raises(ConfigError, match="was begun with another protocol; give another folder"):
        evaluate(config(photographs, Path(undisturbed.report), degradation_seed=1))
    with pytest.raises(ConfigError, match=r"the protocol means the pictures sha256:0, and .* holds sha256:"):
        evaluate(config(photographs, Path(undisturbed.report), pictures={"kind": "hq", "digest": "sha256:0"}))


@pytest.mark.ray
def test_two_reports_are_compared_or_it_is_said_why_they_cannot_be(
    undisturbed: Evaluation, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", undisturbed.report, undisturbed.report])
    assert "comparable: both under table1_nano, sha256:" in capsys.readouterr().out
    other = tmp_path / "other"
    shutil.copytree(undisturbed.report, other, ignore=shutil.ignore_patterns("cache", "ml*"))
    header = json.loads((other / "report.json").read_text())
    header["protocol"]["metrics"]["psnr"]["channel"] = "y"
    header["protocol_digest"] = "sha256:0"
    (other / "report.json").write_text(json.dumps(header))
    with pytest.raises(RequestError, match=r"not comparable: metrics\.psnr\.channel: rgb against y"):
        main(["compare", undisturbed.report, str(other)])


@pytest.mark.ray
@pytest.mark.slow
def test_text_is_read_well_in_hq_and_clearly_worse_in_lq(tmp_path: Path, local_ray: None, capsys: Any) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(3):
        drawn = text_picture(np.random.default_rng([11, number]), 256, 256)
        Image.fromarray(drawn.pixels).save(folder / f"{number}.png")
        words = [Word(line.string, line.box) for line in drawn.lines]
        (folder / f"{number}.words.json").write_bytes(dump_words(words))
    recipe = read_recipe("protocol_table3_nano.yaml", job="test")
    cfg = validate(
        EvaluateConfig, {**recipe, "data": str(folder), "report": str(tmp_path / "r"), "model": "nano"}, where=""
    )
    result = evaluate(cfg)
    assert result is not None
    rows = [row for row in scores_of(result.report) if row[2] == "text_recall"]
    recall = {method: np.mean([row[3] for row in rows if row[0] == method]) for method in ("hq", "lq", "ours")}
    with capsys.disabled():
        print(f"\n{result.means}")
    assert recall["hq"] > 0.8
    assert recall["lq"] < 0.5 * recall["hq"]


@pytest.mark.ray
def test_every_damaged_picture_is_named_and_nothing_is_written(
    photographs: Path, tmp_path: Path, local_ray: None, spoil: Callable[[Path, str], None]
) -> None:
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    spoil(folder, "cat")
    spoil(folder, "space")
    with pytest.raises(InputDataError, match=r"2 of 4 pictures .*: cat: its hq .*; space: its hq"):
        evaluate(config(folder, tmp_path / "report"))
    assert not (tmp_path / "report").exists()


@pytest.fixture
def spoil() -> Callable[[Path, str], None]:
    def cut(folder: Path, name: str) -> None:
        path = folder / f"{name}.png"
        path.write_bytes(path.read_bytes()[:2000])

    return cut


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "model: there is nothing to evaluate"),
        (["--model", "nano", "--report", ""], "report: required, and missing"),
        (["--model", "nano", "--weights", "lpips=nowhere.pth"], r"lpips=nowhere\.pth: there is no such file"),
        (["--model", "nano", "--method", "SeeSR=nowhere"], "--method SeeSR=.*holds no picture, and none of the data's"),
        (["--model", "nanoo"], "neither a folder nor a preset"),
        (["--model", "nano", "--data", "nowhere"], "nowhere holds no picture"),
        (
            ["--model", "nano", "--pictures.kind", "pairs", "--degradation", ""],
            "degrade_again_psnr needs a degradation",
        ),
    ],
)
def test_a_wrong_request_is_refused_before_ray_starts(
    flags: list[str], message: str, photographs: Path, tmp_path: Path
) -> None:
    argv = ["protocol_table1_nano.yaml", "--data", str(photographs), "--report", str(tmp_path / "report"), *flags]
    with pytest.raises(ValueError, match=message) as refusal:
        main(argv)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "report").exists()


@pytest.mark.ray
def test_a_dry_run_prints_the_protocol_and_writes_nothing(
    photographs: Path, tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(config(photographs, tmp_path / "report", dry_run=True)) is None
    printed = json.loads(capsys.readouterr().out)
    assert printed["protocol"]["pictures"]["num_pictures"] == 4
    assert printed["protocol_digest"].startswith("sha256:")
    assert not (tmp_path / "report").exists()

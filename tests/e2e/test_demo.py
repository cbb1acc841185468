"""The whole road, cut short: what `make demo` runs, with two updates per stage."""

import subprocess
import sys

import mlflow
import pytest
from PIL import Image

from sr_platform.cluster import REPOSITORY_PATH
from sr_platform.sample_reader import SampleReader

DEMO = [sys.executable, "pipelines/demo.py"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_walks_from_photographs_to_a_restored_picture(tmp_path):
    out = tmp_path / "demo"
    run = subprocess.run(
        [*DEMO, "--out", str(out), "--max-updates", "2"], cwd=REPOSITORY_PATH, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for name, size in (("lq", (96, 96)), ("restored", (384, 384)), ("hq", (384, 384)), ("side_by_side", (1200, 424))):
        assert Image.open(out / f"{name}.png").size == size, name
        assert str(out / f"{name}.png") in run.stdout
    reader = SampleReader(str(out / "shards"))
    assert len(reader) >= 50
    assert not any("coffee" in key for key in reader.keys)
    registered = mlflow.MlflowClient(f"sqlite:///{out}/train/mlflow.db").get_model_version_by_alias(
        "faithdiff-nano", "candidate"
    )
    assert str(registered.version) == "1"
    assert "serve run --address local serve.app:build_app model=models:/faithdiff-nano/1" in run.stdout


def test_a_demo_that_cannot_write_says_so_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    run = subprocess.run([*DEMO, "--out", str(tmp_path / "file")], cwd=REPOSITORY_PATH, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith("demo: out is")
    assert "Traceback" not in run.stderr

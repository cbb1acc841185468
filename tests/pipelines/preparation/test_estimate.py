"""A dry run prints what would be made, from a measured sample, and leaves nothing behind."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pipelines.preparation.estimate import Measured, estimate_text
from pipelines.preparation.progress import StageCount
from pipelines.prepare import main
from pipelines.stages.ingest import Picture

FLAGS = [
    "--filter.min-side-px",
    "64",
    "--crop.size-px",
    "32",
    "--crop.max-per-picture",
    "3",
    "--samples-per-shard",
    "5",
]


@pytest.mark.ray
def test_a_dry_run_prints_the_plan_and_makes_nothing(
    picture_folder: Path, tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--input", str(picture_folder), "--out", str(tmp_path / "out"), "--dry-run", *FLAGS])
    shown = capsys.readouterr().out
    assert "pictures     9," in shown
    assert "measured     9 of them, 5 used; 1 too flat, 1 too small, 2 unreadable" in shown
    assert "crops        about 15" in shown
    assert "shards       about 3," in shown
    for stage in ("ingest", "filter", "crop", "caption", "degrade", "write"):
        assert f"  {stage}" in shown
    assert not (tmp_path / "out").exists()


def test_figures_of_the_sample_are_scaled_to_the_whole() -> None:
    pictures = [Picture(f"a/{i}", "{}", 2**20, "f") for i in range(100)]
    measured = Measured(10, 8, 40, 2**20, {"degrade": StageCount(40, 2.0)}, Counter({"too small": 2}))
    text = estimate_text(64, pictures, measured, cpus=4)
    assert "pictures     100, 100.0 MiB" in text
    assert "crops        about 400" in text
    assert "shards       about 7, 10.0 MiB" in text
    assert "20.0 " in text
    assert "about 5 s on 4 logical CPUs" in text

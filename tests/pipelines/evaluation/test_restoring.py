"""The two stages without Ray, on a disk and on S3: restored once, scored once, and a failure is a reason."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from skimage import data

from faithdiff.pipeline import FaithDiffPipeline
from pipelines.evaluation import results
from pipelines.evaluation.measuring import Measure, Score
from pipelines.evaluation.pictures import list_pictures, load
from pipelines.evaluation.protocol import EvaluateConfig, protocol_digest, resolved_protocol
from pipelines.evaluation.restoring import Restore, Restored, picture_seed, restoration_key, restored_pixels
from pipelines.evaluation.scoring import describe
from sr_platform.config import validate
from sr_platform.storage import open_storage

METRICS = ("psnr", "seam", "diffusion_seconds", "text_recall")


def config(folder: Path, **changes: Any) -> EvaluateConfig:
    values: dict[str, Any] = {
        **{"name": "t", "dataset": "d", "data": str(folder), "degradation": "level_II", "model": "nano"},
        "restoration": {"num_inference_steps": 1, "tile_px": 64},
        "metrics": [{"name": name} for name in METRICS],
    }
    return validate(EvaluateConfig, {**values, **changes}, where="test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name, photograph in (("a", data.chelsea()), ("deep/b", data.coffee())):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(photograph[100:180, 100:196]).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("A cat.")
    return folder


def rows(cfg: EvaluateConfig) -> pa.Table:
    pictures = enumerate(list_pictures(cfg))
    return pa.Table.from_pylist([{"number": n, "picture": p.dump(), "outputs": "{}"} for n, p in pictures])


def stages(cfg: EvaluateConfig, report: str, cache: str) -> tuple[Restore, Measure]:
    dumped = cfg.model_dump(mode="json")
    restore = Restore(dumped, model=cfg.model, model_digest="digest of nano", report=report, cache=cache)
    return restore, Measure(dumped, weights={}, report=report, cache=cache)


def scores_of(table: pa.Table) -> list[Score]:
    return [Score(*score) for row in table.to_pylist() for score in json.loads(row["scores"])]


class Unloadable(Restore):
    @cached_property
    def pipeline(self) -> FaithDiffPipeline:
        raise AssertionError("the model is not needed")


def test_what_is_in_the_cache_needs_no_model_and_is_scored_as_before(folder: Path, tmp_path: Path) -> None:
    cfg, places = config(folder), (str(tmp_path / "report"), str(tmp_path / "cache"))
    restore, measure = stages(cfg, *places)
    restored = restore(rows(cfg))
    scores = scores_of(measure(restored))
    again = Unloadable(
        cfg.model_dump(mode="json"), model="nano", model_digest="digest of nano", report=places[0], cache=places[1]
    )
    assert again(rows(cfg)).equals(restored)
    later = scores_of(stages(cfg, *places)[1](restored))
    assert [score[:5] for score in later] == [score[:5] for score in scores]
    spent = [[s.seconds for s in found if s.metric == "psnr" and s.value is not None] for found in (scores, later)]
    assert spent[0] == spent[1], "not computed again"
    values = {(score.method, score.picture, score.metric): score for score in scores}
    assert values["ours", "a", "psnr"].value
    assert values["ours", "deep/b", "seam"].value is not None
    assert values["ours", "a", "diffusion_seconds"].value > 0
    assert "not known what is written" in (values["hq", "a", "text_recall"].reason or "")
    assert len(scores) == 3 * 2 * len(METRICS)


def test_the_picture_is_the_one_that_the_pipeline_gives(folder: Path, tmp_path: Path) -> None:
    cfg = config(folder)
    restore, _ = stages(cfg, str(tmp_path / "report"), str(tmp_path / "cache"))
    loaded = load(list_pictures(cfg)[0], cfg)
    restored = restore.restored(loaded)
    alone = FaithDiffPipeline.from_pretrained("nano")(
        loaded.lq, scale=4, prompt="A cat.", num_inference_steps=1, tile_px=64, seed=picture_seed(42, "a")
    )
    assert np.array_equal(restored_pixels(restore.cache, restored), np.asarray(alone.image))
    assert restored.tile_borders.columns == (32, 64)
    assert restored.seconds["diffusion"] > 0


def test_the_key_is_of_all_that_the_picture_depends_on(folder: Path) -> None:
    cfg = config(folder)
    a, b = (load(picture, cfg) for picture in list_pictures(cfg))
    keys = {
        restoration_key(cfg.restoration, "m", a),
        restoration_key(cfg.restoration, "n", a),
        restoration_key(cfg.restoration, "m", b),
        restoration_key(cfg.restoration.model_copy(update={"num_inference_steps": 2}), "m", a),
        restoration_key(cfg.restoration, "m", load(list_pictures(cfg)[0], config(folder, degradation="level_III"))),
        restoration_key(
            cfg.restoration, "m", load(list_pictures(cfg)[0], config(folder, pictures={"captions": "none"}))
        ),
    }
    assert len(keys) == 6


def test_a_restoration_that_fails_is_a_reason_and_is_tried_again(folder: Path, tmp_path: Path, monkeypatch) -> None:
    cfg = config(folder)
    restore, measure = stages(cfg, str(tmp_path / "report"), str(tmp_path / "cache"))

    def fail(*_: Any) -> Any:
        raise FloatingPointError("latents are not finite")

    monkeypatch.setattr(Restore, "restore", fail)
    table = restore(rows(cfg))
    ours = [score for score in scores_of(measure(table)) if score.method == "ours"]
    assert {score.value for score in ours} == {None}
    assert {score.reason for score in ours} == {"the restoration failed: latents are not finite"}
    assert open_storage(tmp_path / "cache").list("restored/") == []


def test_a_record_survives_its_journey() -> None:
    restored = Restored("key", ((32,), (32, 64)), {"diffusion": 1.5})
    assert Restored.parse(restored.dump()) == restored


def test_a_report_on_s3_has_all_that_one_on_a_disk_has(folder: Path, s3_uri: str) -> None:
    cfg = config(folder, report=f"{s3_uri}/report")
    restore, measure = stages(cfg, cfg.report, f"{s3_uri}/report/cache")
    measured = measure(restore(rows(cfg)))
    protocol = resolved_protocol(cfg, data_digest="sha256:d", num_pictures=2, versions=results.versions(), weights={})
    header = {
        **{"protocol": protocol, "protocol_digest": protocol_digest(protocol), "methods": ["ours", "lq", "hq"]},
        **{"model": {"version": "nano", "digest": "d"}, "versions": results.versions(), "machine": results.machine()},
        "metrics": [describe(name) for name in METRICS],
    }
    results.write_scores(cfg.report, header, scores_of(measured))
    results.write_pages(cfg.report)
    names = set(open_storage(cfg.report).list())
    assert {"report.md", "report.html", "report.json", "scores.parquet", "figures/psnr.png"} <= names
    assert {f"pictures/{method}/deep/b.png" for method in ("ours", "lq", "hq")} <= names
    with results.report_folder(cfg.report) as local:
        text = (local / "report.md").read_text()
        assert not (local / "cache").exists()
    assert not local.exists()
    assert "| hq | - | - | - | missing |" in text, "what cannot be measured is no gap, and unknown text is one"

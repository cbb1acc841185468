"""The writer publishes a shard whole and with the same bytes every time, and reports what became of every picture."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from pipelines.stages.degrade import Degrade, DegradeConfig
from pipelines.stages.sample import Sample, read_table, to_table
from pipelines.stages.write import Write, encode_png, lq_suffix
from sr_platform.publication import ShardReport, finished_shards
from sr_platform.storage import open_storage


@pytest.fixture
def rows(make_crop: Callable[..., Any]) -> list[Sample]:
    crops = [
        make_crop(f"k{i}", source=f"a/{i}.png", num_pictures=3, caption="A house.", source_sha256="ab") for i in (0, 1)
    ]
    bad = Sample(shard=0, num_pictures=3, source="a/bad.png", problem="unreadable: cut: off")
    return [*read_table(Degrade(DegradeConfig(), seed=0)(to_table(crops))), bad]


def written(uri: str, rows: list[Sample]) -> list[ShardReport]:
    """The reports of what the stage published, read from their markers."""
    stage = Write(uri, name="test", about={"recipe": "pasd", "seed": 0}, groups={"a": "nature"})
    table = stage(to_table(rows))
    reports = finished_shards(open_storage(uri), name="test")
    assert table.column("index").to_pylist() == sorted(reports)
    return [reports[index] for index in sorted(reports)]


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_shard_holds_the_pair_and_its_provenance(
    place: str, rows: list[Sample], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = str(tmp_path) if place == "local" else request.getfixturevalue("s3_uri")
    (report,) = written(uri, rows)
    assert report.shard is not None
    data = open_storage(uri).read_bytes("shards/test-000000.tar")
    stages = wds.tariterators.tar_file_expander([{"url": "x", "stream": io.BytesIO(data)}])
    samples = list(wds.tariterators.group_by_keys(stages))
    assert [sample["__key__"] for sample in samples] == ["k0", "k1"]
    for row, sample in zip(rows, samples, strict=False):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sample["hq.png"]))), row.hq_pixels())
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sample["lq.png"]))), row.lq_pixels()[0])
        about = json.loads(sample["json"])
        assert (about["caption"], about["source"], about["size"]) == ("A house.", row.source, [32, 32])
        assert (about["recipe"], about["seed"]) == ("pasd", 0)


def test_writing_again_gives_the_same_bytes(rows: list[Sample], tmp_path: Path) -> None:
    first = written(str(tmp_path / "a"), rows)
    assert first == written(str(tmp_path / "a"), rows) == written(str(tmp_path / "b"), rows)


def test_what_is_left_out_is_reported_with_its_reason(rows: list[Sample], tmp_path: Path) -> None:
    (report,) = written(str(tmp_path), rows)
    (rejection,) = report.rejections
    assert (rejection.source, rejection.reason, rejection.detail) == ("a/bad.png", "unreadable", "cut: off")
    assert [(entry.key, entry.group) for entry in report.entries] == [("k0", "nature"), ("k1", "nature")]


def test_a_shard_without_samples_is_not_written(tmp_path: Path) -> None:
    bad = Sample(shard=4, num_pictures=1, source="a/bad.png", problem="too flat: x")
    (report,) = written(str(tmp_path), [bad])
    assert (report.index, report.shard) == (4, None)
    assert not (tmp_path / "shards").exists()


def test_shards_that_arrive_together_are_kept_apart(make_crop: Callable[..., Any], tmp_path: Path) -> None:
    crops = [make_crop(f"k{i}", shard=i) for i in (1, 0)]
    reports = written(str(tmp_path), read_table(Degrade(DegradeConfig(), seed=0)(to_table(crops))))
    assert [report.index for report in reports] == [0, 1]


def test_a_shard_that_lost_a_picture_is_not_published(rows: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="arrived with 2 of its 3 pictures"):
        written(str(tmp_path), rows[1:])
    assert list(tmp_path.iterdir()) == []


def test_every_variant_and_what_else_is_known_is_written(make_crop: Callable[..., Any]) -> None:
    lq = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    crop = make_crop("k", lq=lq.tobytes(), latents=b"tensors", meta='{"text": "EXIT"}', trace='[["blur"]]')
    files = Write(None, name="t", about={}, groups={}).members(crop)
    assert list(files) == ["hq.png", "json", "lq.png", "lq1.png", "lq2.png", "latents.safetensors"]
    for variant in range(3):
        decoded = np.asarray(Image.open(io.BytesIO(files[lq_suffix(variant)])))
        np.testing.assert_array_equal(decoded, lq[variant])
    about = json.loads(files["json"])
    assert (about["meta"], about["degradation"]) == ({"text": "EXIT"}, [["blur"]])


def test_packing_without_a_place_writes_nothing_and_says_how_much_it_would_be(rows: list[Sample]) -> None:
    (row,) = Write(None, name="t", about={}, groups={})(to_table(rows)).to_pylist()
    assert (row["num_samples"], json.loads(row["left_out"])) == (2, [["a/bad.png", "unreadable", "cut: off"]])
    assert row["size_bytes"] > 1000


def test_png_is_lossless() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(pixels)))), pixels)

"""The filter measures each picture once; what counts against a picture is judged from that alone."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from pipelines.sources import QualityConfig, SourceConfig
from pipelines.stages.filter import Facts, Filter, FilterConfig, judge, perceptual_hash
from pipelines.stages.sample import Sample, to_table

CFG = FilterConfig(min_side_px=64, max_pixels=20_000, min_deviation=5.0)
SOURCE = SourceConfig(name="a")


def measured(data: bytes, **qualities: QualityConfig) -> Facts:
    sample = Sample(shard=0, num_pictures=1, source="a/1.png", data=data, source_sha256="ab")
    (row,) = Filter(CFG.max_pixels, qualities)(to_table([sample])).to_pylist()
    return Facts(**row)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def bits(text: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)).astype(int)


def test_a_good_picture_is_measured_and_accepted(picture_file: Callable[..., bytes]) -> None:
    facts = measured(picture_file(64, 90))
    assert (facts.name, facts.sha256, facts.height_px, facts.width_px) == ("a/1.png", "ab", 64, 90)
    assert len(facts.phash) == 64
    assert judge(facts, CFG, SOURCE) == ""


def test_unusable_pictures_have_their_reason_and_detail(picture_file: Callable[..., bytes]) -> None:
    problems = {
        "unreadable: ": picture_file(80, 80)[:3000],
        "unreadable: not a picture of a known format": b"text",
        "too small: 100x63 px, less than 64 px": picture_file(63, 100),
        "too flat: gray levels deviate by 0.0": png(Image.new("RGB", (90, 90), "gray")),
        "unreadable: 200x200 px are more than 20000 pixels": picture_file(200, 200),
    }
    for problem, data in problems.items():
        assert judge(measured(data), CFG, SOURCE).startswith(problem)


def test_a_blurred_picture_is_told_from_a_sharp_one(make_picture: Callable[..., np.ndarray]) -> None:
    noise = np.random.default_rng(0).normal(0, 12, (100, 100, 3))
    sharp = np.clip(make_picture(100, 100) + noise, 0, 255).astype(np.uint8)
    blurred = cv2.GaussianBlur(sharp, (0, 0), 3)
    facts = [measured(png(Image.fromarray(picture))) for picture in (sharp, blurred)]
    assert facts[0].sharpness > 20 * facts[1].sharpness
    limit = CFG.model_copy(update={"min_sharpness": facts[0].sharpness / 2})
    assert [judge(fact, limit, SOURCE).partition(":")[0] for fact in facts] == ["", "too blurred"]


def test_the_hash_survives_scaling_and_compression_and_tells_pictures_apart() -> None:
    from skimage import data

    gray = [
        cv2.cvtColor(np.asarray(picture)[..., :3], cv2.COLOR_RGB2GRAY) for picture in (data.astronaut(), data.coffee())
    ]
    half = cv2.resize(gray[0], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", gray[0], [cv2.IMWRITE_JPEG_QUALITY, 60])
    original = bits(perceptual_hash(gray[0]))
    for copy in (half, cv2.imdecode(jpeg, cv2.IMREAD_GRAYSCALE)):
        assert abs(original - bits(perceptual_hash(copy))).sum() <= 16
    assert abs(original - bits(perceptual_hash(gray[1]))).sum() > 64


def test_a_row_with_a_problem_keeps_it() -> None:
    sample = Sample(shard=0, num_pictures=1, source="a/1.png", problem="unreadable: gone")
    (row,) = Filter(CFG.max_pixels, {})(to_table([sample])).to_pylist()
    assert judge(Facts(**row), CFG, SOURCE) == "unreadable: gone"


def test_a_learnt_metric_is_asked_where_the_source_wants_one(
    picture_file: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake_metric.py").write_text(
        "def no_reference_metric(name, *, weights='', device='cpu'):\n    return lambda picture: picture.mean() / 255\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import fake_metric  # type: ignore[import-not-found]

    monkeypatch.setitem(sys.modules, "faithdiff.metrics", fake_metric)
    quality = QualityConfig(metric="mean", minimum=0.4)
    facts = measured(picture_file(64, 64), a=quality)
    assert facts.quality == pytest.approx(0.5, abs=0.1)
    assert measured(picture_file(64, 64), b=quality).quality is None


@pytest.mark.parametrize("settings", [{"min_side_px": 8}, {"duplicate_bits": 65}, {"min_sharpness": -1}])
def test_a_limit_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        FilterConfig(**settings)

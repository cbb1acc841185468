"""Every metric gives a number or a reason, never both and never a made-up one."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from importlib import metadata
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from faithdiff.degradation import degrade
from faithdiff.fidelity import HIGHEST_DB
from faithdiff.seams import Borders
from pipelines.evaluation import scoring
from pipelines.evaluation.scoring import OWN_METRICS, MetricConfig, MissingScoreError, Scorer, Subject, describe
from pipelines.evaluation.text_reading import ILLEGIBLE, TextConfig, Word


def subject(method: str = "ours", **changes: Any) -> Subject:
    hq = np.ascontiguousarray(data.chelsea()[:128, :128])
    lq = degrade(hq, "level_II", key="cat", seed=0)
    enlarged = np.asarray(Image.fromarray(lq).resize((128, 128), Image.Resampling.LANCZOS))
    values: dict[str, Any] = {
        **{"method": method, "name": "cat", "pixels": enlarged, "lq": lq, "lq_enlarged": enlarged, "hq": hq},
        **{
            "degradation": "level_II",
            "degradation_seed": 0,
            "borders": Borders((64,), (64,)),
            "diffusion_seconds": 1.5,
        },
    }
    return Subject(**{**values, **changes})


def score(metric: str, of: Subject, **settings: Any) -> float:
    rules = {name: settings.pop(name) for name in ("channel", "border_px") if name in settings}
    return Scorer([MetricConfig(name=metric, **rules)], **settings).score(metric, of)


def reason(metric: str, of: Subject, **settings: Any) -> str:
    with pytest.raises(MissingScoreError) as missing:
        score(metric, of, **settings)
    return str(missing.value)


def test_psnr_is_of_the_channel_and_border_that_the_protocol_says() -> None:
    cat = subject()
    assert score("psnr", cat) == pytest.approx(peak_signal_noise_ratio(cat.hq, cat.pixels))
    cut = [picture[8:-8, 8:-8] for picture in (cat.hq, cat.pixels)]
    assert score("psnr", cat, border_px=8) == pytest.approx(peak_signal_noise_ratio(*cut))
    assert len({score("psnr", cat, channel=channel) for channel in ("rgb", "y", "luma")}) == 3
    assert 0 < score("ssim", cat) < 1


def test_faithfulness_is_measured_against_the_input() -> None:
    cat = subject()
    perfect = subject(pixels=cat.hq)
    assert score("degrade_again_psnr", perfect) == HIGHEST_DB > score("degrade_again_psnr", cat)
    assert score("color_drift", cat) < 0.5
    assert score("consistency_psnr", cat) > 30
    grey = subject(pixels=np.full_like(cat.hq, 128))
    assert score("color_drift", grey) > 5
    assert score("consistency_psnr", grey) < 20


def test_what_only_we_can_know_is_known_of_ours() -> None:
    assert score("diffusion_seconds", subject()) == 1.5
    assert score("seam", subject()) >= 0
    assert reason("seam", subject("other")) == "only known of our own restorations"
    assert reason("seam", subject(borders=Borders((), ()))) == "it was restored in one tile"
    assert reason("diffusion_seconds", subject(diffusion_seconds=None)) == "its time was not measured"


def test_the_reference_is_not_compared_with_itself_and_nothing_with_no_reference() -> None:
    assert reason("psnr", subject("hq")) == "hq is the reference itself"
    assert reason("ssim", subject(hq=None)) == "there is no hq picture to compare with"


def test_text_needs_somebody_who_knows_what_is_written() -> None:
    assert "it is not known what is written" in reason("text_recall", subject())
    illegible = (Word(ILLEGIBLE, ((0, 0), (9, 0), (9, 9), (0, 9))),)
    assert reason("text_recall", subject(words=illegible)) == "nothing legible is written there"
    assert reason("text_kept", subject()) == "no text is read in the input"


def test_a_picture_too_small_for_a_metric_is_a_reason() -> None:
    tiny = np.zeros((8, 8, 3), np.uint8)
    assert "it needs 11 px" in reason("ssim", subject(pixels=tiny, hq=tiny))


class Brightness(torch.nn.Module):
    def __init__(self, offset: float) -> None:
        super().__init__()
        self.lower_better, self.offset = False, offset

    def forward(self, target: torch.Tensor, ref: torch.Tensor | None = None) -> torch.Tensor:
        value = target.mean() if ref is None else (target - ref).abs().mean()
        return (value + self.offset).reshape(1)


@pytest.fixture
def pyiqa(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for pyiqa 0.1.16, without the weights of musiq; the names that were loaded."""
    loaded: list[str] = []

    def create_metric(name: str, device: Any = None, pretrained_model_path: str = "") -> Brightness:
        loaded.append(name)
        if name == "musiq" and not pretrained_model_path:
            raise OSError("no route to the hub")
        return Brightness(float("nan") if name == "piqe" else 0.0)

    module: Any = ModuleType("pyiqa")
    module.create_metric = create_metric
    module.list_models = lambda metric_mode: {"NR": ["musiq", "niqe", "piqe"], "FR": ["lpips"]}[metric_mode]
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    versions = {"pyiqa": "0.1.16"}
    monkeypatch.setattr(
        scoring.metadata,
        "version",
        lambda name: versions[name] if name in versions else metadata.distribution(name).version,
    )
    return loaded


def test_learnt_metrics_come_from_pyiqa_with_a_reference_and_without(pyiqa) -> None:
    cat = subject()
    assert score("niqe", cat) == pytest.approx(cat.pixels.mean() / 255, abs=1e-4)
    difference = np.abs(cat.pixels.astype(float) - cat.hq.astype(float)).mean() / 255
    assert score("lpips", cat) == pytest.approx(difference, abs=1e-4)


def test_a_metric_without_weights_is_missing_and_tried_once(pyiqa, tmp_path) -> None:
    scorer = Scorer([MetricConfig(name="musiq")])
    for _ in range(3):
        with pytest.raises(MissingScoreError, match=r"'musiq' cannot be loaded .*no route to the hub; give the file"):
            scorer.score("musiq", subject())
    assert pyiqa == ["musiq"]
    weights = tmp_path / "musiq.pth"
    weights.write_bytes(b"weights")
    assert score("musiq", subject(), weights={"musiq": str(weights)}) > 0


def test_a_score_that_is_no_number_is_missing(pyiqa) -> None:
    assert reason("piqe", subject()) == "piqe of this picture is nan"


def test_another_version_than_the_protocol_means_gives_no_score(pyiqa) -> None:
    assert score("niqe", subject(), libraries={"pyiqa": "0.1.16"}) > 0
    wanted = reason("niqe", subject(), libraries={"pyiqa": "0.1.13"})
    assert wanted == "the protocol means pyiqa 0.1.13, and 0.1.16 is installed"


def test_without_the_library_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "installed_version", lambda library: "")
    assert reason("lpips", subject()) == "pyiqa is not installed; pip install 'faithdiff-platform[eval]'"


def test_every_metric_of_ours_is_known_and_gives_no_other_error() -> None:
    scorer = Scorer([MetricConfig(name=name) for name in OWN_METRICS], text=TextConfig())
    words = (Word("cat", ((0, 0), (20, 0), (20, 10), (0, 10))),)
    for name in OWN_METRICS:
        of = dataclasses.replace(subject(), words=words)
        with contextlib.suppress(MissingScoreError):
            assert np.isfinite(scorer.score(name, of))
        assert describe(name)["higher_is_better"] is OWN_METRICS[name].higher_is_better

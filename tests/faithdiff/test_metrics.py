"""Quality metrics through a stand-in for pyiqa, which is no dependency: its calls, directions and failures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from faithdiff.errors import InputError
from faithdiff.metrics import no_reference_metric


class Brightness(torch.nn.Module):
    """Scores like pyiqa's InferenceModel: a tensor [B] of RGB [B, 3, H, W] in 0..1."""

    def __init__(self, *, lower_better: bool) -> None:
        super().__init__()
        self.lower_better, self.seen = lower_better, list[torch.Tensor]()

    def forward(self, target: torch.Tensor, ref: torch.Tensor | None = None) -> torch.Tensor:
        self.seen.append(target)
        return target.mean(dim=(1, 2, 3))


@pytest.fixture
def pyiqa(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, dict[str, Any]]]:
    """A module `pyiqa` with the signatures of the real one; the calls of `create_metric`."""
    calls = []

    def create_metric(metric_name: str, as_loss: bool = False, device: Any = None, **kwargs: Any) -> Brightness:
        calls.append((metric_name, device, kwargs))
        if metric_name == "musiq" and not kwargs:
            raise OSError("<urlopen error [Errno -3]\nTemporary failure in name resolution>")
        return Brightness(lower_better=metric_name == "niqe")

    def list_models(metric_mode: str | None = None, filter: str = "", exclude_filters: str = "") -> list[str]:  # noqa: A002
        return ["entropy", "musiq", "niqe"] if metric_mode == "NR" else ["entropy", "musiq", "niqe", "ssim"]

    module: Any = ModuleType("pyiqa")
    module.create_metric, module.list_models = create_metric, list_models
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    return calls


def gray(level: int) -> np.ndarray:
    return np.full((5, 7, 3), level, np.uint8)


def test_a_score_is_a_number_of_one_rgb_picture(pyiqa) -> None:
    metric = no_reference_metric("entropy")
    picture = gray(0)
    picture[..., 0] = 255
    picture.flags.writeable = False  # as the pixels of a sample are
    assert metric(picture) == pytest.approx(1 / 3)
    assert metric(picture[:, ::-1]) == pytest.approx(1 / 3), "views are pictures too"
    (pixels, _) = metric.network.seen
    assert (pixels.shape, pixels.dtype) == ((1, 3, 5, 7), torch.float32)
    assert pixels[0, :, 0, 0].tolist() == [1, 0, 0]
    assert pyiqa == [("entropy", torch.device("cpu"), {})]


@pytest.mark.parametrize(("name", "higher_is_better"), [("entropy", True), ("niqe", False)])
def test_a_threshold_is_read_in_the_direction_of_the_metric(pyiqa, name: str, higher_is_better: bool) -> None:
    metric = no_reference_metric(name)
    assert metric.higher_is_better is higher_is_better
    assert [metric.accepts(score, 5.0) for score in (4.0, 5.0, 6.0)] == [not higher_is_better, True, higher_is_better]
    assert not metric.accepts(float("nan"), 5.0)


def test_weights_of_ones_own_reach_the_metric(pyiqa, tmp_path: Path) -> None:
    weights = tmp_path / "musiq.pth"
    weights.write_bytes(b"weights")
    no_reference_metric("musiq", weights=str(weights), device="cuda")
    assert pyiqa == [("musiq", torch.device("cuda"), {"pretrained_model_path": str(weights)})]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: no_reference_metric("ssim"), r"got the metric 'ssim'; .* pyiqa has entropy, musiq, niqe"),
        (lambda: no_reference_metric("musiq"), r"cannot be loaded .* OSError: .*name resolution.*; give the file"),
        (lambda: no_reference_metric("niqe", weights="nowhere.mat"), r"weights nowhere\.mat is not a file"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(pyiqa, ask: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        ask()
    assert "\n" not in str(refusal.value)


def test_without_pyiqa_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(InputError, match=r"needs pyiqa, .*faithdiff-platform\[eval\]"):
        no_reference_metric("niqe")

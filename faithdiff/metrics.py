"""Quality of a picture through pyiqa (the extra "eval"): NIQE, MUSIQ, CLIP-IQA; with a reference LPIPS and DISTS.

    metric = no_reference_metric("musiq")
    metric(picture)                  -> 61.3, of uint8 RGB [H, W, 3]
    metric.accepts(61.3, 50.0)       -> True: MUSIQ is better when higher
    reference_metric("lpips")(picture, reference)

pyiqa fetches a metric's weights from the hub at its first use. Where there is no network, put them in its cache, or
give the file as `weights`; it is unpickled, so it must come from somebody you trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from faithdiff.errors import InputError


@dataclass(frozen=True)
class KnownMetric:
    """What is known of one of pyiqa's metrics without importing pyiqa, which takes many seconds."""

    needs_reference: bool
    higher_is_better: bool
    needs_weights: bool = True


KNOWN_METRICS: Mapping[str, KnownMetric] = MappingProxyType(
    {
        "lpips": KnownMetric(needs_reference=True, higher_is_better=False),
        "lpips-vgg": KnownMetric(needs_reference=True, higher_is_better=False),
        "dists": KnownMetric(needs_reference=True, higher_is_better=False),
        "ms_ssim": KnownMetric(needs_reference=True, higher_is_better=True, needs_weights=False),
        "fsim": KnownMetric(needs_reference=True, higher_is_better=True, needs_weights=False),
        "vif": KnownMetric(needs_reference=True, higher_is_better=True, needs_weights=False),
        "gmsd": KnownMetric(needs_reference=True, higher_is_better=False, needs_weights=False),
        "musiq": KnownMetric(needs_reference=False, higher_is_better=True),
        "clipiqa": KnownMetric(needs_reference=False, higher_is_better=True),
        "clipiqa+": KnownMetric(needs_reference=False, higher_is_better=True),
        "clipiqa+_vitL14_512": KnownMetric(needs_reference=False, higher_is_better=True),
        "maniqa-pipal": KnownMetric(needs_reference=False, higher_is_better=True),
        "paq2piq": KnownMetric(needs_reference=False, higher_is_better=True),
        "topiq_nr": KnownMetric(needs_reference=False, higher_is_better=True),
        "niqe": KnownMetric(needs_reference=False, higher_is_better=False),
        "piqe": KnownMetric(needs_reference=False, higher_is_better=False, needs_weights=False),
    }
)
"""Those that evaluations usually name; pyiqa has more."""


@dataclass(frozen=True)
class NoReferenceMetric:
    """A metric with its weights on one device."""

    name: str
    higher_is_better: bool
    network: Any

    def __call__(self, picture: NDArray[np.uint8]) -> float:
        """The score of uint8 RGB [H, W, 3], alone in its batch; nan where the metric knows no score for it."""
        with torch.no_grad():
            score = self.network(_as_batch(picture))
        return float(score.reshape(-1)[0])

    def accepts(self, score: float, threshold: float) -> bool:
        """Whether `score` is at least as good as `threshold`; nan never is."""
        return score >= threshold if self.higher_is_better else score <= threshold


@dataclass(frozen=True)
class ReferenceMetric:
    """A metric that compares with a reference, with its weights on one device."""

    name: str
    higher_is_better: bool
    network: Any

    def __call__(self, picture: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
        """The score of uint8 RGB [H, W, 3] against a reference of the same size, alone in its batch."""
        with torch.no_grad():
            score = self.network(_as_batch(picture), _as_batch(reference))
        return float(score.reshape(-1)[0])


def no_reference_metric(name: str, *, weights: str = "", device: str = "cpu") -> NoReferenceMetric:
    """The metric that pyiqa calls `name`, with its own weights or those of the file `weights`.

    Raises:
        InputError: pyiqa is not installed, knows no such metric, or cannot have or use its weights.
    """
    network = _loaded(name, weights, device, mode="NR", what="without a reference")
    return NoReferenceMetric(name, not network.lower_better, network)


def reference_metric(name: str, *, weights: str = "", device: str = "cpu") -> ReferenceMetric:
    """The metric with a reference that pyiqa calls `name`. Raises as `no_reference_metric` does."""
    network = _loaded(name, weights, device, mode="FR", what="with a reference")
    return ReferenceMetric(name, not network.lower_better, network)


def _loaded(name: str, weights: str, device: str, *, mode: str, what: str) -> Any:
    try:
        import pyiqa
    except ImportError as error:
        raise InputError(
            f"quality: the metric {name!r} needs pyiqa, which cannot be imported ({error}); "
            "install the extra: pip install 'faithdiff-platform[eval]'"
        ) from error
    known = pyiqa.list_models(metric_mode=mode)
    if name not in known:
        raise InputError(f"quality: got the metric {name!r}; {what} pyiqa has {', '.join(known)}")
    if weights and not Path(weights).is_file():
        raise InputError(f"quality: weights {weights} is not a file; give one, or nothing to fetch them")
    options = {"pretrained_model_path": weights} if weights else {}
    try:
        return pyiqa.create_metric(name, device=torch.device(device), **options)
    except Exception as error:
        origin = f"from {weights}" if weights else "from pyiqa's cache or the network"
        raise InputError(
            f"quality: the metric {name!r} cannot be loaded {origin}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}; give the file of its weights as `weights`"
        ) from error


def _as_batch(picture: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255.0

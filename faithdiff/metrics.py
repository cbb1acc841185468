"""Quality of a picture without a reference, through pyiqa (the extra "eval"): NIQE, MUSIQ, CLIP-IQA and others.

    metric = no_reference_metric("musiq")
    metric(picture)                  -> 61.3, of uint8 RGB [H, W, 3]
    metric.accepts(61.3, 50.0)       -> True: MUSIQ is better when higher

pyiqa fetches a metric's weights from the hub at its first use. Where there is no network, put them in its cache, or
give the file as `weights`; it is unpickled, so it must come from somebody you trust.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from faithdiff.errors import InputError


@dataclass(frozen=True)
class NoReferenceMetric:
    """A metric with its weights on one device."""

    name: str
    higher_is_better: bool
    network: Any

    def __call__(self, picture: NDArray[np.uint8]) -> float:
        """The score of uint8 RGB [H, W, 3], alone in its batch; nan where the metric knows no score for it."""
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255.0
        with torch.no_grad():
            score = self.network(pixels)
        return float(score.reshape(-1)[0])

    def accepts(self, score: float, threshold: float) -> bool:
        """Whether `score` is at least as good as `threshold`; nan never is."""
        return score >= threshold if self.higher_is_better else score <= threshold


def no_reference_metric(name: str, *, weights: str = "", device: str = "cpu") -> NoReferenceMetric:
    """The metric that pyiqa calls `name`, with its own weights or those of the file `weights`.

    Raises:
        InputError: pyiqa is not installed, knows no such metric, or cannot have or use its weights.
    """
    try:
        import pyiqa
    except ImportError as error:
        raise InputError(
            f"quality: the metric {name!r} needs pyiqa, which cannot be imported ({error}); "
            "install the extra: pip install 'faithdiff-platform[eval]'"
        ) from error
    known = pyiqa.list_models(metric_mode="NR")
    if name not in known:
        raise InputError(f"quality: got the metric {name!r}; without a reference pyiqa has {', '.join(known)}")
    if weights and not Path(weights).is_file():
        raise InputError(f"quality: weights {weights} is not a file; give one, or nothing to fetch them")
    options = {"pretrained_model_path": weights} if weights else {}
    try:
        network = pyiqa.create_metric(name, device=torch.device(device), **options)
    except Exception as error:
        origin = f"from {weights}" if weights else "from pyiqa's cache or the network"
        raise InputError(
            f"quality: the metric {name!r} cannot be loaded {origin}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}; give the file of its weights as `weights`"
        ) from error
    return NoReferenceMetric(name, not network.lower_better, network)

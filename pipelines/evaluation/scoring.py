"""The metrics: what each needs, how a picture is scored, and why a score is missing.

    scorer = Scorer(metrics, text=TextConfig(), weights={}, libraries={}, device="cpu")
    scorer.score("psnr", subject)       -> 27.4; raises MissingScoreError with the reason where there is none

A metric whose library, weights or input cannot be had gives a reason, never a number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np
import pydantic
from numpy.typing import NDArray

from faithdiff.errors import InputError
from faithdiff.fidelity import Channel, color_drift, degrade_again_db, psnr_db, ssim
from faithdiff.metrics import KNOWN_METRICS, NoReferenceMetric, ReferenceMetric, no_reference_metric, reference_metric
from faithdiff.pictures import input_consistency_db
from faithdiff.seams import Borders, seam_score
from pipelines.evaluation.score_table import OURS, REFERENCE, ScoreTable
from pipelines.evaluation.text_reading import (
    ILLEGIBLE,
    READER_LIBRARY,
    Matches,
    Reader,
    TextConfig,
    UnavailableReaderError,
    Word,
    match,
)
from sr_platform.config import StrictConfig

Picture = NDArray[np.uint8]
_READINGS_KEPT = 8


class MetricConfig(StrictConfig):
    """One metric: one of ours, or pyiqa's of that name."""

    name: str
    """Such as psnr, ssim, lpips, musiq, consistency_psnr, color_drift, seam, text_recall, diffusion_seconds."""
    channel: Channel = "rgb"
    """Of psnr and ssim: rgb, y (BT.601, 16..235, not rounded) or luma (0..255, rounded)."""
    border_px: pydantic.NonNegativeInt = 0
    """Of psnr and ssim: pixels cut off on every side."""
    clip_contrast: bool = False
    """Of ssim: count negative products of contrast and structure as 0, as pyiqa does."""


_IS_REFERENCE = "hq is the reference itself"
_ONLY_OURS = "only known of our own restorations"
_ONE_TILE = "it was restored in one tile"
NOT_APPLICABLE = frozenset({_IS_REFERENCE, _ONLY_OURS, _ONE_TILE})
"""Reasons for which nothing is missing: there is nothing to measure."""


def applies(table: ScoreTable, method: str, metric: str) -> bool:
    """False where no picture of the method can have that score."""
    reasons = table.missing(method, metric)
    return sum(reasons.values()) < len(table.pictures) or not set(reasons) <= NOT_APPLICABLE


class MissingScoreError(Exception):
    """There is no score; the message says why."""


@dataclass(frozen=True)
class OwnMetric:
    """What is known of a metric that is computed here."""

    needs_reference: bool
    higher_is_better: bool
    unit: str = ""
    only_ours: bool = False
    """Needs to know how the picture was restored."""
    version: int = 1
    """Raised whenever a value changes."""


OWN_METRICS: Mapping[str, OwnMetric] = {
    "psnr": OwnMetric(True, True, "dB"),
    "ssim": OwnMetric(True, True),
    "consistency_psnr": OwnMetric(False, True, "dB"),
    "degrade_again_psnr": OwnMetric(False, True, "dB"),
    "color_drift": OwnMetric(False, False, "Delta E"),
    "seam": OwnMetric(False, False, "grey levels", only_ours=True),
    "text_precision": OwnMetric(False, True),
    "text_recall": OwnMetric(False, True),
    "text_kept": OwnMetric(False, True),
    "diffusion_seconds": OwnMetric(False, False, "s", only_ours=True),
}


@dataclass(frozen=True)
class Subject:
    """One picture of one method, and everything that it may be compared with."""

    method: str
    name: str
    pixels: Picture
    """At the final size."""
    lq: Picture
    """As it came."""
    lq_enlarged: Picture
    hq: Picture | None = None
    words: tuple[Word, ...] | None = None
    """What is known to be written there; None where nothing is known."""
    degradation: str = ""
    degradation_seed: int = 0
    borders: Borders | None = None
    """Of tiles, where it was restored in tiles by us."""
    diffusion_seconds: float | None = None


def library_of(metric: str) -> str:
    """The library that computes a metric; empty for ours."""
    if metric.startswith("text_"):
        return READER_LIBRARY
    return "pyiqa" if metric in KNOWN_METRICS else ""


def needs_reference(metric: str) -> bool:
    known = OWN_METRICS.get(metric) or KNOWN_METRICS[metric]
    return known.needs_reference


def describe(metric: str) -> dict[str, Any]:
    """Of the report's header: name, direction, unit."""
    known = OWN_METRICS.get(metric) or KNOWN_METRICS[metric]
    return {"name": metric, "higher_is_better": known.higher_is_better, "unit": getattr(known, "unit", "")}


def installed_version(library: str) -> str:
    """Empty where it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


@dataclass
class Scorer:
    """All metrics of a protocol in one process; what they need is loaded when it is first needed."""

    metrics: Sequence[MetricConfig]
    text: TextConfig = field(default_factory=TextConfig)
    weights: Mapping[str, str] = field(default_factory=dict)
    """Metric, `detector` or `recogniser` -> file."""
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Library -> the version that is meant."""
    device: str = "cpu"
    _readings: dict[bytes, list[Word]] = field(default_factory=dict)

    def score(self, metric: str, subject: Subject) -> float:
        """Raises MissingScoreError, with the reason, where there is no score."""
        cfg = next(cfg for cfg in self.metrics if cfg.name == metric)
        if needs_reference(metric) and subject.method == REFERENCE:
            raise MissingScoreError(_IS_REFERENCE)
        if needs_reference(metric) and subject.hq is None:
            raise MissingScoreError("there is no hq picture to compare with")
        about = OWN_METRICS.get(metric)
        if about is not None and about.only_ours and subject.method != OURS:
            raise MissingScoreError(_ONLY_OURS)
        self._check_library(metric)
        compute: Callable[[Subject], float] = getattr(self, f"_{metric}", None) or functools.partial(self._pyiqa, cfg)
        if metric in ("psnr", "ssim"):
            compute = functools.partial(_with_reference, cfg)
        try:
            value = compute(subject)
        except (InputError, UnavailableReaderError) as error:
            raise MissingScoreError(" ".join(str(error).split())) from error
        if not math.isfinite(value):
            raise MissingScoreError(f"{metric} of this picture is {value}")
        return value

    def _check_library(self, metric: str) -> None:
        library = library_of(metric)
        wanted, found = self.libraries.get(library, ""), installed_version(library) if library else ""
        if library and not found:
            raise MissingScoreError(f"{library} is not installed; pip install 'faithdiff-platform[eval]'")
        if wanted and wanted != found:
            raise MissingScoreError(f"the protocol means {library} {wanted}, and {found} is installed")

    def _consistency_psnr(self, subject: Subject) -> float:
        return input_consistency_db(subject.pixels, subject.lq)

    def _degrade_again_psnr(self, subject: Subject) -> float:
        key, seed = subject.name, subject.degradation_seed
        return degrade_again_db(subject.pixels, subject.lq, subject.degradation, key=key, seed=seed)

    def _color_drift(self, subject: Subject) -> float:
        return color_drift(subject.pixels, subject.lq)

    def _seam(self, subject: Subject) -> float:
        if subject.borders is None or not subject.borders.num_borders:
            raise MissingScoreError(_ONE_TILE)
        return seam_score(subject.pixels, subject.borders).levels

    def _diffusion_seconds(self, subject: Subject) -> float:
        if subject.diffusion_seconds is None:
            raise MissingScoreError("its time was not measured")
        return subject.diffusion_seconds

    def _text_precision(self, subject: Subject) -> float:
        return self._matches(subject).precision

    def _text_recall(self, subject: Subject) -> float:
        return self._matches(subject).recall

    def _text_kept(self, subject: Subject) -> float:
        before = self._read(subject.lq_enlarged)
        if not before:
            raise MissingScoreError("no text is read in the input")
        return match(before, self._read(subject.pixels), min_overlap=self.text.min_overlap).recall

    def _matches(self, subject: Subject) -> Matches:
        if subject.words is None:
            raise MissingScoreError(
                "it is not known what is written there: no .words.json or gt_*.txt beside the picture"
            )
        if all(word.text == ILLEGIBLE for word in subject.words):
            raise MissingScoreError("nothing legible is written there")
        return match(subject.words, self._read(subject.pixels), min_overlap=self.text.min_overlap)

    def _read(self, picture: Picture) -> list[Word]:
        """Several metrics read the same pictures: the last few are remembered."""
        key = picture.tobytes()
        if key not in self._readings:
            while len(self._readings) >= _READINGS_KEPT:
                self._readings.pop(next(iter(self._readings)))
            self._readings[key] = self._reader.read(picture)
        return self._readings[key]

    @functools.cached_property
    def _reader(self) -> Reader:
        files = {name: self.weights[name] for name in ("detector", "recogniser") if name in self.weights}
        return Reader(self.text, **files)

    def _pyiqa(self, cfg: MetricConfig, subject: Subject) -> float:
        metric = self._learnt(cfg.name)
        if isinstance(metric, ReferenceMetric):
            assert subject.hq is not None
            return metric(subject.pixels, subject.hq)
        return metric(subject.pixels)

    @functools.cached_property
    def _loaded(self) -> dict[str, NoReferenceMetric | ReferenceMetric | InputError]:
        return {}

    def _learnt(self, name: str) -> NoReferenceMetric | ReferenceMetric:
        """Loaded once; a metric that cannot be loaded is not tried again for every picture."""
        if name not in self._loaded:
            load = reference_metric if KNOWN_METRICS[name].needs_reference else no_reference_metric
            try:
                self._loaded[name] = load(name, weights=self.weights.get(name, ""), device=self.device)
            except InputError as error:
                self._loaded[name] = error
        found = self._loaded[name]
        if isinstance(found, InputError):
            raise found
        return found


def _with_reference(cfg: MetricConfig, subject: Subject) -> float:
    assert subject.hq is not None
    where: dict[str, Any] = {"channel": cfg.channel, "border_px": cfg.border_px}
    if cfg.name == "psnr":
        return psnr_db(subject.pixels, subject.hq, **where)
    return ssim(subject.pixels, subject.hq, clip_contrast=cfg.clip_contrast, **where)

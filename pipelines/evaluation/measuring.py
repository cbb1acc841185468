"""Second stage of evaluate.py: every metric of every method's picture.  restore > [score]

In : a row per picture, with what was restored and where other methods' outputs lie.
Out: a row per picture: {"number": int, "name": str, "about": JSON of the picture, "scores": JSON of Score rows}.

A score is remembered in the cache by the pixels and by all that the metric depends on; a missing one is not, because
its library or weights may be there next time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from faithdiff.degradation import find_recipe
from faithdiff.pictures import upscale_lq
from pipelines.evaluation.pictures import EvaluationPicture, Loaded, Place, load, pixels_digest
from pipelines.evaluation.protocol import EvaluateConfig, metric_record
from pipelines.evaluation.restoring import Restored, publish_picture, restored_pixels
from pipelines.evaluation.score_table import INPUT, OURS, REFERENCE
from pipelines.evaluation.scoring import MissingScoreError, Scorer, Subject, installed_version, library_of
from pipelines.stages.decode import UnreadablePictureError, decode_picture
from sr_platform.errors import InputDataError
from sr_platform.shards import json_digest
from sr_platform.storage import open_storage

Picture = NDArray[np.uint8]
MAX_PIXELS = 200_000_000
_MEASURED_METRICS = ("diffusion_seconds",)
"""Not remembered here: the restoration's own record has them."""


class Score(NamedTuple):
    """A row of scores.parquet."""

    method: str
    picture: str
    metric: str
    value: float | None
    reason: str | None
    seconds: float


class Measure:
    """One process with the metrics."""

    def __init__(self, cfg: Mapping[str, Any], *, weights: Mapping[str, str], report: str, cache: str) -> None:
        self.cfg = EvaluateConfig.model_validate(cfg)
        self.weight_digests = dict(weights)
        self.report, self.cache = open_storage(report), open_storage(cache)
        self.scorer = Scorer(
            self.cfg.metrics,
            text=self.cfg.text,
            weights=self.cfg.weight_files,
            libraries=self.cfg.libraries,
            device="cuda" if self.cfg.workers.scorer_num_gpus else "cpu",
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = []
        for row in table.to_pylist():
            loaded = load(EvaluationPicture.parse(row["picture"]), self.cfg)
            outputs = {name: Place(**place) for name, place in json.loads(row["outputs"]).items()}
            restored = Restored.parse(row["restored"]) if row["restored"] else None
            scores = [score for method in self._methods(loaded, restored, outputs) for score in method]
            about = {
                "name": loaded.name,
                "width_px": loaded.lq.shape[1] * self.cfg.restoration.scale,
                "height_px": loaded.lq.shape[0] * self.cfg.restoration.scale,
                "lq_digest": pixels_digest(loaded.lq),
                "num_words": None if loaded.words is None else len(loaded.words),
            }
            rows.append({"number": row["number"], "about": json.dumps(about), "scores": json.dumps(scores)})
        return pa.Table.from_pylist(rows, schema=MEASURED_SCHEMA)

    def _methods(
        self, loaded: Loaded, restored: Restored | None, outputs: Mapping[str, Place]
    ) -> Iterator[list[Score]]:
        """The scores of each method, ours first."""
        enlarged = upscale_lq(loaded.lq, self.cfg.restoration.scale)
        if restored is not None:
            yield self._ours(loaded, enlarged, restored)
        yield self._scored(self._subject(INPUT, loaded, enlarged, enlarged))
        if loaded.hq is not None:
            yield self._scored(self._subject(REFERENCE, loaded, enlarged, loaded.hq))
        for method in self.cfg.methods:
            yield self._others(method, loaded, enlarged, outputs.get(method))

    def _ours(self, loaded: Loaded, enlarged: Picture, restored: Restored) -> list[Score]:
        if restored.problem:
            return self._missing(OURS, loaded.name, restored.problem)
        pixels = restored_pixels(self.cache, restored)
        publish_picture(self.report, OURS, loaded.name, pixels)
        about = {"borders": restored.tile_borders, "diffusion_seconds": restored.seconds.get("diffusion")}
        return self._scored(self._subject(OURS, loaded, enlarged, pixels, **about))

    def _others(self, method: str, loaded: Loaded, enlarged: Picture, place: Place | None) -> list[Score]:
        if place is None:
            return self._missing(method, loaded.name, f"{method} has no picture of this name")
        try:
            pixels = decode_picture(place.read(), max_pixels=MAX_PIXELS)
        except (UnreadablePictureError, InputDataError) as error:
            return self._missing(method, loaded.name, f"{place.name} cannot be read: {error}")
        if pixels.shape != enlarged.shape:
            sizes = f"{pixels.shape[1]}x{pixels.shape[0]} px, and {enlarged.shape[1]}x{enlarged.shape[0]} px are needed"
            return self._missing(method, loaded.name, f"{place.name} has {sizes}")
        publish_picture(self.report, method, loaded.name, pixels)
        return self._scored(self._subject(method, loaded, enlarged, pixels))

    def _subject(self, method: str, loaded: Loaded, enlarged: Picture, pixels: Picture, **about: Any) -> Subject:
        return Subject(
            method=method,
            name=loaded.name,
            pixels=pixels,
            lq=loaded.lq,
            lq_enlarged=enlarged,
            hq=loaded.hq,
            words=loaded.words,
            degradation=self.cfg.degradation,
            degradation_seed=self.cfg.degradation_seed,
            **about,
        )

    def _missing(self, method: str, name: str, reason: str) -> list[Score]:
        return [Score(method, name, metric.name, None, reason, 0.0) for metric in self.cfg.metrics]

    def _scored(self, subject: Subject) -> list[Score]:
        file = f"scores/{self._subject_key(subject)}.json"
        known: dict[str, list[float]] = json.loads(self.cache.read_bytes(file)) if self.cache.exists(file) else {}
        num_known, scores = len(known), []
        for metric in self.cfg.metrics:
            key, value, reason, start = self._metric_key(metric.name), None, None, time.perf_counter()
            if key in known:
                value, seconds = known[key]
                scores.append(Score(subject.method, subject.name, metric.name, value, None, seconds))
                continue
            try:
                value = self.scorer.score(metric.name, subject)
            except MissingScoreError as error:
                reason = str(error)
            seconds = time.perf_counter() - start
            scores.append(Score(subject.method, subject.name, metric.name, value, reason, seconds))
            if value is not None and metric.name not in _MEASURED_METRICS:
                known[key] = [value, seconds]
        if len(known) > num_known:
            self.cache.write_bytes_atomic(file, json.dumps(known).encode())
        return scores

    def _subject_key(self, subject: Subject) -> str:
        """Of everything that a score of this picture may depend on besides the metric."""
        borders = subject.borders and [subject.borders.rows, subject.borders.columns]
        pixels = [
            pixels_digest(p) for p in (subject.pixels, subject.lq) + (() if subject.hq is None else (subject.hq,))
        ]
        words = None if subject.words is None else [[word.text, word.box] for word in subject.words]
        return json_digest([subject.name, pixels, borders, words])

    def _metric_key(self, metric: str) -> str:
        """Of everything that a metric depends on besides the picture."""
        cfg = next(cfg for cfg in self.cfg.metrics if cfg.name == metric)
        library = library_of(metric)
        about: dict[str, Any] = {"metric": metric, "rules": metric_record(cfg), "scale": self.cfg.restoration.scale}
        if library:
            given = {
                name: digest for name, digest in self.weight_digests.items() if name == metric or library != "pyiqa"
            }
            about |= {"library": [library, installed_version(library)], "weights": given}
        if metric.startswith("text_"):
            about["text"] = self.cfg.text.model_dump(mode="json")
        if metric == "degrade_again_psnr":
            about["degradation"] = [find_recipe(self.cfg.degradation).as_dict(), self.cfg.degradation_seed]
        return json_digest(about)


MEASURED_SCHEMA = pa.schema([("number", pa.int64()), ("about", pa.string()), ("scores", pa.string())])

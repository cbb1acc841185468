"""Stage 2: measures pictures, so that the driver can decide which to use.  ingest > [filter] > crop > caption > ...

In : pictures as files.
Out: one row of `Facts` per picture, without its pixels. What is a reason to leave a picture out depends on the recipe
and, for duplicates and limits, on the whole run: `judge` is the part that needs one picture only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import cv2
import imagehash
import numpy as np
import pyarrow as pa
import pydantic
import ray.data
from numpy.typing import NDArray
from PIL import Image

from pipelines.sources import QualityConfig, SourceConfig, source_of
from pipelines.stages.decode import UnreadablePictureError, decode_picture
from pipelines.stages.sample import Sample, map_shards, read_table
from pipelines.stages.workers import WorkersConfig
from sr_platform.config import StrictConfig

HASH_SIDE = 16
"""A perceptual hash has 16 x 16 bits."""
_HASHED_SIDE_PX = 256


class FilterConfig(StrictConfig):
    """Which pictures are worth training on. `source.quality` adds a learnt metric where a source wants one."""

    min_side_px: Annotated[int, pydantic.Field(ge=16)] = 512
    """Shorter side of the smallest picture; at least the crop size."""
    max_pixels: pydantic.PositiveInt = 200_000_000
    """Height times width of the largest picture that is decoded at all."""
    min_deviation: pydantic.NonNegativeFloat = 5.0
    """Standard deviation of the gray levels (0..255) below which a picture is too flat."""
    min_sharpness: pydantic.NonNegativeFloat = 0.0
    """Variance of the Laplacian of the gray levels below which a picture is too blurred; 0 accepts any."""
    duplicate_bits: Annotated[int, pydantic.Field(ge=-1, le=64)] = 16
    """Of the 256 bits of their perceptual hashes, how many two pictures may differ in and still count as one; -1 keeps
    near duplicates. Files of equal content are always taken once."""


@dataclass(frozen=True)
class Facts:
    """What was measured about one picture. `problem` says why nothing more is known."""

    name: str
    sha256: str = ""
    height_px: int = 0
    width_px: int = 0
    deviation: float = 0.0
    sharpness: float = 0.0
    phash: str = ""
    """256 bits in hexadecimal."""
    quality: float | None = None
    """By the metric of the picture's source, if it names one."""
    problem: str = ""


_ARROW_TYPES = {"int": pa.int64(), "str": pa.string(), "float": pa.float64(), "float | None": pa.float64()}
FACTS_SCHEMA = pa.schema([(field.name, _ARROW_TYPES[str(field.type)]) for field in dataclasses.fields(Facts)])


def facts_table(facts: list[Facts]) -> pa.Table:
    return pa.Table.from_pylist([vars(fact) for fact in facts], schema=FACTS_SCHEMA)


class Filter:
    """Decodes each picture and measures it."""

    def __init__(self, max_pixels: int, qualities: Mapping[str, QualityConfig]) -> None:
        self.max_pixels, self.qualities = max_pixels, dict(qualities)

    def __call__(self, table: pa.Table) -> pa.Table:
        cv2.setNumThreads(1)
        return facts_table([self.measure(sample) for sample in read_table(table)])

    def measure(self, sample: Sample) -> Facts:
        """The facts of one picture."""
        known = Facts(sample.source, sample.source_sha256, problem=sample.problem)
        if sample.problem:
            return known
        try:
            picture = decode_picture(sample.data, max_pixels=self.max_pixels)
        except UnreadablePictureError as error:
            return dataclasses.replace(known, problem=f"unreadable: {error}")
        gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        return dataclasses.replace(
            known,
            height_px=picture.shape[0],
            width_px=picture.shape[1],
            deviation=gray_deviation(gray),
            sharpness=float(cv2.meanStdDev(cv2.Laplacian(gray, cv2.CV_32F))[1].item() ** 2),
            phash=perceptual_hash(gray),
            quality=self._quality(sample.source, picture),
        )

    def _quality(self, name: str, picture: NDArray[np.uint8]) -> float | None:
        quality = self.qualities.get(source_of(name))
        return None if quality is None else round(_metric(quality)(picture), 6)


def judge(facts: Facts, cfg: FilterConfig, source: SourceConfig) -> str:
    """Why this picture is left out, as "reason: detail", as far as one can say without the others; else empty."""
    if facts.problem:
        return facts.problem
    if min(facts.height_px, facts.width_px) < cfg.min_side_px:
        return f"too small: {facts.width_px}x{facts.height_px} px, less than {cfg.min_side_px} px"
    if facts.deviation < cfg.min_deviation:
        return f"too flat: gray levels deviate by {facts.deviation:.1f}, less than {cfg.min_deviation}"
    if facts.sharpness < cfg.min_sharpness:
        return f"too blurred: sharpness {facts.sharpness:.1f}, less than {cfg.min_sharpness}"
    if source.quality and facts.quality is not None and not source.quality.accepts(facts.quality):
        return f"low quality: {source.quality.metric} {facts.quality:.4f}, not {source.quality.wanted}"
    return ""


def gray_deviation(gray: NDArray[np.uint8]) -> float:
    """Standard deviation of gray levels [H, W], 0..128."""
    return float(cv2.meanStdDev(gray)[1].item())


def perceptual_hash(gray: NDArray[np.uint8]) -> str:
    """pHash of 256 bits: signs of the lowest 16 x 16 cosine coefficients around their median."""
    reduced = cv2.resize(gray, (_HASHED_SIDE_PX, _HASHED_SIDE_PX), interpolation=cv2.INTER_AREA)
    return str(imagehash.phash(Image.fromarray(reduced), hash_size=HASH_SIDE))


def filter_stage(
    ds: ray.data.Dataset, cfg: FilterConfig, workers: WorkersConfig, *, sources: list[SourceConfig]
) -> ray.data.Dataset:
    qualities = {source.name: source.quality for source in sources if source.quality}
    stage = Filter(cfg.max_pixels, qualities)
    return map_shards(
        ds, stage.__call__, num_cpus=workers.num_cpus, name="filter", num_gpus=workers.filter_num_gpus or None
    )


@functools.lru_cache(maxsize=4)
def _metric(quality: QualityConfig) -> Callable[[Any], float]:
    # Once per process: Ray reuses its workers. Here, because pyiqa and torch take seconds to import.
    from faithdiff.metrics import no_reference_metric

    return no_reference_metric(quality.metric, weights=quality.weights)

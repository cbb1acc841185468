"""Stage 6: publishes shards.  ingest > filter > crop > caption > degrade > [write]

In : all rows of a shard.
Out: one row per shard, its `ShardReport` as JSON; the shard itself lies under its final name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import cv2
import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray

from pipelines.stages.sample import Sample, WorkersConfig, map_shards, read_table
from sr_platform.config import StrictConfig
from sr_platform.shards import ShardInfo, pack_shard
from sr_platform.storage import open_storage


class Rejection(StrictConfig):
    """One line of quarantine.jsonl."""

    source: str
    key: str
    """Of the crop; empty when the whole picture was left out."""
    reason: str
    detail: str


class ShardReport(StrictConfig):
    """What became of the pictures of one shard."""

    index: int
    shard: ShardInfo | None
    """None when nothing of it was usable: then no file is written."""
    rejections: list[Rejection]
    picture_sha256: dict[str, str]
    """Contents of every picture that could be read, by name."""


class Write:
    """Packs the samples of one shard and publishes it atomically; doing it again gives the same bytes."""

    def __init__(self, out_uri: str, *, name: str, about: dict[str, object]) -> None:
        self.storage = open_storage(out_uri)
        self.name, self.about = name, about

    def __call__(self, table: pa.Table) -> pa.Table:
        shards: dict[int, list[Sample]] = {}
        for sample in read_table(table):
            shards.setdefault(sample.shard, []).append(sample)
        reports = [self.publish(index, samples) for index, samples in sorted(shards.items())]
        return pa.table({"report": pa.array([report.model_dump_json() for report in reports], pa.string())})

    def publish(self, index: int, samples: Sequence[Sample]) -> ShardReport:
        """Writes one shard and reports it."""
        sources = {sample.source for sample in samples}
        if len(sources) != samples[0].num_pictures:
            raise RuntimeError(
                f"write: shard {index} arrived with {len(sources)} of its {samples[0].num_pictures} pictures: "
                "a block was split on its way; nothing was written"
            )
        usable = [sample for sample in samples if not sample.problem]
        return ShardReport(
            index=index,
            shard=self._write(index, usable) if usable else None,
            rejections=[_rejection(sample) for sample in samples if sample.problem],
            picture_sha256={sample.source: sample.source_sha256 for sample in samples if sample.source_sha256},
        )

    def _write(self, index: int, samples: Sequence[Sample]) -> ShardInfo:
        data = pack_shard((sample.key, self._members(sample)) for sample in samples)
        name = f"shards/{self.name}-{index:06d}.tar"
        self.storage.write_bytes_atomic(name, data)
        digest = hashlib.sha256(data).hexdigest()
        return ShardInfo(name=name, sha256=digest, num_samples=len(samples), size_bytes=len(data))

    def _members(self, sample: Sample) -> dict[str, bytes]:
        about = {
            **self.about,
            "caption": sample.caption,
            "source": sample.source,
            "source_sha256": sample.source_sha256,
            "source_size": [sample.source_height_px, sample.source_width_px],
            "size": [sample.height_px, sample.width_px],
            "crop": [sample.top_px, sample.left_px],
        }
        return {
            "hq.png": encode_png(sample.hq_pixels()),
            "lq.png": encode_png(sample.lq_pixels()),
            "json": json.dumps(about, sort_keys=True).encode(),
        }


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """uint8 RGB [H, W, 3] as a PNG file; equal pixels give equal bytes."""
    done, data = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    assert done, "libpng refused an 8-bit RGB picture"
    return data.tobytes()


def write_stage(
    ds: ray.data.Dataset, out_uri: str, workers: WorkersConfig, *, name: str, about: dict[str, object]
) -> ray.data.Dataset:
    """`about` is written into every sample's json."""
    return map_shards(ds, Write(out_uri, name=name, about=about).__call__, num_cpus=workers.num_cpus)


def _rejection(sample: Sample) -> Rejection:
    reason, _, detail = sample.problem.partition(": ")
    return Rejection(source=sample.source, key=sample.key, reason=reason, detail=detail)

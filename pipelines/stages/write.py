"""Stage 7: publishes shards.  ingest > filter > crop > caption > degrade > encode > [write]

In : all rows of a shard.
Out: one row per shard, what became of it in numbers; the shard itself lies under its final name, its marker beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray

from pipelines.sources import source_of
from pipelines.stages.sample import Sample, map_shards, read_table
from pipelines.stages.workers import WorkersConfig
from sr_platform.publication import Rejection, publish_shard
from sr_platform.shards import pack_shard
from sr_platform.storage import open_storage


class Write:
    """Packs the samples of one shard and publishes it exactly once; with `out_uri` None it only packs, to be timed."""

    def __init__(
        self, out_uri: str | None, *, name: str, about: Mapping[str, object], groups: Mapping[str, str], plan: str = ""
    ) -> None:
        self.out_uri, self.name, self.about, self.groups, self.plan = out_uri, name, dict(about), dict(groups), plan

    def __call__(self, table: pa.Table) -> pa.Table:
        shards: dict[int, list[Sample]] = {}
        for sample in read_table(table):
            shards.setdefault(sample.shard, []).append(sample)
        rows = [self.publish(index, samples) for index, samples in sorted(shards.items())]
        return pa.Table.from_pylist(rows)

    def publish(self, index: int, samples: Sequence[Sample]) -> dict[str, object]:
        """Writes one shard; returns its number, its samples and bytes, and how many rows were left out and why."""
        sources = {sample.source for sample in samples}
        if len(sources) != samples[0].num_pictures:
            raise RuntimeError(
                f"write: shard {index} arrived with {len(sources)} of its {samples[0].num_pictures} pictures: "
                "a block was split on its way; nothing was written"
            )
        usable = [sample for sample in samples if not sample.problem]
        members = ((sample.key, self.members(sample)) for sample in usable)
        rejections = [rejection(sample) for sample in samples if sample.problem]
        if self.out_uri is None:
            size_bytes = len(pack_shard(members).data)
        else:
            report = publish_shard(
                open_storage(self.out_uri),
                name=self.name,
                index=index,
                plan=self.plan,
                samples=members,
                groups={sample.key: self.groups.get(source_of(sample.source), "") for sample in usable},
                rejections=rejections,
            )
            size_bytes = report.shard.size_bytes if report.shard else 0
        left_out = json.dumps([[r.source, r.reason, r.detail] for r in rejections])
        return {"index": index, "num_samples": len(usable), "size_bytes": size_bytes, "left_out": left_out}

    def members(self, sample: Sample) -> dict[str, bytes]:
        """The files of one sample by suffix."""
        about = {
            **self.about,
            "caption": sample.caption,
            "source": sample.source,
            "source_sha256": sample.source_sha256,
            "source_size": [sample.source_height_px, sample.source_width_px],
            "size": [sample.height_px, sample.width_px],
            "crop": [sample.top_px, sample.left_px],
            **({"meta": json.loads(sample.meta)} if sample.meta else {}),
            **({"degradation": json.loads(sample.trace)} if sample.trace else {}),
        }
        files = {"hq.png": encode_png(sample.hq_pixels()), "json": json.dumps(about, sort_keys=True).encode()}
        for variant, lq in enumerate(sample.lq_pixels()):
            files[lq_suffix(variant)] = encode_png(lq)
        if sample.latents:
            files["latents.safetensors"] = sample.latents
        return files


def lq_suffix(variant: int) -> str:
    """lq.png, lq1.png, lq2.png, ..."""
    return f"lq{variant or ''}.png"


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """uint8 RGB [H, W, 3] as a PNG file; equal pixels give equal bytes.

    OpenCV's default, run-length coding, takes a fifth of the time of zlib's level 6 for files 3 % larger.
    """
    done, data = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    assert done, "libpng refused an 8-bit RGB picture"
    return data.tobytes()


def rejection(sample: Sample) -> Rejection:
    """The sample's line of quarantine.jsonl."""
    return rejected(sample.source, sample.problem, key=sample.key)


def rejected(source: str, problem: str, *, key: str = "") -> Rejection:
    """A line of quarantine.jsonl from a problem, "reason: detail"."""
    reason, _, detail = problem.partition(": ")
    return Rejection(source=source, key=key, reason=reason, detail=detail)


def write_stage(
    ds: ray.data.Dataset,
    out_uri: str | None,
    workers: WorkersConfig,
    *,
    name: str,
    about: Mapping[str, object],
    groups: Mapping[str, str],
    plan: str,
) -> ray.data.Dataset:
    """`about` is written into every sample's json; `groups` maps sources to what the recipe mixes by."""
    stage = Write(out_uri, name=name, about=about, groups=groups, plan=plan)
    return map_shards(ds, stage.__call__, num_cpus=workers.num_cpus, name="write")

"""Pictures -> training shards: ingest > filter > crop > caption > degrade > write, on Ray Data.

In : any folder tree of pictures, local or s3://; a .txt or .json of the same name beside a picture is its caption.
Out: URI/shards/<name>-000000.tar, URI/quarantine.jsonl and, last, URI/manifest.json.

    python pipelines/prepare.py prepare_nano.yaml --input photographs/ --out out/data

The pictures, sorted by name, are dealt to shards before anything runs. The same pictures, recipe and seed give the same
bytes, whatever the number of workers; running the finished command again does nothing.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pydantic
from tqdm import tqdm

from faithdiff.errors import InputError
from sr_platform import cluster
from sr_platform.config import StrictConfig, load_config, run_job
from sr_platform.errors import ConfigError, InputDataError, RequestError
from sr_platform.shards import (
    MANIFEST_NAME,
    QUARANTINE_NAME,
    Manifest,
    Source,
    json_digest,
    make_manifest,
    read_manifest,
    write_manifest,
)
from sr_platform.storage import Storage, open_storage

# isort: split
# Ray reads its environment when it is imported, and `cluster` sets it.
import ray.data
from ray.exceptions import RayTaskError

from pipelines.stages.caption import CaptionConfig, caption_stage, check_captioner
from pipelines.stages.crop import CropConfig, crop_stage
from pipelines.stages.degrade import DegradeConfig, degrade_stage
from pipelines.stages.filter import FilterConfig, filter_stage
from pipelines.stages.ingest import IngestConfig, Picture, find_pictures, ingest_stage, plan_row
from pipelines.stages.sample import WorkersConfig
from pipelines.stages.write import ShardReport, write_stage

PLAN_NAME = "plan.json"
"""Written first: what is being made here, so that another recipe is refused rather than mixed in."""

_NOT_CONTENT = {"input", "out", "workers"}


class PrepareConfig(StrictConfig):
    """From pictures to shards."""

    input: str
    """Folder of pictures: a path, file:// or s3:// URI."""
    out: str
    """Where the dataset goes: a path, file:// or s3:// URI."""
    name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_-]+$")] = "data"
    """Shards are called <name>-000000.tar."""
    seed: pydantic.NonNegativeInt = 0
    """Everything random derives from it and the name of the picture."""
    pictures_per_shard: pydantic.PositiveInt = 32
    source: IngestConfig = IngestConfig()
    filter: FilterConfig = FilterConfig()
    crop: CropConfig = CropConfig()
    caption: CaptionConfig = CaptionConfig()
    degrade: DegradeConfig = DegradeConfig()
    workers: WorkersConfig = WorkersConfig()

    @pydantic.model_validator(mode="after")
    def _crops_fit(self) -> PrepareConfig:
        if self.filter.min_side_px < self.crop.size_px:
            raise ValueError(
                f"filter.min_side_px is {self.filter.min_side_px}, smaller than crop.size_px {self.crop.size_px}; "
                "raise the one or lower the other"
            )
        return self

    def recipe(self) -> dict[str, Any]:
        """The settings that decide the content of the shards; not where they lie or who works on them."""
        return self.model_dump(mode="json", exclude=_NOT_CONTENT)


@dataclass(frozen=True)
class Plan:
    """Which pictures go into which shard, decided before anything runs."""

    recipe: dict[str, Any]
    pictures: list[Picture]
    pictures_per_shard: int

    def shards(self) -> list[list[Picture]]:
        step = self.pictures_per_shard
        return [self.pictures[start : start + step] for start in range(0, len(self.pictures), step)]

    def record(self) -> dict[str, Any]:
        """What plan.json keeps: enough to recognise the same request."""
        listing = [[picture.name, picture.size_bytes, picture.sidecar] for picture in self.pictures]
        return {"recipe": self.recipe, "num_pictures": len(self.pictures), "pictures_digest": json_digest(listing)}


def main(argv: Sequence[str]) -> None:
    cfg = load_config(PrepareConfig, argv, job="prepare", description=__doc__ or "")
    prepare(cfg)


def prepare(cfg: PrepareConfig) -> Manifest:
    """Makes the dataset, or recognises that it is already there; prints a summary and returns the manifest.

    Raises:
        InputDataError: the input does not exist, holds no picture, or none that is usable.
        ConfigError: `out` holds, or was begun with, another recipe or other pictures.
    """
    out = open_storage(cfg.out)
    plan = Plan(cfg.recipe(), find_pictures(open_storage(cfg.input)), cfg.pictures_per_shard)
    check_captioner(cfg.caption)
    begun = _begun(out, plan)
    if begun and (done := _finished(out)):
        print(f"prepare: {out.uri} is finished, with this recipe and these pictures; nothing to do")
        _print_summary(out, done)
        return done
    out.write_bytes_atomic(PLAN_NAME, _json_lines([plan.record()]))
    reports = _run(cfg, plan)
    if not any(report.shard for report in reports):
        if not begun:
            out.delete(PLAN_NAME)
        raise InputDataError(_nothing_usable(cfg, reports))
    manifest = _manifest(cfg, plan, reports)
    rejections = [rejection for report in reports for rejection in report.rejections]
    out.write_bytes_atomic(
        QUARANTINE_NAME, _json_lines([rejection.model_dump(mode="json") for rejection in rejections])
    )
    write_manifest(out.uri, manifest)
    _print_summary(out, manifest)
    return manifest


def dataset(cfg: PrepareConfig, plan: Plan) -> ray.data.Dataset:
    """The whole pipeline as one lazy Ray Dataset: a row and a block per shard in, a row per shard out."""
    input_uri = open_storage(cfg.input).uri
    rows = [plan_row(index, pictures) for index, pictures in enumerate(plan.shards())]
    workers = cfg.workers.for_shards(len(rows))
    about = {"recipe": cfg.degrade.recipe, "recipe_digest": json_digest(plan.recipe), "seed": cfg.seed}
    ds = ray.data.from_items(rows, override_num_blocks=len(rows))
    ds = ingest_stage(ds, input_uri, workers)
    ds = filter_stage(ds, cfg.filter, workers)
    ds = crop_stage(ds, cfg.crop, workers, seed=cfg.seed, max_pixels=cfg.filter.max_pixels)
    ds = caption_stage(ds, cfg.caption, workers, seed=cfg.seed)
    ds = degrade_stage(ds, cfg.degrade, workers, seed=cfg.seed)
    return write_stage(ds, open_storage(cfg.out).uri, workers, name=cfg.name, about=about)


def _run(cfg: PrepareConfig, plan: Plan) -> list[ShardReport]:
    """Executes the pipeline; reports come back in the order of the shards."""
    num_shards = len(plan.shards())
    # Its own account of every operator, and the remark that its bars are off.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with cluster.connected():
        context = ray.data.DataContext.get_current().copy()
        # A block is a shard: never split. Our own bar counts shards.
        context.target_max_block_size = None
        context.enable_progress_bars = False
        with ray.data.DataContext.current(context), tqdm(total=num_shards, desc="prepare", unit="shard") as progress:
            reports = []
            try:
                for row in dataset(cfg, plan).iter_rows():
                    reports.append(ShardReport.model_validate_json(row["report"]))
                    progress.update()
                    progress.set_postfix(samples=sum(r.shard.num_samples for r in reports if r.shard))
            except RayTaskError as error:
                if isinstance(error.cause, (RequestError, InputError)):
                    raise error.cause from error
                raise
    if sorted(report.index for report in reports) != list(range(num_shards)):
        raise RuntimeError(f"prepare: {num_shards} shards were planned and {len(reports)} came back; run it again")
    return sorted(reports, key=lambda report: report.index)


def _begun(out: Storage, plan: Plan) -> bool:
    """Whether `out` was begun with exactly this plan. Raises ConfigError when it was begun with another."""
    if not out.exists(PLAN_NAME):
        if out.exists(MANIFEST_NAME):
            raise ConfigError(f"prepare: --out {out.uri} holds another dataset; choose an empty place")
        return False
    before = json.loads(out.read_bytes(PLAN_NAME))
    now = json.loads(json.dumps(plan.record()))
    if before == now:
        return True
    changed = _differences(before.get("recipe", {}), now["recipe"])
    what = f"other settings ({', '.join(changed)})" if changed else "other pictures"
    raise ConfigError(
        f"prepare: --out {out.uri} was made with {what}; old and new shards are never mixed; choose another --out"
    )


def _finished(out: Storage) -> Manifest | None:
    """The manifest, if it is there and every shard it names has its size."""
    if not out.exists(MANIFEST_NAME):
        return None
    manifest = read_manifest(out.uri)
    sizes = out.sizes("shards/")
    complete = all(sizes.get(shard.name) == shard.size_bytes for shard in manifest.shards)
    return manifest if complete else None


def _manifest(cfg: PrepareConfig, plan: Plan, reports: Sequence[ShardReport]) -> Manifest:
    shards = [report.shard for report in reports if report.shard]
    contents = {name: digest for report in reports for name, digest in report.picture_sha256.items()}
    source = Source(
        name=cfg.source.name,
        uri=open_storage(cfg.input).uri,
        licence=cfg.source.licence,
        num_pictures=len(plan.pictures),
        sha256=json_digest(contents),
    )
    counts = {"pictures": len(plan.pictures), "samples": sum(shard.num_samples for shard in shards)}
    counts.update({f"quarantined: {reason}": count for reason, count in _reasons(reports).items()})
    return make_manifest(shards=shards, recipe=plan.recipe, sources=[source], counts=counts)


def _reasons(reports: Sequence[ShardReport]) -> Counter[str]:
    return Counter(rejection.reason for report in reports for rejection in report.rejections)


def _nothing_usable(cfg: PrepareConfig, reports: Sequence[ShardReport]) -> str:
    first = next(rejection for report in reports for rejection in report.rejections)
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(_reasons(reports).items()))
    return (
        f"prepare: --input {cfg.input} holds no usable picture ({reasons}; {first.source}: {first.detail}); "
        "give other pictures or lower filter.min_side_px and crop.size_px"
    )


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Dotted names of the settings that differ."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return [] if before == now else [path]
    names = sorted({*before, *now})
    return [
        found
        for name in names
        for found in _differences(before.get(name), now.get(name), f"{path}.{name}" if path else str(name))
    ]


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()


def _print_summary(out: Storage, manifest: Manifest) -> None:
    size_mib = sum(shard.size_bytes for shard in manifest.shards) / 2**20
    print(f"pictures     {manifest.counts['pictures']}")
    print(f"samples      {manifest.num_samples}")
    print(f"shards       {len(manifest.shards)}, {size_mib:.1f} MiB, in {out.path('shards')}")
    for reason, count in manifest.counts.items():
        if reason.startswith("quarantined"):
            print(f"{reason}: {count}, listed in {out.path(QUARANTINE_NAME)}")
    print(f"manifest     {out.path(MANIFEST_NAME)}, digest {manifest.digest[:16]}")


if __name__ == "__main__":
    run_job(main, user_errors=(InputError,))

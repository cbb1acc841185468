"""Draws high-quality pictures in any number, as shards: dead leaves, textures and text. No photograph is needed.

In : nothing but a number and a seed.
Out: URI/shards/<name>-000000.tar with <key>.png and <key>.json (caption, kind, what text says and where), index.parquet
     and, last, manifest.json.

    python pipelines/synthesize.py --out out/synthetic --num-images 1000 --size-px 512 --seed 0

Picture i depends on the seed and i alone, so a larger number only adds pictures. Running the same command again after
a crash draws only the shards that are missing, and the finished command again does nothing. `prepare.py` makes training
shards of the result.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import cv2
import pyarrow as pa
import pydantic
from tqdm import tqdm

from pipelines.contact_sheet import CONTACT_SHEET_NAME, write_contact_sheet
from pipelines.synthetic.mixture import MixtureConfig, draw_picture
from sr_platform import cluster
from sr_platform.config import StrictConfig, load_config, run_job
from sr_platform.errors import RequestError
from sr_platform.publication import ShardReport, commit_dataset, finished_shards, publish_shard, remove_markers
from sr_platform.shards import MANIFEST_NAME, Manifest, Source, json_digest
from sr_platform.storage import Storage, open_storage

# isort: split
# Ray reads its environment when it is imported, and `cluster` sets it.
import ray.data
from ray.exceptions import RayTaskError

from pipelines.preparation.destination import begun, finished
from pipelines.preparation.plan import PLAN_NAME
from pipelines.stages.sample import map_shards
from pipelines.stages.write import encode_png

DRAWING_VERSION = 1
"""Part of the recipe; to be raised whenever the same seed gives other pictures."""

_NOT_CONTENT = {"out", "num_cpus"}
_LICENCE = "CC0-1.0"
_TERMS = "Drawn by a program; whoever runs it may do anything with the pictures."

SidePx = Annotated[int, pydantic.Field(ge=64, le=4096, multiple_of=4)]


class SynthesizeConfig(StrictConfig):
    """Pictures out of nothing."""

    out: str
    """Where the dataset goes: a path, file:// or s3:// URI."""
    num_images: pydantic.PositiveInt
    """How many pictures."""
    size_px: SidePx = 512
    """Width and height; a multiple of 4, because lq pictures have a quarter of it."""
    height_px: SidePx | None = None
    """Another height, for pictures that are not square."""
    seed: pydantic.NonNegativeInt = 0
    """Everything random derives from it and the number of the picture."""
    name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_-]+$")] = "synthetic"
    """Shards are called <name>-000000.tar, pictures <name>-000000.png."""
    images_per_shard: pydantic.PositiveInt = 64
    """A shard is drawn by one task, and redrawn whole when that was cut short."""
    mixture: MixtureConfig = MixtureConfig()
    num_cpus: Annotated[float, pydantic.Field(gt=0)] = 1.0
    """Logical CPUs of each task; changes no byte."""

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.images_per_shard)

    def numbers(self, shard: int) -> range:
        """The numbers of the pictures of one shard."""
        return range(shard * self.images_per_shard, min((shard + 1) * self.images_per_shard, self.num_images))

    def recipe(self) -> dict[str, Any]:
        """The settings that decide the content of the shards; not where they lie or who works on them."""
        return {"drawing_version": DRAWING_VERSION, **self.model_dump(mode="json", exclude=_NOT_CONTENT)}


class Synthesize:
    """Draws and publishes whole shards; doing it again gives the same bytes."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.cfg = SynthesizeConfig.model_validate(config)
        self.storage = open_storage(self.cfg.out)

    def __call__(self, table: pa.Table) -> pa.Table:
        cv2.setNumThreads(1)
        reports = [self.publish(index) for index in table["shard"].to_pylist()]
        return pa.table({"report": pa.array([report.model_dump_json() for report in reports], pa.string())})

    def publish(self, index: int) -> ShardReport:
        samples = (self.draw(number) for number in self.cfg.numbers(index))
        plan = json_digest(self.cfg.recipe())
        return publish_shard(self.storage, name=self.cfg.name, index=index, plan=plan, samples=samples)

    def draw(self, number: int) -> tuple[str, dict[str, bytes]]:
        """Key and members of one picture."""
        cfg = self.cfg
        height_px, width_px = cfg.height_px or cfg.size_px, cfg.size_px
        kind, picture = draw_picture(
            seed=cfg.seed, number=number, height_px=height_px, width_px=width_px, mixture=cfg.mixture
        )
        about = {
            "caption": picture.caption,
            "kind": kind,
            "text": [{"string": line.string, "box": line.box} for line in picture.lines],
            "size": [height_px, width_px],
            "seed": cfg.seed,
            "number": number,
        }
        members = {"png": encode_png(picture.pixels), "json": json.dumps(about, sort_keys=True).encode()}
        return f"{cfg.name}-{number:06d}", members


def main(argv: Sequence[str]) -> None:
    cfg = load_config(SynthesizeConfig, argv, job="synthesize", description=__doc__ or "")
    synthesize(cfg)


def synthesize(cfg: SynthesizeConfig) -> Manifest:
    """Draws what is missing, or recognises that nothing is; prints a summary and returns the manifest.

    Raises:
        ConfigError: `out` holds, or was begun with, something else.
    """
    out = open_storage(cfg.out)
    if begun(out, cfg.recipe(), job="synthesize") and (done := finished(out)):
        print(f"synthesize: {out.uri} is finished, with this recipe; nothing to do")
        return _wind_up(out, done)
    out.write_bytes_atomic(PLAN_NAME, (json.dumps({"recipe": cfg.recipe()}, sort_keys=True) + "\n").encode())
    reports = finished_shards(out, name=cfg.name, plan=json_digest(cfg.recipe()))
    missing = [index for index in range(cfg.num_shards) if index not in reports]
    reports.update((report.index, report) for report in _draw(cfg, missing))
    if sorted(reports) != list(range(cfg.num_shards)):
        raise RuntimeError(
            f"synthesize: {cfg.num_shards} shards were planned and {len(reports)} are there; run it again"
        )
    return _wind_up(out, _commit(out, cfg, [reports[index] for index in sorted(reports)]))


def _draw(cfg: SynthesizeConfig, missing: Sequence[int]) -> Iterator[ShardReport]:
    """Draws these shards on Ray Data: a row and a block per shard."""
    if not missing:
        return
    # Its own account of every operator, and the remark that its bars are off.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    drawn = cfg.num_images - sum(len(cfg.numbers(index)) for index in missing)
    bar = tqdm(total=cfg.num_images, initial=drawn, desc="synthesize", unit="picture", smoothing=0)
    with cluster.connected(), bar:
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        # Absolute: a worker's current directory is another one.
        config = {**cfg.model_dump(mode="json"), "out": open_storage(cfg.out).uri}
        with ray.data.DataContext.current(context):
            ds = ray.data.from_items([{"shard": index} for index in missing], override_num_blocks=len(missing))
            ds = map_shards(ds, Synthesize(config).__call__, num_cpus=cfg.num_cpus)
            try:
                for row in ds.iter_rows():
                    report = ShardReport.model_validate_json(row["report"])
                    bar.update(len(cfg.numbers(report.index)))
                    yield report
            except RayTaskError as error:
                if isinstance(error.cause, RequestError):
                    raise error.cause from error
                raise


def _commit(out: Storage, cfg: SynthesizeConfig, reports: Sequence[ShardReport]) -> Manifest:
    source = Source(
        name="synthetic",
        uri="pipelines/synthesize.py",
        licence=_LICENCE,
        terms=_TERMS,
        num_pictures=cfg.num_images,
        sha256=json_digest({report.shard.name: report.shard.sha256 for report in reports if report.shard}),
    )
    counts = {"pictures": cfg.num_images}
    return commit_dataset(out, reports, recipe=cfg.recipe(), sources=[source], counts=counts)


def _wind_up(out: Storage, manifest: Manifest) -> Manifest:
    """What a run that was killed after its manifest may have left undone, and a summary."""
    remove_markers(out)
    if not out.exists(CONTACT_SHEET_NAME):
        write_contact_sheet(out.uri)
    size_mib = sum(shard.size_bytes for shard in manifest.shards) / 2**20
    print(f"pictures     {manifest.num_samples}")
    print(f"shards       {len(manifest.shards)}, {size_mib:.1f} MiB, in {out.path('shards')}")
    print(f"licence      {', '.join(manifest.licences)}")
    print(f"look at it   {out.path(CONTACT_SHEET_NAME)}")
    print(f"manifest     {out.path(MANIFEST_NAME)}, digest {manifest.digest[:16]}")
    return manifest


if __name__ == "__main__":
    run_job(main)

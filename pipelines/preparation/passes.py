"""The two passes of `prepare.py` over Ray Data: measure every picture, then make every shard.

survey:  ingest > filter                                          a block per some dozen pictures
make:    ingest > crop > caption > degrade > (encode) > write     a block per shard, from the first to the last
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray.data
from ray.exceptions import RayTaskError

from faithdiff.degradation import find_recipe
from faithdiff.errors import InputError
from pipelines.preparation.ceiling import Ceiling
from pipelines.preparation.destination import LISTING
from pipelines.preparation.plan import Plan, PlannedShard, make_plan
from pipelines.preparation.progress import Board, watched
from pipelines.preparation.recipe import PrepareConfig
from pipelines.preparation.survey import Survey, picture_rows
from pipelines.sources import SourceConfig
from pipelines.stages.caption import caption_stage
from pipelines.stages.crop import crop_stage
from pipelines.stages.degrade import degrade_stage
from pipelines.stages.encode import encode_stage
from pipelines.stages.filter import Facts
from pipelines.stages.ingest import Picture, ingest_stage
from pipelines.stages.write import write_stage
from sr_platform.errors import RequestError
from sr_platform.publication import finished_shards
from sr_platform.shards import json_digest
from sr_platform.storage import open_storage

_SLOWEST_SHARD_S = 1800


def local_cpus(cfg: PrepareConfig) -> int:
    """Logical CPUs of a Ray that the job starts itself: its cores, and one for every actor that waits for shards."""
    has_captioner, has_encoder = cfg.caption.mode != "text", bool(cfg.encode.model)
    actors = has_captioner * cfg.workers.caption_actors + has_encoder * cfg.workers.encode_actors
    return (os.cpu_count() or 1) + actors


def survey_pictures(
    cfg: PrepareConfig, sources: Sequence[SourceConfig], pictures: Sequence[Picture], ceiling: Ceiling
) -> dict[str, Facts]:
    """The first pass: facts of every picture, measured or remembered, and committed."""
    out = open_storage(cfg.out)
    survey = Survey(out, sources, cfg.filter)
    facts = survey.known(pictures)

    def watch(found: Sequence[Facts]) -> None:
        ceiling.add((fact.name, fact.problem) for fact in found if fact.problem)

    watch(list(facts.values()))
    missing = [picture for picture in pictures if picture.name not in facts]
    if missing:
        with watched({"ingest": len(missing), "filter": len(missing)}):
            facts |= survey.measure(missing, cache_uri=f"{out.uri}/{LISTING}", workers=cfg.workers, watch=watch)
    return facts


def plan_of(
    cfg: PrepareConfig,
    sources: Sequence[SourceConfig],
    pictures: Sequence[Picture],
    facts: Mapping[str, Facts],
    recipe: dict[str, Any],
) -> Plan:
    return make_plan(
        pictures,
        facts,
        sources,
        recipe=recipe,
        filter_cfg=cfg.filter,
        crop_cfg=cfg.crop,
        seed=cfg.seed,
        samples_per_shard=cfg.samples_per_shard,
    )


def make_shards(cfg: PrepareConfig, sources: Sequence[SourceConfig], plan: Plan, ceiling: Ceiling) -> Board | None:
    """The second pass: every planned shard that is not published yet."""
    out = open_storage(cfg.out)
    finished = finished_shards(out, name=cfg.name, plan=plan.digest)
    for report in finished.values():
        ceiling.add((r.source, f"{r.reason}: {r.detail}") for r in report.rejections)
    todo = [shard for shard in plan.shards if shard.index not in finished]
    if finished:
        print(f"prepare: {len(finished)} of {len(plan.shards)} shards are there already")
    if not todo:
        return None
    with watched(_expected(cfg, todo)) as board:
        num_rows = 0
        for row in dataset(cfg, sources, plan, todo, out_uri=out.uri).iter_rows():
            ceiling.add((source, f"{reason}: {detail}") for source, reason, detail in json.loads(row["left_out"]))
            num_rows += 1
    if num_rows != len(todo):
        raise RuntimeError(f"prepare: {len(todo)} shards were to be made and {num_rows} came back; run it again")
    return board


def dataset(
    cfg: PrepareConfig,
    sources: Sequence[SourceConfig],
    plan: Plan,
    todo: Sequence[PlannedShard],
    *,
    out_uri: str | None,
) -> ray.data.Dataset:
    """The second pass as one lazy Ray Dataset: a row and a block per shard in, a row per shard out."""
    sha256 = plan.sha256
    rows = [{"shard": shard.index, "pictures": picture_rows(shard.pictures, sha256)} for shard in todo]
    workers, sources = cfg.workers.for_shards(len(rows)), list(sources)
    about = {
        "recipe": find_recipe(cfg.degrade.recipe).name,
        "recipe_digest": json_digest(plan.recipe),
        "seed": cfg.seed,
    }
    groups = {source.name: source.group or "" for source in sources}
    ds = ray.data.from_items(rows, override_num_blocks=len(rows))
    ds = ingest_stage(ds, sources, f"{open_storage(cfg.out).uri}/{LISTING}", workers)
    ds = crop_stage(ds, cfg.crop, workers, sources=sources, seed=cfg.seed, max_pixels=cfg.filter.max_pixels)
    ds = caption_stage(ds, cfg.caption, workers, seed=cfg.seed)
    ds = degrade_stage(ds, cfg.degrade, workers, seed=cfg.seed)
    ds = encode_stage(ds, cfg.encode, workers, seed=cfg.seed)
    return write_stage(ds, out_uri, workers, name=cfg.name, about=about, groups=groups, plan=plan.digest)


def _expected(cfg: PrepareConfig, shards: Sequence[PlannedShard]) -> dict[str, int]:
    crops = sum(shard.num_crops for shard in shards)
    stages = ["crop", "caption", "degrade", *(["encode"] if cfg.encode.model else []), "write"]
    return {"ingest": sum(len(shard.pictures) for shard in shards), **dict.fromkeys(stages, crops)}


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Ray Data with a block per shard, without its own bars, and our errors as themselves."""
    # Its account of every operator, and of every error that we raise or mend ourselves.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = None
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    # The default calls a pipeline stuck whose first shard takes more than two minutes.
    context.execution_no_progress_timeout_s = _SLOWEST_SHARD_S
    with ray.data.DataContext.current(context):
        try:
            yield
        except RayTaskError as error:
            if isinstance(error.cause, (RequestError, InputError)):
                # Ray adds its own advice below our line.
                message = str(error.cause).partition("\nFailed to apply UDF")[0]
                raise type(error.cause)(message) from error
            raise

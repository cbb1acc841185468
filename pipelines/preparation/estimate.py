"""`prepare.py --dry-run`: what would be made and how long it would take, from a small measured sample."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from pipelines.preparation import destination
from pipelines.preparation.ceiling import Ceiling
from pipelines.preparation.passes import dataset, local_cpus, plan_of, quiet_ray_data
from pipelines.preparation.plan import Plan, count_reasons
from pipelines.preparation.progress import StageCount, watched
from pipelines.preparation.recipe import PrepareConfig
from pipelines.preparation.survey import Survey
from pipelines.sources import SourceConfig, source_of
from pipelines.stages.filter import Facts
from pipelines.stages.ingest import Picture, list_pictures
from pipelines.stages.sample import sample_rng
from sr_platform import cluster
from sr_platform.storage import open_storage

MEASURED_PICTURES = 16


@dataclass(frozen=True)
class Measured:
    """What a few pictures of the input cost and gave."""

    num_pictures: int
    num_used: int
    num_crops: int
    size_bytes: int
    """Of their samples in shards."""
    stages: Mapping[str, StageCount]
    left_out: Counter[str]


def print_estimate(cfg: PrepareConfig) -> None:
    """Prints the plan. What the measurement has to write on the way is removed again."""
    out, sources = open_storage(cfg.out), cfg.resolved_sources()
    pictures = list_pictures(sources, open_storage(f"{out.uri}/{destination.LISTING}"))
    with cluster.connected(num_cpus=local_cpus(cfg)), quiet_ray_data():
        measured = _measured(cfg, sources, _some(pictures, cfg.seed))
        cpus = ray.cluster_resources().get("CPU", 1.0)
    if not destination.is_begun(out):
        destination.discard(out)
    print(estimate_text(cfg.samples_per_shard, pictures, measured, cpus))


def estimate_text(samples_per_shard: int, pictures: Sequence[Picture], measured: Measured, cpus: float) -> str:
    """The plan as a person reads it: pictures by source, then crops, shards, bytes, and seconds per stage."""
    share = len(pictures) / measured.num_pictures
    crops, size_bytes = round(measured.num_crops * share), measured.size_bytes * share
    lines = [f"pictures     {len(pictures)}, {sum(p.size_bytes for p in pictures) / 2**20:.1f} MiB"]
    for source, num_pictures in sorted(Counter(source_of(picture.name) for picture in pictures).items()):
        lines.append(f"  {source:<11}{num_pictures}")
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(measured.left_out.items())) or "none left out"
    lines.append(f"measured     {measured.num_pictures} of them, {measured.num_used} used; {left_out}")
    lines.append("             duplicates and limits show only in the whole set")
    lines.append(f"crops        about {crops}")
    lines.append(f"shards       about {-(-crops // samples_per_shard)}, {size_bytes / 2**20:.1f} MiB")
    lines.append("stage         a second, each core    seconds of one core")
    total_s = 0.0
    for stage, count in measured.stages.items():
        busy_s = count.busy_s * share
        total_s += busy_s
        lines.append(f"  {stage:<11}{count.per_busy_second:>20.1f}{busy_s:>23.1f}")
    lines.append(f"  all        {'':>20}{total_s:>23.1f}, about {total_s / cpus:.0f} s on {cpus:g} logical CPUs")
    return "\n".join(lines)


def _some(pictures: Sequence[Picture], seed: int) -> list[Picture]:
    readable = [picture for picture in pictures if not picture.problem]
    if len(readable) <= MEASURED_PICTURES:
        return readable
    chosen = sample_rng(seed, "dry run", "estimate").choice(len(readable), MEASURED_PICTURES, replace=False)
    return [readable[index] for index in sorted(chosen.tolist())]


def _measured(cfg: PrepareConfig, sources: Sequence[SourceConfig], pictures: Sequence[Picture]) -> Measured:
    out = open_storage(cfg.out)
    survey = Survey(out, sources, cfg.filter)
    ceiling = Ceiling(cfg.quarantine.model_copy(update={"max_fraction": 1.0}), len(pictures), out)

    def watch(found: Sequence[Facts]) -> None:
        ceiling.add((fact.name, fact.problem) for fact in found if fact.problem)

    stages: dict[str, StageCount] = {}
    with watched({"ingest": len(pictures), "filter": len(pictures)}) as board:
        facts = survey.measure(pictures, cache_uri=f"{out.uri}/{destination.LISTING}", workers=cfg.workers, watch=watch)
        board.refresh()
    stages["filter"] = board.totals["filter"]
    plan = plan_of(cfg, sources, pictures, facts, cfg.recipe(sources))
    left_out = count_reasons(list(plan.problems.values()))
    if not plan.shards:
        return Measured(len(pictures), 0, 0, 0, stages, left_out)
    with watched(dict.fromkeys(("ingest", "crop", "caption", "degrade", "write"), len(pictures))) as board:
        rows = list(dataset(cfg, sources, _spread(plan), _spread(plan).shards, out_uri=None).iter_rows())
        board.refresh()
    stages = {"ingest": board.totals["ingest"]} | stages | board.totals
    size_bytes = sum(row["size_bytes"] for row in rows)
    num_crops = sum(row["num_samples"] for row in rows)
    return Measured(len(pictures), len(plan.sha256), num_crops, size_bytes, stages, left_out)


def _spread(plan: Plan) -> Plan:
    """The same pictures, one to a shard, so that all cores take part."""
    alone = [picture for shard in plan.shards for picture in shard.pictures]
    shards = [
        dataclasses.replace(plan.shards[0], index=index, pictures=(picture,), num_crops=1)
        for index, picture in enumerate(alone)
    ]
    return dataclasses.replace(plan, shards=shards)

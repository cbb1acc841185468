"""Pictures -> training shards: ingest > filter > crop > caption > degrade > (encode) > write, on Ray Data.

In : folders of pictures, zip and tar archives, webdataset shards, local or s3://; a .txt or .json of the same name
     beside a picture holds its caption. A recipe may mix several sources (pipelines/recipes/sources.yaml knows some).
Out: URI/shards/<name>-000000.tar, URI/index.parquet, URI/quarantine.jsonl and, last, URI/manifest.json;
     URI/contact_sheet.png to look at, URI/survey.parquet with what was measured of every picture.

    python pipelines/prepare.py prepare_nano.yaml --input photographs/ --out out/data
    python pipelines/prepare.py prepare_nano.yaml --input photographs/ --out out/data --dry-run    only the plan
    python pipelines/prepare.py inspect out/data KEY    one sample with its whole provenance
    python pipelines/prepare.py verify out/data         every digest once more

Exactly once: after any number of kills the same command finishes what is unfinished, and shards and digest are those
of an undisturbed run, whatever the number of workers. Another recipe or other pictures need another --out.
"""

from __future__ import annotations

from collections.abc import Sequence

from faithdiff.errors import InputError
from sr_platform import cluster
from sr_platform.config import load_config, run_job
from sr_platform.errors import ConfigError, InputDataError
from sr_platform.publication import commit_dataset, finished_shards, json_lines
from sr_platform.shards import Manifest
from sr_platform.storage import open_storage

# isort: split
# Ray reads its environment when it is imported, and `cluster` sets it.
from pipelines.preparation import destination
from pipelines.preparation.ceiling import Ceiling
from pipelines.preparation.destination import LISTING
from pipelines.preparation.estimate import print_estimate
from pipelines.preparation.inspection import inspect_command, verify_command
from pipelines.preparation.passes import local_cpus, make_shards, plan_of, quiet_ray_data, survey_pictures
from pipelines.preparation.plan import PLAN_NAME, Plan, count_reasons, listing_digest
from pipelines.preparation.progress import stage_table
from pipelines.preparation.recipe import PrepareConfig
from pipelines.preparation.survey import Survey
from pipelines.sources import SourceConfig
from pipelines.stages.caption import check_captioner
from pipelines.stages.encode import check_encoder
from pipelines.stages.ingest import list_pictures
from pipelines.stages.write import rejected


def main(argv: Sequence[str]) -> None:
    commands = {"inspect": inspect_command, "verify": verify_command}
    if argv and argv[0] in commands:
        commands[argv[0]](argv[1:])
        return
    cfg = load_config(PrepareConfig, argv, job="prepare", description=__doc__ or "", commands=tuple(commands))
    if cfg.dry_run:
        print_estimate(cfg)
    else:
        prepare(cfg)


def prepare(cfg: PrepareConfig) -> Manifest:
    """Makes the dataset, or recognises that it is already there; prints a summary and returns the manifest.

    Raises:
        InputDataError: an input does not exist, holds no picture, none that is usable, or too many bad ones.
        ConfigError: the request is wrong, or `out` holds, or was begun with, another recipe or other pictures.
    """
    out, sources = open_storage(cfg.out), cfg.resolved_sources()
    refuse_nested(out.uri, sources)
    recipe = cfg.recipe(sources, check_encoder(cfg.encode))
    before = destination.begun(out, recipe)
    pictures = list_pictures(sources, open_storage(f"{out.uri}/{LISTING}"))
    if before.get("listing_digest") == listing_digest(pictures) and (done := destination.finished(out)):
        print(f"prepare: {out.uri} is finished, with this recipe and these pictures; nothing to do")
        return destination.wind_up(out, done)
    check_captioner(cfg.caption)
    with cluster.connected(num_cpus=local_cpus(cfg)), quiet_ray_data():
        ceiling = Ceiling(cfg.quarantine, len(pictures), out)
        facts = survey_pictures(cfg, sources, pictures, ceiling)
        plan = plan_of(cfg, sources, pictures, facts, recipe)
        destination.refuse_other_pictures(out, before, plan.record())
        if not plan.shards:
            raise _nothing_usable(cfg, list(plan.problems.items()), begun=bool(before))
        out.write_bytes_atomic(PLAN_NAME, json_lines([plan.record()]))
        board = make_shards(cfg, sources, plan, ceiling)
    if board:
        print(stage_table(board.totals))
    return _commit(cfg, sources, plan)


def refuse_nested(out_uri: str, sources: Sequence[SourceConfig]) -> None:
    """Raises ConfigError when the output lies inside an input: the next listing would find it there."""
    for source in sources:
        if f"{out_uri}/".startswith(f"{open_storage(source.uri).uri}/"):
            raise ConfigError(f"prepare: --out {out_uri} lies inside source {source.name}; choose a place outside it")


def _commit(cfg: PrepareConfig, sources: Sequence[SourceConfig], plan: Plan) -> Manifest:
    out = open_storage(cfg.out)
    reports = finished_shards(out, name=cfg.name, plan=plan.digest)
    missing = [shard.index for shard in plan.shards if shard.index not in reports]
    if missing:
        raise RuntimeError(f"prepare: {len(missing)} shards vanished after they were written; run it again")
    rejections = [rejected(name, problem) for name, problem in sorted(plan.problems.items())]
    if not any(report.shard for report in reports.values()):
        left_out = [(r.source, f"{r.reason}: {r.detail}") for report in reports.values() for r in report.rejections]
        raise _nothing_usable(cfg, [*plan.problems.items(), *left_out], begun=False)
    Survey(out, sources, cfg.filter).commit(plan.pictures, plan.facts)
    manifest = commit_dataset(
        out,
        [reports[shard.index] for shard in plan.shards],
        recipe=plan.recipe,
        sources=plan.sources(sources),
        counts={"pictures": len(plan.pictures)},
        rejections=rejections,
        mixture=cfg.mixture,
    )
    return destination.wind_up(out, manifest)


def _nothing_usable(cfg: PrepareConfig, problems: Sequence[tuple[str, str]], *, begun: bool) -> InputDataError:
    """The error that says why; what this run has written is removed, unless an earlier one had begun it."""
    if not begun:
        destination.discard(open_storage(cfg.out))
    counted = ", ".join(f"{n} {reason}" for reason, n in sorted(count_reasons([p for _, p in problems]).items()))
    name, detail = problems[0][0], problems[0][1].partition(": ")[2]
    return InputDataError(
        f"prepare: --input {cfg.input} holds no usable picture ({counted}; {name}: {detail}); "
        "give other pictures or lower filter.min_side_px and crop.size_px"
    )


if __name__ == "__main__":
    run_job(main, user_errors=(InputError,))

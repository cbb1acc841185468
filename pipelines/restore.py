"""Pictures -> restored pictures: a folder, archive or s3:// prefix of any number, on Ray Data or by an endpoint.

In : JPEG, PNG, WebP and TIFF in any sub-folders, upright by their EXIF; beside them, if you like, captions (a.txt).
Out: OUT/<same sub-folder>/<name by the template>, OUT/restore_report.json and OUT/restore_report.md.

    python pipelines/restore.py restore_nano.yaml --input photos/ --out restored/ --scale 4 --dry-run    the estimate
    python pipelines/restore.py restore_nano.yaml --input photos/ --out restored/ --scale 4
    python pipelines/restore.py --model models:/faithdiff@champion --input s3://in --out s3://out/a --workers.num-gpus 1
    FAITHDIFF_API_KEY=... python pipelines/restore.py --endpoint http://host:8000 --input photos/ --out restored/

The same command again goes on where a run was killed: what was published is skipped, and at most the pictures that
were in hand are done again. Pictures that are new or have changed are restored; those that failed are tried again.
Results of other settings or of another model, and files of others, are refused, all of them before work starts, unless
you --overwrite them. A picture's result depends on the picture, the settings and the seed alone.

One picture that fails stops no other. Exit status: 0 done; 1 more failed than max_failed_fraction allows, or the run
was broken off; 2 the request was wrong. Give absolute paths or s3:// under `ray job submit`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from faithdiff.errors import InputError
from sr_platform import cluster
from sr_platform.config import load_config, run_job
from sr_platform.errors import ConfigError
from sr_platform.ownership import owned
from sr_platform.storage import Storage, open_storage

# isort: split
# Ray reads its environment when it is imported, and `cluster` sets it.
from pipelines.listing import Picture, list_pictures
from pipelines.preparation.passes import quiet_ray_data
from pipelines.restoration.estimate import estimate_text
from pipelines.restoration.model import Model, find_model
from pipelines.restoration.orders import Order, Plan, make_plan
from pipelines.restoration.outcomes import Outcome
from pipelines.restoration.ray_engine import restore_on_ray
from pipelines.restoration.reading import cache_uri
from pipelines.restoration.recipe import RestoreConfig
from pipelines.restoration.records import Claim, Record, Records
from pipelines.restoration.report import JSON_NAME, TEXT_NAME, Report, make_report
from pipelines.restoration.service import ServiceDownError
from pipelines.restoration.service_engine import restore_on_service, served_model
from pipelines.stages.caption import check_captioner

_GATHER_EVERY = 500


def main(argv: Sequence[str]) -> None:
    cfg = load_config(RestoreConfig, argv, job="restore", description=__doc__ or "")
    if cfg.dry_run:
        print(estimate(cfg))
        return
    try:
        report = restore(cfg)
    except ServiceDownError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    if too_many := excess_of_failures(report, cfg.max_failed_fraction):
        print(too_many, file=sys.stderr)
        sys.exit(1)


def estimate(cfg: RestoreConfig) -> str:
    """What a run would do, as a person reads it; leaves nothing behind.

    Raises:
        RequestError, InputError: as `restore`.
    """
    out = open_storage(cfg.out)
    try:
        pictures, model = _pictures(cfg), _model_of(cfg)
        plan = make_plan(cfg, pictures, out, model_version=model.version)
        with _engine(cfg):
            return estimate_text(cfg, plan, model)
    finally:
        open_storage(cache_uri(cfg)).delete_all("")
        Records(out).remove_if_empty()


def restore(cfg: RestoreConfig) -> Report:
    """Restores what is not done yet, prints a summary, and returns the report, which it has also written.

    Raises:
        RequestError, InputError: the request is wrong; nothing was restored.
        StorageError, ServiceDownError: storage or the endpoint was away for too long; the report says how far it got.
    """
    # The pictures first: that a folder is not there is told at once, a model takes seconds to be looked at.
    out, pictures, model = open_storage(cfg.out), _pictures(cfg), _model_of(cfg)
    check_captioner(cfg.caption)
    records = Records(out)
    with owned(records.uri):
        plan = make_plan(cfg, pictures, out, model_version=model.version)
        print(_what_is_to_do(plan), flush=True)
        return _carry_out(cfg, model, plan, out, records)


def excess_of_failures(report: Report, allowed_fraction: float) -> str:
    """One line where more pictures failed than may; else empty."""
    num_failed, num_tried = report.counts["failed"], report.counts["failed"] + report.counts["done"]
    if num_failed <= allowed_fraction * num_tried:
        return ""
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.failures.items())
    return (
        f"restore: {num_failed} of {num_tried} pictures failed ({reasons}) and all others are done; mend or exclude "
        f"those that {open_storage(report.out_uri).path(TEXT_NAME)} lists and run the same command again, or raise "
        "max_failed_fraction"
    )


def _carry_out(cfg: RestoreConfig, model: Model, plan: Plan, out: Storage, records: Records) -> Report:
    """Works off the plan. The report is written whatever happens, short of a kill."""
    start_s, outcomes = time.monotonic(), list[Outcome]()
    records.remember_settings(cfg.settings_digest, cfg.settings())
    if plan.todo:
        todo = frozenset(order.output for order in plan.todo)
        records.claim(Claim(cfg.settings_digest, model.version, todo))

    def report() -> Report:
        urls, seconds = (open_storage(cfg.input).uri, out.uri), time.monotonic() - start_s
        made = make_report(cfg, model, plan, outcomes, urls=urls, seconds=seconds)
        made.write(out)
        return made

    try:
        for outcome in _gathered(_work(cfg, model, plan.todo), records):
            outcomes.append(outcome)
    except BaseException:
        report()
        raise
    _refuse_a_gap(plan, outcomes)
    made = {outcome.record.output: outcome.record for outcome in outcomes if outcome.record}
    records.finish({**plan.records, **made})
    out.remove_unfinished()
    finished = report()
    print(_summary(finished, out))
    return finished


def _work(cfg: RestoreConfig, model: Model, orders: Sequence[Order]) -> Iterator[Outcome]:
    if not orders:
        return
    with _engine(cfg):
        yield from restore_on_service(cfg, orders) if cfg.endpoint else restore_on_ray(cfg, model, orders)


def _gathered(outcomes: Iterable[Outcome], records: Records) -> Iterator[Outcome]:
    """The same outcomes; their records are put together as they come."""
    pending: list[Record] = []
    for outcome in outcomes:
        if outcome.record is not None:
            pending.append(outcome.record)
        if len(pending) >= _GATHER_EVERY:
            records.gather(pending)
            pending = []
        yield outcome


@contextmanager
def _engine(cfg: RestoreConfig) -> Iterator[None]:
    """What the work needs: nothing for an endpoint, else a Ray."""
    if cfg.endpoint:
        yield
        return
    waiting = cfg.workers.num_actors + (cfg.workers.caption_actors if cfg.caption.mode != "text" else 0)
    with cluster.connected(num_cpus=(os.cpu_count() or 1) + waiting), quiet_ray_data():
        yield


def _pictures(cfg: RestoreConfig) -> list[Picture]:
    out, source = open_storage(cfg.out), cfg.source()
    if f"{out.uri}/".startswith(f"{open_storage(source.uri).uri}/"):
        raise ConfigError(
            f"restore: --out {out.uri} lies inside --input {source.uri}, and the next run would restore its results; "
            "choose a place outside it"
        )
    return list_pictures([source], open_storage(cache_uri(cfg)), job="restore")


def _model_of(cfg: RestoreConfig) -> Model:
    return served_model(cfg) if cfg.endpoint else find_model(cfg.model)


def _refuse_a_gap(plan: Plan, outcomes: Sequence[Outcome]) -> None:
    missing = {order.output for order in plan.todo} - {outcome.output for outcome in outcomes}
    if missing:
        raise RuntimeError(f"restore: {len(missing)} pictures came to no end, such as {min(missing)}; run it again")


def _what_is_to_do(plan: Plan) -> str:
    num_pictures = len(plan.todo) + len(plan.done) + len(plan.unusable)
    again = [
        f"{number} {why}"
        for number, why in ((plan.num_changed, "of changed inputs"), (plan.num_replaced, "overwritten"))
        if number
    ]
    return (
        f"restore: {num_pictures} pictures, {len(plan.done)} are done already, {len(plan.todo)} to do"
        + (f" ({', '.join(again)})" if again else "")
        + (f", {len(plan.unusable)} cannot be read" if plan.unusable else "")
    )


def _summary(report: Report, out: Storage) -> str:
    counts = report.counts
    sizes = [picture["output_size_px"] for picture in report.pictures if picture["state"] == "done"]
    megapixels = sum(width * height for width, height in sizes) / 1e6
    failures = ", ".join(f"{count} {reason}" for reason, count in report.failures.items())
    lines = [
        f"done         {counts['done']} pictures, {megapixels:.1f} megapixels, in {report.seconds:.1f} s",
        f"skipped      {counts['skipped']}",
        f"failed       {counts['failed']}" + (f" ({failures})" if failures else ""),
        f"model        {report.model['version'] or 'not known'}",
        f"results      {out.uri}",
        f"report       {out.path(JSON_NAME)}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(main, user_errors=(InputError,))

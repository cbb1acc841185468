"""Restores on Ray Data: ingest > (show > caption) > restore; a block is a few pictures from the first to the last.

A picture is published by the actor that restored it, so that a block whose actor dies is done again only where it was
not published yet.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data

from faithdiff.errors import InputError
from faithdiff.picture_files import PictureFile, read_picture, write_picture
from pipelines.preparation.progress import reporting_to
from pipelines.restoration.model import Model, load_pipeline
from pipelines.restoration.orders import Order
from pipelines.restoration.outcomes import Outcome, Publisher, Restored, failed
from pipelines.restoration.progress import MAX_ATTEMPTS, RemoteLedger, Reporter, shown, start_ledger
from pipelines.restoration.reading import Show, cache_uri, order_of, order_row, prompt_of, reason_of, size_problem
from pipelines.restoration.recipe import RestoreConfig
from pipelines.stages.caption import caption_stage
from pipelines.stages.ingest import ingest_stage
from pipelines.stages.sample import Sample, map_shards, read_table

_MAX_BLOCK = 8
_BLOCKS_PER_ACTOR = 4
_STUCK_AFTER_S = 24 * 3600
"""A block of the largest pictures takes hours on a CPU, and nothing moves meanwhile."""


@dataclass(frozen=True)
class _Opened:
    """A picture that is ready for the model, or what came of it before."""

    order: Order
    sample: Sample
    prompt: str
    attempt: int
    picture: PictureFile | None
    outcome: Outcome | None


class RestoreActor:
    """One model; reads the next picture and writes the last while it restores one."""

    def __init__(self, cfg: RestoreConfig, model: Model, reporter: Reporter) -> None:
        self._cfg, self._model, self._reporter = cfg, model, reporter
        self._publisher = Publisher(cfg)
        self._pipeline = load_pipeline(model, cfg.workers)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="restore")

    def __call__(self, table: pa.Table) -> pa.Table:
        outcomes = [outcome.to_json() for outcome in self._outcomes(read_table(table))]
        return pa.table({"outcome": pa.array(outcomes, pa.large_string())})

    def _outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        outcomes: list[Future[Outcome]] = []
        ahead: Future[_Opened] | None = None
        is_careful = False
        for index, sample in enumerate(samples):
            opened = ahead.result() if ahead else self._open(sample)
            # After a death one at a time, so that it is clear which of them it was.
            is_careful = is_careful or opened.attempt > 1
            has_next = index + 1 < len(samples)
            ahead = self._threads.submit(self._open, samples[index + 1]) if has_next and not is_careful else None
            restored = self._restore(opened)
            if outcomes:
                outcomes[-1].result()
            outcomes.append(self._threads.submit(self._close, opened, restored))
            if is_careful:
                outcomes[-1].result()
        return [outcome.result() for outcome in outcomes]

    def _open(self, sample: Sample) -> _Opened:
        order, prompt = order_of(sample), prompt_of(self._cfg, sample)
        attempt = self._reporter.begin(order.output)
        picture: PictureFile | None = None
        outcome = self._publisher.published_before(order) if attempt > 1 else None
        if outcome is None and attempt > MAX_ATTEMPTS:
            outcome = failed(order, f"worker died: {MAX_ATTEMPTS} times while it had this picture in hand")
        if outcome is None:
            limits = self._cfg.limits
            problem = sample.problem or size_problem(sample.data, limits, self._cfg.scale, limits.max_output_megapixels)
            outcome = failed(order, problem) if problem else self._publisher.unchanged(order, sample, prompt)
        if outcome is None:
            try:
                picture = read_picture(sample.data, limits)
            except InputError as error:
                outcome = failed(order, f"{reason_of(error)}: {error}")
        return _Opened(order, sample, prompt, attempt, picture, outcome)

    def _restore(self, opened: _Opened) -> tuple[Any, float] | Outcome:
        """uint8 or uint16 [H, W, 3] and the seconds it took, or what came of it otherwise."""
        if opened.outcome is not None or opened.picture is None:
            assert opened.outcome is not None
            return opened.outcome
        import torch

        start_s = time.perf_counter()
        try:
            result = self._pipeline(opened.picture.rgb, **self._cfg.restoration(opened.prompt))
        except InputError as error:
            return failed(opened.order, f"refused by the model: {error}")
        except FloatingPointError as error:
            return failed(opened.order, f"not finite: {error}")
        except (MemoryError, torch.OutOfMemoryError) as error:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            advice = "lower limits.max_output_megapixels, tile_px or the scale"
            return failed(opened.order, f"out of memory: {' '.join(str(error).split())[:200]}; {advice}")
        return result.array, time.perf_counter() - start_s

    def _close(self, opened: _Opened, restored: tuple[Any, float] | Outcome) -> Outcome:
        outcome = restored if isinstance(restored, Outcome) else self._publish(opened, *restored)
        self._reporter.end(outcome.output, outcome.state == "failed", outcome.megapixels)
        return outcome

    def _publish(self, opened: _Opened, levels: Any, seconds: float) -> Outcome:
        picture, order = opened.picture, opened.order
        assert picture is not None
        try:
            data, _ = write_picture(levels, picture, self._cfg.scale, self._cfg.output_options(order.path))
        except InputError as error:
            return failed(order, f"cannot be written: {error}")
        height, width = picture.rgb.shape[:2]
        size = (width * self._cfg.scale, height * self._cfg.scale)
        restored = Restored(data, (width, height), size, self._model, seconds, picture.notes)
        return self._publisher.publish(order, opened.sample, opened.prompt, restored)


def restore_on_ray(cfg: RestoreConfig, model: Model, orders: Sequence[Order]) -> Iterator[Outcome]:
    """An outcome for every order, as they come; on the connected Ray."""
    ledger = start_ledger()
    with shown(ledger.look, len(orders)), reporting_to(ledger.actor):
        for row in _dataset(cfg, model, orders, ledger).iter_rows():
            yield Outcome.from_json(row["outcome"])


def _dataset(cfg: RestoreConfig, model: Model, orders: Sequence[Order], ledger: RemoteLedger) -> ray.data.Dataset:
    size = max(1, min(_MAX_BLOCK, len(orders) // (cfg.workers.num_actors * _BLOCKS_PER_ACTOR)))
    blocks = [orders[start : start + size] for start in range(0, len(orders), size)]
    rows = [order_row(index, block) for index, block in enumerate(blocks)]
    workers = cfg.workers.of_captions().for_shards(len(rows))
    ray.data.DataContext.get_current().execution_no_progress_timeout_s = _STUCK_AFTER_S
    ds = ray.data.from_items(rows, override_num_blocks=len(rows))
    ds = ingest_stage(ds, [cfg.source()], cache_uri(cfg), workers)
    if cfg.caption.mode != "text":
        ds = map_shards(ds, Show(cfg.caption, cfg.limits).__call__, num_cpus=workers.num_cpus)
        ds = caption_stage(ds, cfg.caption, workers, seed=cfg.seed)
    return map_shards(
        ds,
        RestoreActor,
        num_cpus=cfg.workers.num_cpus,
        num_gpus=cfg.workers.num_gpus or None,
        fn_constructor_kwargs={"cfg": cfg, "model": model, "reporter": ledger},
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(cfg.workers.num_actors, len(rows))),
    )

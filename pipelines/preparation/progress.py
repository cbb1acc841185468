"""Progress per stage: workers count what they did on a small Ray actor, the driver draws it.

with watched({"ingest": 40, "crop": 320}) as board:      # a bar per stage, with its rate and an estimate
    ds = map_shards(ds, stage, name="crop", ...)         # stages laid over a dataset in here report by themselves
print(board.totals["crop"].per_busy_second)

Warnings that stages log in their workers ("the endpoint does not answer, waiting") are shown to the driver's user.
Nothing here decides anything: a lost count is a lost count.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

_POLL_S = 0.5
_LINE_EVERY_S = 15.0
_STAGE_LOGGER = "pipelines"


@dataclass
class StageCount:
    """What one stage did so far, everywhere together."""

    rows: int = 0
    """Pictures until the crop stage, crops from then on."""
    busy_s: float = 0.0
    """Seconds of its calls, added up over all processes."""

    @property
    def per_busy_second(self) -> float:
        return self.rows / self.busy_s if self.busy_s else 0.0


class Tally:
    """Adds up what workers report; runs as an actor."""

    def __init__(self) -> None:
        self.counts: dict[str, StageCount] = {}
        self.notices: list[str] = []

    def clear(self) -> None:
        self.counts, self.notices = {}, []

    def add(self, stage: str, rows: int, busy_s: float) -> None:
        count = self.counts.setdefault(stage, StageCount())
        count.rows += rows
        count.busy_s += busy_s

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def snapshot(self) -> tuple[dict[str, StageCount], list[str]]:
        """All counts, and the notices since the last call."""
        notices, self.notices = self.notices, []
        return self.counts, notices


class Counted:
    """A stage that reports to a tally how many rows it handled and how long it took."""

    def __init__(self, make: Callable[[], Callable[[pa.Table], pa.Table]], name: str, tally: Any) -> None:
        self.stage, self.name, self.tally = make(), name, tally

    def __call__(self, table: pa.Table) -> pa.Table:
        _forward_warnings(self.tally)
        start = time.perf_counter()
        result = self.stage(table)
        # A row is a shard before ingest and after write: the larger side counts pictures or crops.
        self.tally.add.remote(self.name, max(len(table), len(result)), time.perf_counter() - start)
        return result


_tally: ContextVar[Any] = ContextVar("tally", default=None)


def current_tally() -> Any:
    """The tally of the `watched` block we are in, or None."""
    return _tally.get()


class Board:
    """The driver's view of a tally."""

    def __init__(self, tally: Any, expected: Mapping[str, int]) -> None:
        self.tally, self.expected = tally, dict(expected)
        self.totals: dict[str, StageCount] = {}
        self.elapsed_s = 0.0

    def refresh(self) -> list[str]:
        """Fetches the counts; returns new notices."""
        try:
            self.totals, notices = ray.get(self.tally.snapshot.remote())
        except RayActorError:
            return []  # it went down with its node and comes back
        return list(notices)


@functools.lru_cache(maxsize=1)
def _tally_of(job_id: str) -> Any:
    """One actor for all blocks of a job: starting one costs a second of a core."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(Tally).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()


@contextmanager
def reporting_to(tally: Any) -> Iterator[None]:
    """Stages that are laid over a dataset inside the block report to `tally`, an actor of `Tally` or of a child."""
    token = _tally.set(tally)
    try:
        yield
    finally:
        _tally.reset(token)


@contextmanager
def watched(expected: Mapping[str, int]) -> Iterator[Board]:
    """Draws the progress of the stages that are laid over a dataset inside the block: `expected` rows for each."""
    board = Board(_tally_of(ray.get_runtime_context().get_job_id()), expected)
    ray.get(board.tally.clear.remote())
    token, done, start = _tally.set(board.tally), threading.Event(), time.monotonic()
    draw = _draw_bars if sys.stderr.isatty() else _write_lines
    thread = threading.Thread(target=draw, args=(board, done), daemon=True)
    thread.start()
    try:
        yield board
    finally:
        board.elapsed_s = time.monotonic() - start
        done.set()
        thread.join()
        _tally.reset(token)


def _draw_bars(board: Board, done: threading.Event) -> None:
    bars = {
        stage: tqdm(total=total, desc=f"{stage:<8}", unit=" rows", position=position, smoothing=0.1)
        for position, (stage, total) in enumerate(board.expected.items())
    }
    finished = False
    while not finished:
        finished = done.wait(_POLL_S)
        for notice in board.refresh():
            tqdm.write(notice, file=sys.stderr)
        for stage, bar in bars.items():
            bar.update(board.totals.get(stage, StageCount()).rows - bar.n)
    for bar in bars.values():
        bar.close()


def _write_lines(board: Board, done: threading.Event) -> None:
    """For logs: now and then one line, and every notice."""
    start = last = time.monotonic()
    finished = False
    while not finished:
        finished = done.wait(_POLL_S)
        for notice in board.refresh():
            print(notice, file=sys.stderr, flush=True)
        if finished or time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            print(progress_line(board.totals, board.expected, last - start), file=sys.stderr, flush=True)


def progress_line(totals: Mapping[str, StageCount], expected: Mapping[str, int], elapsed_s: float) -> str:
    """ "ingest 12/40 (3.1/s), crop 80/320 (20.4/s); about 12 s left"."""
    parts, left_s = [], 0.0
    for stage, total in expected.items():
        rows = totals.get(stage, StageCount()).rows
        rate = rows / elapsed_s if elapsed_s else 0.0
        parts.append(f"{stage} {rows}/{total} ({rate:.1f}/s)")
        left_s = max(left_s, (total - rows) / rate if rate else 0.0)
    return ", ".join(parts) + (f"; about {left_s:.0f} s left" if left_s >= 1 else "")


def stage_table(totals: Mapping[str, StageCount]) -> str:
    """What every stage handled, how fast a core is at it, and its share of the work."""
    busy_s = sum(count.busy_s for count in totals.values()) or 1.0
    lines = [f"{'stage':<12} {'rows':>9} {'a second, each core':>21} {'of the work':>13}"]
    lines += [
        f"  {stage:<10} {count.rows:>9} {count.per_busy_second:>21.1f} {count.busy_s / busy_s:>12.0%}"
        for stage, count in totals.items()
    ]
    return "\n".join(lines)


class _Forward(logging.Handler):
    def __init__(self, tally: Any) -> None:
        super().__init__(logging.WARNING)
        self.tally = tally

    def emit(self, record: logging.LogRecord) -> None:
        self.tally.notice.remote(f"{record.name.removeprefix('pipelines.')}: {record.getMessage()}")


def _forward_warnings(tally: Any) -> None:
    """Once per worker process and tally."""
    logger = logging.getLogger(_STAGE_LOGGER)
    forwards = [handler for handler in logger.handlers if isinstance(handler, _Forward)]
    if any(handler.tally == tally for handler in forwards):
        return
    for handler in forwards:
        logger.removeHandler(handler)
    logger.addHandler(_Forward(tally))

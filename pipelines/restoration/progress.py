"""What the person at the terminal sees: pictures, megapixels, failures and the time left, and every notice.

Workers report to a `Ledger`, which is an actor where they are other processes. It also counts how often a picture was
begun, so that one that kills its worker every time does not hold up the others for ever.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from pipelines.preparation.progress import Tally

_POLL_S = 0.5
_LINE_EVERY_S = 15.0
MAX_ATTEMPTS = 3
"""How often a picture is begun in one run; each time but the last, its worker was killed or its node lost."""


@dataclass(frozen=True)
class Totals:
    """So far in this run."""

    pictures: int = 0
    failed: int = 0
    megapixels: float = 0.0
    """Of results."""


class Ledger(Tally):
    """Adds up what workers report."""

    def __init__(self) -> None:
        super().__init__()
        self._attempts: Counter[str] = Counter()
        self._ended: dict[str, tuple[bool, float]] = {}

    def begin(self, output: str) -> int:
        """A picture is begun; how often it was, this time included."""
        self._attempts[output] += 1
        return self._attempts[output]

    def end(self, output: str, is_failed: bool, megapixels: float) -> None:
        self._ended[output] = (is_failed, megapixels)

    def look(self) -> tuple[Totals, list[str]]:
        """The totals, and the notices since the last look."""
        notices, self.notices = self.notices, []
        ended = self._ended.values()
        totals = Totals(len(ended), sum(is_failed for is_failed, _ in ended), sum(size for _, size in ended))
        return totals, notices


class Reporter(Protocol):
    """A ledger, wherever it is."""

    def begin(self, output: str) -> int: ...

    def end(self, output: str, is_failed: bool, megapixels: float) -> None: ...


class RemoteLedger:
    """A ledger that is an actor. One that is lost with its node comes back empty: counts are all that is lost."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def begin(self, output: str) -> int:
        try:
            return int(ray.get(self.actor.begin.remote(output)))
        except RayActorError:
            return 1

    def end(self, output: str, is_failed: bool, megapixels: float) -> None:
        self.actor.end.remote(output, is_failed, megapixels)

    def look(self) -> tuple[Totals, list[str]]:
        try:
            totals, notices = ray.get(self.actor.look.remote())
        except RayActorError:
            return Totals(), []
        return totals, notices


def start_ledger() -> RemoteLedger:
    """On this node of the connected Ray."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return RemoteLedger(ray.remote(Ledger).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote())


@contextmanager
def shown(look: Callable[[], tuple[Totals, list[str]]], num_pictures: int) -> Iterator[None]:
    """Draws the progress during the block: a bar on a terminal, a line now and then elsewhere."""
    is_over = threading.Event()
    draw = _draw_bar if sys.stderr.isatty() else _write_lines
    thread = threading.Thread(target=draw, args=(look, num_pictures, is_over), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _draw_bar(look: Callable[[], tuple[Totals, list[str]]], num_pictures: int, is_over: threading.Event) -> None:
    start, finished = time.monotonic(), False
    with tqdm(total=num_pictures, desc="restore", unit=" pictures", smoothing=0.1) as bar:
        while not finished:
            finished = is_over.wait(_POLL_S)
            totals, notices = look()
            for notice in notices:
                tqdm.write(notice, file=sys.stderr)
            rate = totals.megapixels / (time.monotonic() - start)
            bar.set_postfix_str(f"{rate:.2f} megapixels/s, {totals.failed} failed", refresh=False)
            bar.update(totals.pictures - bar.n)


def _write_lines(look: Callable[[], tuple[Totals, list[str]]], num_pictures: int, is_over: threading.Event) -> None:
    start = last = time.monotonic()
    finished = False
    while not finished:
        finished = is_over.wait(_POLL_S)
        totals, notices = look()
        for notice in notices:
            print(notice, file=sys.stderr, flush=True)
        if finished or time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            print(progress_line(totals, num_pictures, last - start), file=sys.stderr, flush=True)


def progress_line(totals: Totals, num_pictures: int, elapsed_s: float) -> str:
    """ "restore 12/40 pictures (1.2/s), 18.3 megapixels (1.83/s), 1 failed; about 23 s left"."""
    rate = totals.pictures / elapsed_s if elapsed_s else 0.0
    size_rate = totals.megapixels / elapsed_s if elapsed_s else 0.0
    left_s = (num_pictures - totals.pictures) / rate if rate else 0.0
    parts = [
        f"restore {totals.pictures}/{num_pictures} pictures ({rate:.2g}/s)",
        f"{totals.megapixels:.1f} megapixels ({size_rate:.2f}/s)",
        f"{totals.failed} failed",
    ]
    return ", ".join(parts) + (f"; about {left_s:.0f} s left" if left_s >= 1 else "")

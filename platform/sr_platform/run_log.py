"""Metrics and pictures -> a run in MLflow, from a thread of its own, so that a lost server stops no training.

    log = RunLog(runs.uri, run_id)                    # rank 0 alone: one writer per run
    log.restore(meta["pending_log"])                  # what the checkpoint of a dead worker had not delivered
    log.log([Metric("train/loss", 0.8, step=10)])     # returns at once, whatever the server does
    log.image("validation/cat", "s3://bucket/previews/update_10/cat.png", step=10)
    meta = {"pending_log": log.pending()}             # into the next checkpoint
    log.flush(60.0)

While the server is away everything is kept, at about 140 bytes per metric, and 80 in a checkpoint: twenty metrics in
each of 40,000 updates are 110 MB. Pictures stay in storage until they can be sent. Entries keep the time of logging.
"""

from __future__ import annotations

import io
import itertools
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sr_platform.errors import InputDataError, RequestError
from sr_platform.mlflow_client import (
    ADVICE_ON_CREDENTIALS,
    is_passing,
    is_unauthorised,
    open_client,
    reason,
    waits_s,
    without_credentials,
)
from sr_platform.storage import open_storage

_MAX_METRICS_PER_REQUEST = 1000
"""MLflow takes no more."""
_READING_TIMEOUT_S = 5.0
_FOREIGN_TO_PICTURE_NAMES = re.compile(r"[^a-zA-Z0-9_\-./ ]")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Metric:
    key: str
    value: float
    step: int


@dataclass(frozen=True, slots=True)
class _Entry:
    key: str
    step: int
    timestamp_ms: int
    value: float | None
    """Of a metric; None of a picture."""
    uri: str | None
    """Of a picture."""


class RunLog:
    """Delivers into a run that exists already, in the order of logging; its calls may come from several threads."""

    def __init__(self, uri: str, run_id: str) -> None:
        # Imported here and not in the thread: two threads that import at the same time can see half a module.
        import mlflow  # noqa: F401

        self.uri, self.run_id = uri, run_id
        self.step = 0
        """The largest step logged so far."""
        self._entries: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._client: Any = None
        self._is_closed = self._is_hurried = False
        self._num_since_loss: int | None = None
        self._advised: set[str] = set()
        self._num_refused = 0
        self._latest: dict[str, float] = {}
        self._reading: threading.Thread | None = None
        self._is_reading_noted = False

    def log(self, metrics: Sequence[Metric]) -> None:
        """Takes `metrics` down and returns at once."""
        now_ms = int(time.time() * 1000)
        self._add([_Entry(m.key, m.step, now_ms, float(m.value), None) for m in metrics])

    def image(self, key: str, uri: str, step: int) -> None:
        """Takes down the picture file at `uri`, local or s3://, which is read when it can be sent; returns at once.

        MLflow's page shows the pictures of one `key` with a slider over their steps.
        """
        key = _FOREIGN_TO_PICTURE_NAMES.sub("_", key)
        self._add([_Entry(key, step, int(time.time() * 1000), None, uri)])

    def pending(self) -> list[dict[str, Any]]:
        """What the server has not acknowledged, as JSON takes it; pictures as their URIs."""
        with self._changed:
            entries = list(self._entries)
        return [
            {"key": e.key, "step": e.step, "timestamp_ms": e.timestamp_ms}
            | ({"value": e.value} if e.uri is None else {"uri": e.uri})
            for e in entries
        ]

    def restore(self, pending: Sequence[dict[str, Any]]) -> None:
        """Takes down what another RunLog of the same run had pending, with its times.

        It may have been delivered meanwhile: MLflow keeps one of two equal metrics, and shows one of two pictures
        of the same key and step.
        """
        self._add([_Entry(p["key"], p["step"], p["timestamp_ms"], p.get("value"), p.get("uri")) for p in pending])

    def flush(self, timeout_s: float) -> bool:
        """Waits until nothing is pending; False when `timeout_s` was too short. Tries a lost server again at once."""
        with self._changed:
            self._is_hurried = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._entries, timeout_s)

    def close(self) -> None:
        """Ends the thread, at once, and says what was not delivered; `flush` before it. Nothing may be logged after."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=1.0)
        if self._entries:
            logger.warning(
                "tracking: %d entries of run %s were not delivered to %s",
                len(self._entries),
                self.run_id,
                without_credentials(self.uri),
            )
        if self._num_refused:
            logger.error("tracking: %d entries of run %s were refused in all", self._num_refused, self.run_id)

    def latest(self) -> dict[str, float]:
        """The last value of every metric of the run, by key; the last known ones where they cannot be read now.

        It raises nothing, and waits 5 s at most: MLflow itself would wait two minutes for a server that hangs.
        """
        if self._reading is None or not self._reading.is_alive():
            self._reading = threading.Thread(target=self._read_latest, name="run-log-latest", daemon=True)
            self._reading.start()
        self._reading.join(_READING_TIMEOUT_S)
        return self._latest

    def _read_latest(self) -> None:
        try:
            self._latest = dict(self._open().get_run(self.run_id).data.metrics)
        except Exception as error:  # noqa: BLE001 - somebody only wants to look
            if not is_passing(error) and not self._is_reading_noted:
                self._is_reading_noted = True
                logger.warning("tracking: run %s cannot be read: %s", self.run_id, reason(error, self.uri))

    def _add(self, entries: list[_Entry]) -> None:
        assert not self._is_closed, "a closed RunLog takes nothing"
        with self._changed:
            self._entries.extend(entries)
            self.step = max([self.step, *(e.step for e in entries)])
            if self._thread is None and entries:
                self._thread = threading.Thread(target=self._deliver_all, name="run-log", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _deliver_all(self) -> None:
        while batch := self._next_batch():
            self._deliver(batch)

    def _next_batch(self) -> list[_Entry]:
        """The oldest entries, as many as go into one request; waits for them. Empty when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._entries or self._is_closed)
            if self._is_closed:
                return []
            if self._entries[0].uri is not None:
                return [self._entries[0]]
            metrics = itertools.takewhile(lambda e: e.uri is None, self._entries)
            return list(itertools.islice(metrics, _MAX_METRICS_PER_REQUEST))

    def _deliver(self, batch: list[_Entry]) -> None:
        """Sends the oldest entries, again until the server has taken or refused them."""
        for wait_s in waits_s():
            if self._is_closed:
                return
            try:
                self._send(batch)
            except Exception as error:  # noqa: BLE001 - nothing that goes wrong here may end the log, or the training
                if is_passing(error):
                    self._note_loss(error)
                    self._pause(wait_s)
                    continue
                if len(batch) > 1:
                    # One bad entry must not take the others with it.
                    self._deliver(batch[: len(batch) // 2])
                    self._deliver(batch[len(batch) // 2 :])
                    return
                self._note_refusal(batch[0], error)
            self._drop(len(batch))
            return

    def _send(self, batch: list[_Entry]) -> None:
        from mlflow.entities import Metric as MlflowMetric

        client = self._open()
        if (picture := batch[0]).uri is not None:
            client.log_image(
                self.run_id,
                _read_picture(picture.uri),
                key=picture.key,
                step=picture.step,
                timestamp=picture.timestamp_ms,
                synchronous=True,
            )
        else:
            metrics = [MlflowMetric(e.key, e.value, e.timestamp_ms, e.step) for e in batch]
            client.log_batch(self.run_id, metrics=metrics, synchronous=True)

    def _open(self) -> Any:
        if self._client is None:
            self._client = open_client(self.uri)
        return self._client

    def _drop(self, num_entries: int) -> None:
        """Forgets the oldest entries, which the server has answered for."""
        with self._changed:
            for _ in range(num_entries):
                self._entries.popleft()
            self._is_hurried = False
            if self._num_since_loss is not None:
                self._num_since_loss += num_entries
                if not self._entries:
                    logger.info("tracking: caught up with %d entries of run %s", self._num_since_loss, self.run_id)
                    self._num_since_loss = None
                    self._advised.clear()
            self._changed.notify_all()

    def _pause(self, wait_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._is_hurried, wait_s)
            self._is_hurried = False

    def _note_loss(self, error: Exception) -> None:
        """Says it once until the log has caught up; and once more where waiting alone will not help."""
        self._num_since_loss = self._num_since_loss or 0
        advice = f"{ADVICE_ON_CREDENTIALS}; " if is_unauthorised(error) else ""
        if advice in self._advised or (self._advised and not advice):
            return
        self._advised.add(advice)
        logger.warning(
            "tracking: run %s cannot be written to %s: %s; %straining goes on, and everything is kept and sent later",
            self.run_id,
            without_credentials(self.uri),
            reason(error, self.uri),
            advice,
        )

    def _note_refusal(self, entry: _Entry, error: Exception) -> None:
        """Says it once per log. A refused entry is given up: it would be refused again, and hold up all others."""
        from mlflow.exceptions import MlflowException

        self._num_refused += 1
        is_explained = isinstance(error, (MlflowException, RequestError))
        if self._num_refused == 1:
            logger.error(
                "tracking: %s of step %d was refused and is given up, later refusals without a word: %s",
                entry.key,
                entry.step,
                reason(error, self.uri),
                exc_info=None if is_explained else error,
            )


def _read_picture(uri: str) -> Any:
    """A PIL image. Raises InputDataError when there is none, StorageError when storage keeps failing."""
    from PIL import Image

    folder, _, name = uri.rpartition("/")
    data = open_storage(folder).read_bytes(name)
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise InputDataError(f"tracking: {uri} is not a picture: {error}") from error
    return picture

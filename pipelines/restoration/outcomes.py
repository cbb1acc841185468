"""What came of a picture, and its publication: the result first, its record then."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from pipelines.restoration.model import Model
from pipelines.restoration.orders import Order
from pipelines.restoration.recipe import RestoreConfig
from pipelines.restoration.records import Record, Records
from pipelines.stages.sample import Sample
from sr_platform.storage import open_storage

State = Literal["done", "skipped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """Of one picture in this run."""

    path: str
    output: str
    state: State
    record: Record | None = None
    reason: str = ""
    """Of a failure, in a word or two that failures are counted by."""
    detail: str = ""

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "record": self.record and self.record.to_json()})

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        fields = json.loads(text)
        record = fields["record"]
        return cls(**{**fields, "record": Record.from_json(record) if record else None})

    @property
    def megapixels(self) -> float:
        """Of the result."""
        if self.record is None:
            return 0.0
        width, height = self.record.output_size_px
        return width * height / 1e6


@dataclass(frozen=True)
class Restored:
    """A result as a file, before it is published."""

    data: bytes
    input_size_px: tuple[int, int]
    output_size_px: tuple[int, int]
    model: Model
    seconds: float
    notes: tuple[str, ...] = ()


def failed(order: Order, problem: str) -> Outcome:
    """Of a `problem` as "reason: detail"."""
    reason, _, detail = problem.partition(": ")
    return Outcome(order.path, order.output, "failed", None, reason, detail)


class Publisher:
    """Publishes results below the output of a run."""

    def __init__(self, cfg: RestoreConfig) -> None:
        self._out, self._settings = open_storage(cfg.out), cfg.settings_digest
        self._records = Records(self._out)

    def published_before(self, order: Order) -> Outcome | None:
        """What this run has published of it already, where a worker was killed since."""
        record = self._records.find(order.output)
        if record is None or record.settings != self._settings or record.fingerprint != order.fingerprint:
            return None
        return Outcome(order.path, order.output, "done", record) if self._out.exists(order.output) else None

    def unchanged(self, order: Order, sample: Sample, prompt: str) -> Outcome | None:
        """The result of an earlier run, where only the time of the input's last change is another."""
        before = order.before
        if before is None or (before.input_sha256, before.prompt) != (sample.source_sha256, prompt):
            return None
        record = dataclasses.replace(before, path=order.path, fingerprint=order.fingerprint)
        self._records.write(record)
        return Outcome(order.path, order.output, "skipped", record)

    def publish(self, order: Order, sample: Sample, prompt: str, restored: Restored) -> Outcome:
        """Raises StorageError when storage keeps failing."""
        record = Record(
            path=order.path,
            output=order.output,
            fingerprint=order.fingerprint,
            input_sha256=sample.source_sha256,
            input_size_px=restored.input_size_px,
            output_sha256=hashlib.sha256(restored.data).hexdigest(),
            output_bytes=len(restored.data),
            output_size_px=restored.output_size_px,
            prompt=prompt,
            settings=self._settings,
            model_version=restored.model.version,
            manifest_digest=restored.model.manifest_digest,
            seconds=round(restored.seconds, 3),
            notes=restored.notes,
        )
        self._out.write_bytes_atomic(order.output, restored.data)
        self._records.write(record)
        return Outcome(order.path, order.output, "done", record)

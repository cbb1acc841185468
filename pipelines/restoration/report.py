"""The report of a run: every picture of the input with what came of it, for programs and for people.

OUT/restore_report.json      {"counts", "failures", "settings", "model", "pictures": [...]}
OUT/restore_report.md        counts, and every picture that failed, with its reason
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.restoration.model import Model
from pipelines.restoration.orders import Plan
from pipelines.restoration.outcomes import Outcome
from pipelines.restoration.recipe import RestoreConfig
from sr_platform.storage import Storage

JSON_NAME, TEXT_NAME = "restore_report.json", "restore_report.md"
_SHOWN_FAILURES = 1000


@dataclass(frozen=True)
class Report:
    """Every picture of the input once, in the order of their paths."""

    pictures: Sequence[Mapping[str, Any]]
    seconds: float
    settings: Mapping[str, Any]
    model: Mapping[str, Any]
    input_uri: str
    out_uri: str

    @property
    def counts(self) -> dict[str, int]:
        """By state, all of them, and together."""
        counted = Counter(picture["state"] for picture in self.pictures)
        states = ("done", "skipped", "failed", "waiting")
        return {**{state: counted[state] for state in states}, "pictures": len(self.pictures)}

    @property
    def failures(self) -> dict[str, int]:
        """By reason, the most frequent first."""
        failed = (picture["error"]["reason"] for picture in self.pictures if picture["state"] == "failed")
        return dict(Counter(failed).most_common())

    def write(self, out: Storage) -> None:
        out.write_chunks(JSON_NAME, self._json())
        out.write_bytes_atomic(TEXT_NAME, self.text().encode())

    def text(self) -> str:
        """As Markdown."""
        counts, model = self.counts, self.model
        lines = [
            "# Restored pictures",
            "",
            f"From {self.input_uri} to {self.out_uri}, by {model['version'] or 'a model that is not known'}, "
            f"in {self.seconds:.1f} s.",
            "",
            *(f"- {state}: {counts[state]}" for state in counts),
        ]
        failed = [picture for picture in self.pictures if picture["state"] == "failed"]
        if failed:
            lines += ["", "| picture | reason | detail |", "|---|---|---|"]
            lines += [
                f"| {_cell(p['input'])} | {_cell(p['error']['reason'])} | {_cell(p['error']['detail'])} |"
                for p in failed[:_SHOWN_FAILURES]
            ]
        if len(failed) > _SHOWN_FAILURES:
            lines += ["", f"{len(failed) - _SHOWN_FAILURES} more are listed in {JSON_NAME}."]
        return "\n".join(lines) + "\n"

    def _json(self) -> Iterator[bytes]:
        """A line per picture: a run may have millions."""
        about = {
            "counts": self.counts,
            "failures": self.failures,
            "seconds": round(self.seconds, 3),
            "input": self.input_uri,
            "out": self.out_uri,
            "settings": self.settings,
            "model": self.model,
        }
        yield json.dumps(about, indent=2)[:-2].encode() + b',\n  "pictures": ['
        for index, picture in enumerate(self.pictures):
            yield (",\n    " if index else "\n    ").encode() + json.dumps(picture).encode()
        yield b"\n  ]\n}\n"


def make_report(
    cfg: RestoreConfig, model: Model, plan: Plan, outcomes: Iterable[Outcome], *, urls: tuple[str, str], seconds: float
) -> Report:
    """`urls` are those of input and output."""
    pictures: dict[str, dict[str, Any]] = {}
    for path, problem in plan.unusable.items():
        reason, _, detail = problem.partition(": ")
        pictures[path] = _entry(Outcome(path, "", "failed", None, reason, detail))
    for order in plan.todo:
        pictures[order.path] = {"input": order.path, "output": order.output, "state": "waiting"}
    for path, record in plan.done.items():
        pictures[path] = _entry(Outcome(path, record.output, "skipped", record))
    for outcome in outcomes:
        pictures[outcome.path] = _entry(outcome)
    return Report(
        pictures=[pictures[path] for path in sorted(pictures)],
        seconds=seconds,
        settings={"digest": cfg.settings_digest, **cfg.settings()},
        model={"uri": model.uri, "version": model.version, "manifest_digest": model.manifest_digest},
        input_uri=urls[0],
        out_uri=urls[1],
    )


def _entry(outcome: Outcome) -> dict[str, Any]:
    entry: dict[str, Any] = {"input": outcome.path, "output": outcome.output or None, "state": outcome.state}
    if outcome.state == "failed":
        return {**entry, "error": {"reason": outcome.reason, "detail": outcome.detail}}
    record = outcome.record
    assert record is not None
    return {
        **entry,
        "input_size_px": record.input_size_px,
        "output_size_px": record.output_size_px,
        "output_bytes": record.output_bytes,
        "output_sha256": record.output_sha256,
        "seconds": record.seconds,
        "prompt": record.prompt,
        "model_version": record.model_version,
        "manifest_digest": record.manifest_digest,
        "settings_digest": record.settings,
        "notes": record.notes,
    }


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")

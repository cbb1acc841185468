"""What there is to do: every picture of the input is to be restored, done already, or cannot be.

In : the listing of the input, that of the output, the records of earlier runs.
Out: a `Plan`; nothing was written, and every conflict is known.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.listing import Picture
from pipelines.preparation.destination import differences
from pipelines.restoration.naming import name_problem, output_name, refuse_collisions
from pipelines.restoration.recipe import SOURCE_NAME, RestoreConfig
from pipelines.restoration.records import FOLDER, Claim, Record, Records
from sr_platform.errors import ConfigError
from sr_platform.storage import Storage

_NAMED = 3


@dataclass(frozen=True)
class Order:
    """One picture to restore."""

    path: str
    """Below the input's URI, printable."""
    output: str
    """Below the output's URI."""
    place: str
    """Where its bytes are, as the listing writes it."""
    size_bytes: int
    fingerprint: str
    before: Record | None = None
    """Of a result that may still hold: only the time of the input's last change tells otherwise."""

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "before": self.before and self.before.to_json()})

    @classmethod
    def from_json(cls, text: str) -> Order:
        fields = json.loads(text)
        before = fields["before"]
        return cls(**{**fields, "before": Record.from_json(before) if before else None})


@dataclass(frozen=True)
class Plan:
    """Every picture of the input is in one of `todo`, `done` and `unusable`."""

    todo: tuple[Order, ...]
    done: dict[str, Record]
    """By path."""
    unusable: dict[str, str]
    """Why a picture cannot even be begun, as "reason: detail", by path."""
    records: dict[str, Record]
    """All there are, by output."""
    num_changed: int = 0
    """Of `todo`: there is a result, of an input that has changed since."""
    num_replaced: int = 0
    """Of `todo`: there is a result of other settings, or a file that is not ours."""


def make_plan(
    cfg: RestoreConfig,
    pictures: Sequence[Picture],
    out: Storage,
    *,
    model_version: str,
) -> Plan:
    """What is to be done with `pictures`; an empty `model_version` is one that is not known, and equals every other.

    Raises:
        InputDataError: two results would have one name.
        ConfigError: results are there that were made otherwise, or files of others, and `overwrite` is off.
    """
    orders, unusable = _orders(cfg, pictures)
    records = Records(out)
    known, claim = records.load(), records.claimed()
    sizes = {name: size for name, size in out.sizes().items() if not name.startswith(f"{FOLDER}/")}
    sorting = _Sorting(cfg.settings_digest, model_version, known, claim, sizes)
    for order in orders:
        sorting.add(order)
    if not cfg.overwrite:
        _refuse_others(cfg, out, records, sorting)
    return Plan(
        todo=tuple(sorting.todo),
        done=sorting.done,
        unusable=unusable,
        records=known,
        num_changed=sorting.num_changed,
        num_replaced=len(sorting.otherwise) + len(sorting.foreign),
    )


class _Sorting:
    """Looks at one order after the other."""

    def __init__(
        self,
        settings: str,
        model_version: str,
        known: Mapping[str, Record],
        claim: Claim | None,
        sizes: Mapping[str, int],
    ) -> None:
        self.settings, self.model_version = settings, model_version
        self.known, self.claim, self.sizes = known, claim, sizes
        self.todo: list[Order] = []
        self.done: dict[str, Record] = {}
        self.otherwise: list[Record] = []
        self.foreign: list[str] = []
        self.num_changed = 0

    def add(self, order: Order) -> None:
        record, size_bytes = self.known.get(order.output), self.sizes.get(order.output)
        if size_bytes is None:
            self.todo.append(order)
        elif record is None or record.output_bytes != size_bytes or self._was_replaced(record):
            if not self._is_of_the_claim(order.output):
                self.foreign.append(order.output)
            self.todo.append(order)
        elif not self._is_made_alike(record):
            if not self._is_of_the_claim(order.output):
                self.otherwise.append(record)
            self.todo.append(order)
        elif record.path != order.path or record.fingerprint != order.fingerprint:
            self.num_changed += 1
            self.todo.append(dataclasses.replace(order, before=record))
        else:
            self.done[order.path] = record

    def _is_made_alike(self, record: Record) -> bool:
        return _alike(record, self.settings, self.model_version)

    def _is_of_the_claim(self, output: str) -> bool:
        """Whether a run with these settings was killed that was to make it: it may be the picture it had in hand."""
        claim = self.claim
        return claim is not None and output in claim.outputs and _alike(claim, self.settings, self.model_version)

    def _was_replaced(self, record: Record) -> bool:
        """Whether a run of other settings may have published it anew and was killed before it could say so."""
        claim = self.claim
        return (
            claim is not None
            and record.output in claim.outputs
            and not _alike(claim, record.settings, record.model_version)
        )


def _alike(made: Record | Claim, settings: str, model_version: str) -> bool:
    """Whether it is of these settings and this model; a model that is not known equals every other."""
    return made.settings == settings and (
        "" in (made.model_version, model_version) or made.model_version == model_version
    )


def _orders(cfg: RestoreConfig, pictures: Sequence[Picture]) -> tuple[list[Order], dict[str, str]]:
    orders, unusable = [], {}
    for picture in pictures:
        path = picture.name.removeprefix(f"{SOURCE_NAME}/")
        output = output_name(
            path,
            template=cfg.name_template,
            wanted=cfg.output.format,
            scale=cfg.scale,
            seed=cfg.seed,
            steps=cfg.num_inference_steps,
        )
        problem = picture.problem or name_problem(output) or _too_many_bytes(picture, cfg)
        if problem:
            unusable[path] = problem
        else:
            orders.append(Order(path, output, picture.place, picture.size_bytes, picture.fingerprint))
    refuse_collisions({order.path: order.output for order in orders})
    return orders, unusable


def _too_many_bytes(picture: Picture, cfg: RestoreConfig) -> str:
    allowed = cfg.limits.max_upload_bytes
    if picture.size_bytes <= allowed:
        return ""
    return (
        f"too large: {picture.size_bytes:,} bytes; at most {allowed:,} are allowed: send a smaller file, or raise "
        "limits.max_file_mib"
    )


def _refuse_others(cfg: RestoreConfig, out: Storage, records: Records, sorting: _Sorting) -> None:
    if sorting.otherwise:
        first = sorting.otherwise[0]
        names = differences(records.settings_of(first.settings), cfg.settings())
        if sorting.model_version and first.model_version != sorting.model_version:
            names = [*names, f"model {first.model_version} then, {sorting.model_version} now"]
        raise ConfigError(
            f"restore: {len(sorting.otherwise)} results in {out.uri} were made otherwise ({', '.join(names)}), such as "
            f"{first.output}; old and new are not mixed: choose another --out or name_template, or --overwrite them"
        )
    if sorting.foreign:
        shown = ", ".join(sorted(sorting.foreign)[:_NAMED])
        raise ConfigError(
            f"restore: {len(sorting.foreign)} files in {out.uri} bear names of results, and this job did not make "
            f"them as they are ({shown}); choose another --out or name_template, or --overwrite them"
        )

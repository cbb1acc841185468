"""When so much of the input is bad that going on makes no sense: the job stops and says what is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import pydantic

from pipelines.preparation.plan import CHOICES, count_reasons
from pipelines.stages.write import rejected
from sr_platform.config import StrictConfig
from sr_platform.errors import InputDataError
from sr_platform.publication import json_lines
from sr_platform.shards import QUARANTINE_NAME
from sr_platform.storage import Storage


class QuarantineConfig(StrictConfig):
    """How many bad pictures are borne. Pictures that the recipe filters out do not count."""

    max_fraction: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.1
    """Of all pictures; beyond it the job stops."""
    always_allowed: pydantic.NonNegativeInt = 20
    """So many never stop it, however few pictures there are."""


class Ceiling:
    """Counts bad pictures and stops the job when there are too many."""

    def __init__(self, cfg: QuarantineConfig, num_pictures: int, out: Storage) -> None:
        self.num_pictures, self.out = num_pictures, out
        self.allowed = max(cfg.always_allowed, int(cfg.max_fraction * num_pictures))
        self.bad: dict[str, str] = {}

    def add(self, problems: Iterable[tuple[str, str]]) -> None:
        """Takes (picture, "reason: detail") of what was left out.

        Raises:
            InputDataError: too many are bad. They are listed in quarantine.jsonl then.
        """
        for name, problem in problems:
            if problem.partition(": ")[0] not in CHOICES:
                self.bad.setdefault(name, problem)
        if len(self.bad) <= self.allowed:
            return
        lines = json_lines(rejected(name, problem).model_dump() for name, problem in sorted(self.bad.items()))
        self.out.write_bytes_atomic(QUARANTINE_NAME, lines)
        counted = ", ".join(f"{n} {reason}" for reason, n in sorted(count_reasons(list(self.bad.values())).items()))
        name, problem = next(iter(sorted(self.bad.items())))
        raise InputDataError(
            f"prepare: {len(self.bad)} of {self.num_pictures} pictures are bad so far ({counted}; {name}: "
            f"{problem.partition(': ')[2]}), and {self.allowed} are allowed; {self.out.path(QUARANTINE_NAME)} lists "
            "them; mend them or raise quarantine.max_fraction"
        )

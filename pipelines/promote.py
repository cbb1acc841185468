"""The gate: a registered version becomes candidate or champion only if its evaluation exists and is good enough.

    python pipelines/promote.py gate_table1.yaml --name faithdiff --model-version 7 --alias champion
    python pipelines/promote.py gate_table1.yaml --name faithdiff --model-version 7 --alias champion --dry-run
    python pipelines/promote.py ... --force --reason "the champion was trained on data that is withdrawn"

In : a version in the registry of MLFLOW_TRACKING_URI, and its newest finished evaluation (pipelines/evaluate.py) under
     the named protocol; the same of the current champion, if there is one.
Out: the alias moved, and on the version the tags `gate.<alias>` (passed, forced or refused) and
     `gate.<alias>.evidence` (JSON: both evaluations, every mean, margin and reason).

Not good enough is: a mean that is worse than the champion's by more than its margin, over the same pictures; a score
that is missing; evaluations that are not comparable. A refusal is recorded too, moves nothing and exits with status 2.
`--force` moves the alias all the same, and needs a reason.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any, Literal

import pydantic

from faithdiff.errors import InputError
from pipelines.evaluation.gate import Verdict, judge
from pipelines.evaluation.gate_evidence import Evidence, find_evidence
from sr_platform.config import StrictConfig, load_config, run_job
from sr_platform.errors import RequestError
from sr_platform.model_registry import alias_version, give_alias, tag_version, version_tags

CHAMPION = "champion"


class PromoteConfig(StrictConfig):
    """Which version, for which alias, and how much worse it may be."""

    name: str
    """Of the registered model."""
    model_version: pydantic.PositiveInt
    """The version that is to be promoted."""
    alias: Literal["candidate", "champion"] = "champion"
    """What it becomes. Both are judged against the current champion."""
    protocol: str = pydantic.Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the protocol under which it was evaluated."""
    margins: dict[str, pydantic.NonNegativeFloat]
    """Metric -> how much worse its mean may be, in its own unit; what is not named is not asked for."""
    experiment: str = "faithdiff-evaluation"
    """MLflow experiment of the evaluations."""
    force: bool = False
    """Promote whatever the evaluation says, or without one."""
    reason: str = ""
    """Why it is forced; kept in the registry."""
    dry_run: bool = False
    """Print the verdict, and change nothing."""

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> PromoteConfig:
        if self.force and not self.reason.strip():
            raise ValueError('force needs a reason: give --reason "..."')
        if self.reason and not self.force:
            raise ValueError("reason is only for --force; leave it out, or force")
        if not self.margins:
            raise ValueError("margins: is empty; name at least one metric and how much worse it may be")
        return self


class GateRefusedError(RequestError):
    """The version is not good enough, or nobody knows whether it is."""


def main(argv: Sequence[str]) -> None:
    cfg = load_config(PromoteConfig, argv, job="promote", description=__doc__ or "")
    print(promote(cfg))


def promote(cfg: PromoteConfig) -> str:
    """Moves the alias if the gate lets it; returns an account.

    Raises:
        GateRefusedError: it does not. The refusal and its evidence are tags of the version.
        RequestError: there is no such version, or the registry does not answer.
    """
    version_tags(cfg.name, cfg.model_version)
    champion = alias_version(cfg.name, CHAMPION)
    verdict = weigh(cfg, None if champion == cfg.model_version else champion)
    passed = verdict.is_good or cfg.force
    if cfg.dry_run:
        return f"{account(cfg, verdict)}\nnothing was changed"
    outcome = "forced" if cfg.force else "passed" if verdict.is_good else "refused"
    tags = tags_of(cfg, verdict, outcome, champion)
    if not passed:
        tag_version(cfg.name, cfg.model_version, tags)
        raise GateRefusedError(
            f"promote: {cfg.name}/{cfg.model_version} does not become {cfg.alias}: {'; '.join(verdict.reasons)}"
        )
    give_alias(cfg.name, cfg.alias, cfg.model_version, tags)
    return f"{account(cfg, verdict)}\n{cfg.name}@{cfg.alias} is version {cfg.model_version} now ({outcome})"


def weigh(cfg: PromoteConfig, champion: int | None) -> Verdict:
    """The version's evaluation against the champion's; without a champion it has to be complete."""
    own = find_evidence(cfg.name, cfg.model_version, protocol=cfg.protocol, experiment=cfg.experiment)
    if own is None:
        return Verdict(reasons=(_unevaluated(cfg, cfg.model_version),))
    theirs: Evidence | None = None
    if champion is not None:
        theirs = find_evidence(cfg.name, champion, protocol=cfg.protocol, experiment=cfg.experiment)
        if theirs is None:
            return Verdict(reasons=(f"the champion: {_unevaluated(cfg, champion)}",), run_id=own.run_id)
    return judge(own, theirs, cfg.margins)


def tags_of(cfg: PromoteConfig, verdict: Verdict, outcome: str, champion: int | None) -> dict[str, str]:
    """The decision and its evidence."""
    evidence: dict[str, Any] = {
        "outcome": outcome,
        "protocol": cfg.protocol,
        "champion": champion,
        "reason": cfg.reason,
        "decided": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **verdict.record(),
    }
    key = f"gate.{cfg.alias}"
    return {key: outcome, f"{key}.evidence": json.dumps(evidence)}


def account(cfg: PromoteConfig, verdict: Verdict) -> str:
    """What was compared, a line per metric, and what speaks against it."""
    lines = [f"{cfg.name}/{cfg.model_version} under {cfg.protocol}:"]
    lines += [f"  {line}" for line in verdict.lines()]
    lines += [f"  against it: {reason}" for reason in verdict.reasons]
    return "\n".join(lines)


def _unevaluated(cfg: PromoteConfig, version: int) -> str:
    return (
        f"{cfg.name}/{version} has no finished evaluation under {cfg.protocol} in the experiment {cfg.experiment}; "
        f"run python pipelines/evaluate.py protocol_{cfg.protocol}.yaml --model models:/{cfg.name}/{version} first"
    )


if __name__ == "__main__":
    run_job(main, user_errors=(InputError,))

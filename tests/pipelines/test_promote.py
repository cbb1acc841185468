"""The gate lets through what was evaluated and is not worse than the champion, and writes down why."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluation.measuring import Score
from pipelines.evaluation.results import write_scores
from pipelines.evaluation.track import MODEL_WEIGHTS_TAG, PROTOCOL_TAG
from pipelines.promote import GateRefusedError, PromoteConfig, main, promote
from sr_platform.config import RECIPES_PATH, read_recipe, validate
from sr_platform.errors import ConfigError, RequestError
from sr_platform.mlflow_client import open_client
from sr_platform.model_registry import alias_version, version_tags
from sr_platform.tracking import Tracking

PICTURES = tuple(f"picture {number}" for number in range(6))
EXPERIMENT = "faithdiff-evaluation"


class Registry:
    """Models and evaluations on a real MLflow, in an SQLite file."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, ""
        self.models = Tracking.open(default_path=path, experiment="training")
        self.evaluations = Tracking.open(default_path=path, experiment=EXPERIMENT)

    def config(self, version: int, **changes: Any) -> PromoteConfig:
        margins = {"psnr": 0.2, "lpips": 0.01}
        values = {"name": self.name, "model_version": version, "protocol": "p", "margins": margins, **changes}
        return validate(PromoteConfig, values, where="test")

    def tags(self, version: int) -> dict[str, str]:
        return version_tags(self.name, version)

    def evidence(self, version: int, alias: str = "champion") -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.tags(version)[f"gate.{alias}.evidence"])
        return found

    def holder(self, alias: str = "champion") -> int | None:
        return alias_version(self.name, alias)

    def register(self) -> int:
        run_id = self.models.start("train", params={}, tags={})
        about: dict[str, Any] = {"name": self.name, "alias": "newest", "run_id": run_id, "digest": run_id, "tags": {}}
        return int(self.models.register_model(str(self.path), **about))

    def evaluate(
        self,
        version: int,
        *,
        psnr: float,
        lpips: float | None = 0.3,
        protocol: str = "p",
        digest: str = "sha256:1",
        is_finished: bool = True,
    ) -> str:
        """Every picture has its own level, and the same distance from it."""
        scores = [Score("ours", name, "psnr", psnr + i, None, 0.1) for i, name in enumerate(PICTURES)]
        reason = "no weights" if lpips is None else None
        scores += [Score("ours", name, "lpips", lpips, reason, 0.1) for name in PICTURES]
        header = {
            "protocol": {"name": protocol, "digest_of": digest},
            "protocol_digest": digest,
            "methods": ["ours"],
            "metrics": [{"name": "psnr", "higher_is_better": True}, {"name": "lpips", "higher_is_better": False}],
            "pictures": [{"name": name, "lq_digest": name} for name in PICTURES],
        }
        tags = {
            PROTOCOL_TAG: protocol,
            "model_version": f"{self.name}/{version}",
            MODEL_WEIGHTS_TAG: f"weights {version}",
        }
        run_id = self.evaluations.start("evaluate", params={}, tags=tags)
        report = self.path / run_id
        write_scores(str(report), header, scores)
        for file in ("report.json", "scores.parquet"):
            open_client(self.evaluations.uri).log_artifact(run_id, str(report / file))
        self.evaluations.finish(run_id, failed=not is_finished)
        return run_id


@pytest.fixture(scope="module")
def one_registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """MLflow takes seconds to lay out its tables: all tests share a file, and each has a model of its own."""
    path = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path / 'mlflow.db'}")
        return Registry(path)


@pytest.fixture
def registry(one_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one_registry.models.uri)
    # The versions are folders without weights: whoever is not found by version is not found.
    monkeypatch.setattr("pipelines.training.export.model_digest", lambda uri: "no weights")
    one_registry.name = f"net-{uuid.uuid4().hex[:8]}"
    return one_registry


@pytest.fixture
def champion(registry: Registry) -> int:
    """Version 1, evaluated and promoted."""
    version = registry.register()
    registry.evaluate(version, psnr=25.0)
    promote(registry.config(version))
    return version


def test_the_first_champion_needs_a_complete_evaluation_and_nothing_to_beat(registry: Registry) -> None:
    version = registry.register()
    with pytest.raises(
        GateRefusedError, match=r"/1 has no finished evaluation under p .*--model models:/net-\w+/1 first"
    ):
        promote(registry.config(version))
    assert registry.holder() is None
    assert registry.tags(version)["gate.champion"] == "refused"
    registry.evaluate(version, psnr=25, is_finished=False)
    registry.evaluate(version, psnr=25, protocol="another")
    with pytest.raises(GateRefusedError, match="has no finished evaluation under p"):
        promote(registry.config(version))
    run_id = registry.evaluate(version, psnr=25)
    assert "@champion is version 1 now (passed)" in promote(registry.config(version))
    assert registry.holder() == 1
    assert registry.evidence(version)["evaluation_run"] == run_id
    assert registry.evidence(version)["metrics"]["psnr"]["mean"] == pytest.approx(27.5)


@pytest.mark.parametrize("alias", ["candidate", "champion"])
@pytest.mark.parametrize(("psnr", "lpips"), [(25.5, 0.2), (24.85, 0.305)])
def test_a_better_or_hardly_worse_version_passes(
    registry: Registry, champion: int, alias: str, psnr: float, lpips: float
) -> None:
    version = registry.register()
    registry.evaluate(version, psnr=psnr, lpips=lpips)
    promote(registry.config(version, alias=alias))
    assert registry.holder(alias) == version
    assert registry.holder() == (version if alias == "champion" else champion)
    found = registry.evidence(version, alias)
    assert found["outcome"] == "passed"
    assert found["champion"] == champion
    assert found["metrics"]["psnr"]["worse_by"] == pytest.approx(25 - psnr)
    assert found["metrics"]["lpips"]["worse_by"] == pytest.approx(lpips - 0.3)
    assert found["metrics"]["psnr"]["margin"] == 0.2


@pytest.mark.parametrize(
    ("psnr", "lpips", "message"),
    [
        (24.7, 0.3, "psnr is worse by 0.3, and 0.2 is allowed"),
        (26.0, 0.32, "lpips is worse by 0.02, and 0.01 is allowed"),
        (26.0, None, r"its lpips is missing on 6 of 6 pictures \(no weights\)"),
    ],
)
def test_a_worse_or_unknown_version_is_refused_and_the_refusal_recorded(
    registry: Registry, champion: int, psnr: float, lpips: float | None, message: str
) -> None:
    version = registry.register()
    registry.evaluate(version, psnr=psnr, lpips=lpips)
    with pytest.raises(GateRefusedError, match=message):
        promote(registry.config(version))
    assert registry.holder() == champion
    assert registry.evidence(version)["outcome"] == "refused"
    assert registry.evidence(version)["against"]


def test_the_newest_evaluation_counts(registry: Registry, champion: int) -> None:
    version = registry.register()
    registry.evaluate(version, psnr=20)
    registry.evaluate(version, psnr=26)
    promote(registry.config(version))
    assert registry.holder() == version


def test_evaluations_by_other_rules_are_not_compared(registry: Registry, champion: int) -> None:
    version = registry.register()
    registry.evaluate(version, psnr=30, digest="sha256:2")
    with pytest.raises(
        GateRefusedError, match="not comparable with the champion: digest_of: sha256:2 against sha256:1"
    ):
        promote(registry.config(version))


def test_force_needs_a_reason_and_keeps_it(registry: Registry, champion: int) -> None:
    version = registry.register()
    for wrong in ({"force": True}, {"force": True, "reason": "  "}, {"reason": "because"}):
        with pytest.raises(ConfigError, match="reason"):
            registry.config(version, **wrong)
    promote(registry.config(version, force=True, reason="the champion leaks its training data"))
    assert registry.holder() == version
    assert registry.tags(version)["gate.champion"] == "forced"
    assert registry.evidence(version)["reason"] == "the champion leaks its training data"
    assert "has no finished evaluation" in registry.evidence(version)["against"][0]


def test_a_dry_run_tells_and_changes_nothing(registry: Registry, champion: int) -> None:
    version = registry.register()
    registry.evaluate(version, psnr=24)
    told = promote(registry.config(version, dry_run=True))
    assert "psnr: 26.5000, champion 27.5000, worse by 1.0000 over 6 pictures" in told
    assert "against it: psnr is worse by 1" in told
    assert "gate.champion" not in registry.tags(version)


def test_the_champion_itself_may_be_confirmed(registry: Registry, champion: int) -> None:
    promote(registry.config(champion))
    assert registry.holder() == champion


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model_version": 7}, "/7 is not in the registry"), ({"name": "nobody"}, "is not in the registry")],
)
def test_a_version_that_does_not_exist_is_told(registry: Registry, champion: int, changes: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        promote(registry.config(1, **changes))


def test_without_a_registry_the_message_says_what_to_set(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(RequestError, match="set it to the tracking server"):
        promote(registry.config(1))


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES_PATH.glob("gate_*.yaml")))
def test_shipped_gates_ask_for_metrics_that_their_protocol_measures(name: str) -> None:
    cfg = validate(PromoteConfig, {**read_recipe(name, job="test"), "model_version": 1}, where=name)
    protocol = read_recipe(f"protocol_{cfg.protocol}.yaml", job="test")
    assert set(cfg.margins) <= {metric["name"] for metric in protocol["metrics"]}


def test_the_command_line_takes_a_recipe_and_flags(registry: Registry, champion: int, capsys: Any) -> None:
    version = registry.register()
    registry.evaluate(version, psnr=25, protocol="table1_nano")
    registry.evaluate(champion, psnr=25, protocol="table1_nano")
    with pytest.raises(GateRefusedError, match="does not measure ssim"):
        main(["gate_nano.yaml", "--name", registry.name, "--model-version", str(version), "--alias", "candidate"])

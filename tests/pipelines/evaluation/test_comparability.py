"""Reports are comparable under one digest and of the same pixels; otherwise what differs is named."""

from __future__ import annotations

from typing import Any

from pipelines.evaluation.comparability import comparability, side_by_side
from pipelines.evaluation.score_table import Metric, ScoreTable


def report(values: dict[str, float | None], digest: str = "sha256:1", lq: str = "x", **protocol: Any) -> ScoreTable:
    return ScoreTable(
        header={
            "protocol": {"restoration": {"seed": 42}, **protocol},
            "protocol_digest": digest,
            "pictures": [{"name": name, "lq_digest": lq} for name in values],
        },
        methods=("ours",),
        metrics=(Metric("psnr", True, "dB"),),
        pictures=tuple(values),
        values={("ours", "psnr"): values},
        reasons={},
    )


def test_the_same_rules_and_pixels_are_comparable() -> None:
    assert comparability(report({"a": 1.0}), report({"a": 2.0})).is_comparable


def test_every_setting_that_differs_is_named() -> None:
    other = report({"a": 1.0}, "sha256:2", restoration={"seed": 1}, degradation="level_I")
    assert comparability(report({"a": 1.0}), other).reasons == (
        "restoration.seed: 42 against 1",
        "degradation: nothing against level_I",
    )


def test_a_header_that_was_changed_by_hand_is_not_believed() -> None:
    assert "changed by hand" in comparability(report({"a": 1.0}), report({"a": 1.0}, "sha256:2")).reasons[0]


def test_other_pixels_under_the_same_rules_are_not_comparable() -> None:
    (reason,) = comparability(report({"a": 1.0, "b": 1.0}), report({"a": 1.0, "b": 1.0}, lq="y")).reasons
    assert reason.startswith("the low-quality pixels of 2 pictures differ, first a")
    assert not comparability(report({"a": 1.0}), report({"b": 1.0})).is_comparable


def test_means_are_over_the_pictures_that_both_have() -> None:
    lines = side_by_side(report({"a": 1.0, "b": 3.0, "c": None}), report({"a": 2.0, "b": None, "c": 9.0}))
    assert lines[-1] == "| ours | psnr | 1.0000 | 2.0000 | +1.0000 | 1 of 3 |"
    assert side_by_side(report({"a": None}), report({"a": 1.0}))[-1].endswith("missing | missing | - | 0 of 1 |")

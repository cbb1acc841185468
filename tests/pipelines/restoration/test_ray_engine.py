"""An actor ends every picture in one of three ways, whatever the picture does to it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipelines.restoration.estimate import look_at
from pipelines.restoration.model import Model, find_model
from pipelines.restoration.orders import Order
from pipelines.restoration.outcomes import Outcome
from pipelines.restoration.progress import MAX_ATTEMPTS, Ledger, Totals, progress_line
from pipelines.restoration.ray_engine import RestoreActor
from pipelines.restoration.reading import Show, make_ingest, order_row, prompt_of
from pipelines.restoration.recipe import RestoreConfig
from pipelines.stages.sample import read_table
from sr_platform.config import validate
from sr_platform.errors import RequestError


@pytest.fixture
def cfg(tmp_path: Path, picture_file: Callable[..., bytes]) -> RestoreConfig:
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}.png").write_bytes(picture_file(16, 24, index))
    (folder / "0.txt").write_text("A wave.")
    values = {"input": str(folder), "out": str(tmp_path / "out"), "model": "nano", "scale": 2, "tile_px": 64}
    return validate(RestoreConfig, {**values, "num_inference_steps": 1}, where="test")


def order(index: int) -> Order:
    beside = [["0.txt", ["file", "0.txt"]]] if index == 0 else []
    place = json.dumps({"source": "input", "at": ["file", f"{index}.png"], "beside": beside})
    return Order(f"{index}.png", f"{index}_x2.png", place, 100, "1")


def table(cfg: RestoreConfig, *orders: Order) -> pa.Table:
    return make_ingest(cfg)(pa.Table.from_pylist([order_row(0, orders)]))


def outcomes(actor: RestoreActor, *orders: Order, cfg: RestoreConfig) -> list[Outcome]:
    return [Outcome.from_json(text) for text in actor(table(cfg, *orders))["outcome"].to_pylist()]


def test_a_block_that_is_done_again_repeats_nothing_and_names_what_kills_workers(cfg: RestoreConfig) -> None:
    ledger = Ledger()
    actor = RestoreActor(cfg, find_model("nano"), ledger)
    first = outcomes(actor, order(0), order(1), cfg=cfg)
    assert [outcome.state for outcome in first] == ["done", "done"]
    assert first[0].record is not None
    assert first[0].record.prompt == "A wave."
    changed = (Path(cfg.out) / "0_x2.png").stat().st_ino
    for _ in range(MAX_ATTEMPTS):
        ledger.begin("2_x2.png")
    again = outcomes(actor, order(0), order(1), order(2), cfg=cfg)
    assert again[:2] == first
    assert (Path(cfg.out) / "0_x2.png").stat().st_ino == changed
    assert (again[2].state, again[2].reason) == ("failed", "worker died")
    assert ledger.look() == (Totals(3, 1, pytest.approx(2 * 32 * 48 / 1e6)), [])


@pytest.mark.parametrize("deaths", [0, 1])
def test_pictures_are_begun_ahead_until_a_worker_has_died(cfg: RestoreConfig, deaths: int) -> None:
    ledger = Ledger()
    actor = RestoreActor(cfg, find_model("nano"), ledger)
    pipeline: Any = actor._pipeline
    begun: list[int] = []

    def watch(rgb: Any, **settings: Any) -> Any:
        result = pipeline(rgb, **settings)
        patience_s = time.monotonic() + 20
        while not deaths and sum(ledger._attempts.values()) < min(3, len(begun) + 2) and time.monotonic() < patience_s:
            time.sleep(0.01)  # another thread begins it
        begun.append(sum(ledger._attempts.values()) - deaths)
        return result

    actor._pipeline = watch  # type: ignore[assignment]
    for _ in range(deaths):
        ledger.begin("0_x2.png")
    found = outcomes(actor, order(0), order(1), order(2), cfg=cfg)
    assert [outcome.state for outcome in found] == ["done"] * 3
    assert begun == ([1, 2, 3] if deaths else [2, 3, 3])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (FloatingPointError("no finite result"), "not finite"),
    ],
)
def test_a_picture_that_the_model_cannot_bear_fails_alone(cfg: RestoreConfig, error: Exception, reason: str) -> None:
    actor = RestoreActor(cfg, find_model("nano"), Ledger())
    pipeline: Any = actor._pipeline

    def bear(rgb: Any, **settings: Any) -> Any:
        if settings["prompt"]:
            raise error
        return pipeline(rgb, **settings)

    actor._pipeline = bear  # type: ignore[assignment]
    found = outcomes(actor, order(0), order(1), cfg=cfg)
    assert [(outcome.state, outcome.reason) for outcome in found] == [("failed", reason), ("done", "")]
    assert not (Path(cfg.out) / "0_x2.png").exists()


def test_pictures_beyond_the_limits_are_refused_before_they_are_decoded(cfg: RestoreConfig) -> None:
    for limits, detail in (
        ({"max_output_megapixels": 0.001}, "24x16 px at scale 2 make 0.0 megapixels; at most 0.001 are allowed"),
        ({"max_side_px": 20}, "24x16 px; at most 100,000,000 pixels with sides of at most 20 are allowed"),
    ):
        small = validate(RestoreConfig, {**cfg.model_dump(), "limits": limits}, where="test")
        (found,) = outcomes(RestoreActor(small, find_model("nano"), Ledger()), order(1), cfg=small)
        assert (found.state, found.reason) == ("failed", "too large")
        assert detail in found.detail


def test_a_rate_is_measured_with_a_picture_that_can_be_read_whole(
    cfg: RestoreConfig, picture_file: Callable[..., bytes]
) -> None:
    whole = (Path(cfg.input) / "1.png").read_bytes()
    (Path(cfg.input) / "0.png").write_bytes(picture_file(200, 300)[:2000])
    look, example = look_at(cfg, [order(0), order(1)])
    assert look.sizes_px == ((300, 200), (24, 16))
    assert example == whole
    assert look_at(cfg, [order(0)])[1] == b""


def test_captioners_see_small_pictures_whose_seed_is_their_content(cfg: RestoreConfig) -> None:
    caption = cfg.caption.model_copy(update={"max_side_px": 12})
    kept, shown = read_table(Show(caption, cfg.limits)(table(cfg, order(0), order(1))))
    assert kept.hq == b"", "its caption lies beside it"
    assert (shown.width_px, shown.height_px, shown.hq_pixels().shape) == (12, 8, (8, 12, 3))
    assert shown.key == shown.source_sha256
    alone = cfg.model_copy(update={"prompt": "A photograph."})
    assert [prompt_of(alone, sample) for sample in (kept, shown)] == ["A wave.", "A photograph."]
    deaf = alone.model_copy(update={"caption": cfg.caption.model_copy(update={"reuse_existing": False})})
    assert prompt_of(deaf, kept) == "A photograph."


def test_a_model_is_known_by_its_weights_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    model = find_model("nano")
    assert model == Model("nano", model.version)
    assert model.version.startswith("nano@")
    with pytest.raises(RequestError, match="models:/name@alias"):
        find_model("models:/nothing of the kind")
    with pytest.raises(ValueError, match="neither a folder nor a preset"):
        find_model(str(tmp_path / "nowhere"))


def test_progress_tells_rates_and_the_time_left() -> None:
    line = progress_line(Totals(12, 1, 18.3), 40, 10.0)
    assert line == "restore 12/40 pictures (1.2/s), 18.3 megapixels (1.83/s), 1 failed; about 23 s left"
    assert progress_line(Totals(), 40, 0.0) == "restore 0/40 pictures (0/s), 0.0 megapixels (0.00/s), 0 failed"

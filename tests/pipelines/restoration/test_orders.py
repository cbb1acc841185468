"""What is done is skipped, what is another's is refused, and what a killed run had in hand is its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.listing import Picture
from pipelines.restoration.naming import name_problem, output_name, refuse_collisions
from pipelines.restoration.orders import Order, Plan, make_plan
from pipelines.restoration.recipe import RestoreConfig
from pipelines.restoration.records import Claim, Record, Records
from sr_platform.config import validate
from sr_platform.errors import ConfigError, InputDataError
from sr_platform.storage import Storage, open_storage

DATA = b"a restored picture"


def config(out: Storage, **changes: Any) -> RestoreConfig:
    values = {"input": "in", "out": out.uri, "model": "nano", **changes}
    return validate(RestoreConfig, values, where="test")


def picture(name: str, fingerprint: str = "1") -> Picture:
    place = json.dumps({"source": "input", "at": ["file", name], "beside": []})
    return Picture(f"input/{name}", place, 100, fingerprint)


def record(cfg: RestoreConfig, path: str, **changes: Any) -> Record:
    stem, _, suffix = path.rpartition(".")
    made = Record(
        path=path,
        output=f"{stem}_x4.{suffix}",
        fingerprint="1",
        input_sha256="0" * 64,
        input_size_px=(4, 3),
        output_sha256="1" * 64,
        output_bytes=len(DATA),
        output_size_px=(16, 12),
        prompt="",
        settings=cfg.settings_digest,
        model_version="m/1",
        manifest_digest=None,
        seconds=1.0,
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture
def out(tmp_path: Path) -> Storage:
    """Results a and b, both recorded; c is there without a record."""
    storage = open_storage(tmp_path / "out")
    for name in "abc":
        storage.write_bytes_atomic(f"{name}_x4.png", DATA)
    cfg, records = config(storage), Records(storage)
    records.remember_settings(cfg.settings_digest, cfg.settings())
    for name in "ab":
        records.write(record(cfg, f"{name}.png"))
    return storage


def plan(cfg: RestoreConfig, *names: str, version: str = "m/1", fingerprint: str = "1") -> Plan:
    pictures = [picture(f"{name}.png", fingerprint) for name in names]
    return make_plan(cfg, pictures, open_storage(cfg.out), model_version=version)


def todo(made: Plan) -> list[str]:
    return [order.path for order in made.todo]


def test_what_is_recorded_and_there_is_done(out: Storage) -> None:
    made = plan(config(out), "a", "b", "d")
    assert (set(made.done), todo(made)) == ({"a.png", "b.png"}, ["d.png"])
    out.delete("a_x4.png")
    out.write_bytes_atomic("b_x4.png", b"cut")
    assert todo(plan(config(out, overwrite=True), "a", "b")) == ["a.png", "b.png"]
    assert todo(plan(config(out), "a")) == ["a.png"]


def test_a_changed_input_is_done_again_unless_its_bytes_are_the_same(out: Storage) -> None:
    made = plan(config(out), "a", fingerprint="2")
    assert made.num_changed == 1
    assert made.todo[0].before == record(config(out), "a.png")
    assert Order.from_json(made.todo[0].to_json()) == made.todo[0]


def test_results_of_other_settings_or_models_are_named(out: Storage) -> None:
    other = config(out, seed=1, caption={"mode": "llava", "model": "x"})
    with pytest.raises(ConfigError, match=r"1 results .* made otherwise \(caption\.mode.*seed\), such as a_x4\.png"):
        plan(other, "a")
    with pytest.raises(ConfigError, match=r"otherwise \(model m/1 then, m/2 now\)"):
        plan(config(out), "a", version="m/2")
    assert plan(config(out, overwrite=True), "a", version="m/2").num_replaced == 1
    assert set(plan(config(out), "a", version="").done) == {"a.png"}, "a model that is not known equals every other"


def test_a_file_without_a_record_is_another_s_unless_a_killed_run_was_to_make_it(out: Storage) -> None:
    with pytest.raises(ConfigError, match=r"1 files .* bear names of results.*\(c_x4\.png\)"):
        plan(config(out), "a", "c")
    Records(out).claim(Claim(config(out).settings_digest, "m/1", frozenset({"c_x4.png"})))
    assert todo(plan(config(out), "a", "c")) == ["c.png"]
    with pytest.raises(ConfigError, match="bear names of results"):
        plan(config(out, seed=1), "c")


def test_a_record_is_not_believed_where_a_killed_run_was_to_overwrite_its_result(out: Storage) -> None:
    Records(out).claim(Claim(config(out, seed=1).settings_digest, "m/1", frozenset({"a_x4.png"})))
    with pytest.raises(ConfigError, match=r"\(a_x4\.png\)"):
        plan(config(out), "a", "b")
    assert todo(plan(config(out, overwrite=True), "a", "b")) == ["a.png"]
    assert todo(plan(config(out, seed=1), "a")) == ["a.png"], "the killed run's own command goes on"
    Records(out).claim(Claim(config(out).settings_digest, "", frozenset({"a_x4.png", "b_x4.png"})))
    assert set(plan(config(out), "a", "b").done) == {"a.png", "b.png"}, "of a model that was not known"


def test_records_survive_being_put_together_at_any_moment(out: Storage) -> None:
    cfg, records = config(out), Records(out)
    whole = records.load()
    records.gather([whole["a_x4.png"]])
    assert records.load() == whole
    newer = dataclasses.replace(whole["a_x4.png"], prompt="newer")
    records.write(newer)
    assert records.find("a_x4.png") == newer
    assert Records(out).load()["a_x4.png"] == newer
    Records(out).finish(records.load())
    assert Records(out).load() == {**whole, "a_x4.png": newer}
    assert records.find("a_x4.png") is None
    assert set(out.list(".restore/")) == {".restore/records.jsonl", f".restore/settings/{cfg.settings_digest}.json"}


def test_a_damaged_record_is_named(out: Storage) -> None:
    out.write_bytes_atomic(".restore/records.jsonl", b"{}\n")
    with pytest.raises(InputDataError, match=r"records\.jsonl is damaged; delete it"):
        Records(out).load()


@pytest.mark.parametrize(
    ("path", "wanted", "expected"),
    [
        ("a/b.JPG", "same", "a/b_x4.JPG"),
        ("a.b/c.d.tiff", "png", "a.b/c.d_x4.png"),
        ("x.webp", "jpeg", "x_x4.jpg"),
        ("x.bmp", "same", "x_x4.png"),
        ("pack.zip/x.jfif", "tiff", "pack.zip/x_x4.tif"),
    ],
)
def test_folders_and_names_are_kept(path: str, wanted: str, expected: str) -> None:
    template = "{stem}_x{scale}{suffix}"
    assert output_name(path, template=template, wanted=wanted, scale=4, seed=0, steps=20) == expected


def test_a_template_may_count() -> None:
    name = output_name("a.png", template="{seed:03d}-{steps}_{stem}{suffix}", wanted="same", scale=4, seed=7, steps=20)
    assert name == "007-20_a.png"


def test_results_that_would_hide_each_other_are_refused() -> None:
    with pytest.raises(InputDataError, match=r"a\.jpg and a\.png would both become a\.png"):
        refuse_collisions({"a.jpg": "a.png", "a.png": "a.png"})
    with pytest.raises(
        InputDataError, match=r"a\.png would become b\.png, which is a folder of the result of b\.png/c"
    ):
        refuse_collisions({"a.png": "b.png", "b.png/c.png": "b.png/c.png"})
    assert name_problem("a/" + "n" * 251 + ".tiff").startswith("name too long: nnn")
    assert name_problem("a/" + "n" * 250 + ".png") == ""


def test_pictures_that_cannot_be_begun_are_no_orders(out: Storage) -> None:
    cfg = config(out, limits={"max_file_mib": 0.00001})
    made = plan(cfg, "z")
    assert made.todo == ()
    assert made.unusable["z.png"].startswith("too large: 100 bytes; at most 10 are allowed")

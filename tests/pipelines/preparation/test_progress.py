"""Stages report what they did, and their warnings, from wherever they run; a line for logs names rates."""

from __future__ import annotations

import logging

import pyarrow as pa
import pytest
import ray.data

from pipelines.preparation.progress import StageCount, progress_line, watched
from pipelines.stages.sample import map_shards


def doubled(table: pa.Table) -> pa.Table:
    if table.column("id")[0].as_py() == 3:
        logging.getLogger("pipelines.stages.caption").warning("the endpoint does not answer")
    return pa.concat_tables([table, table])


class Tripled:
    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.concat_tables([table] * self.times)


@pytest.mark.ray
def test_functions_and_actors_are_counted_and_warnings_arrive(
    local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with watched({"first": 8, "second": 24}) as board:
        ds = ray.data.range(4, override_num_blocks=4)
        ds = map_shards(ds, doubled, num_cpus=0.5, name="first")
        pool = ray.data.ActorPoolStrategy(size=1)
        ds = map_shards(ds, Tripled, num_cpus=0.5, name="second", compute=pool, fn_constructor_kwargs={"times": 3})
        assert ds.count() == 24
    assert {name: count.rows for name, count in board.totals.items()} == {"first": 8, "second": 24}
    assert all(count.per_busy_second > 0 for count in board.totals.values())
    shown = capsys.readouterr().err
    assert "stages.caption: the endpoint does not answer" in shown
    assert "first 8/8" in shown


def test_a_stage_outside_a_watched_block_is_left_alone(local_ray: None) -> None:
    ds = map_shards(ray.data.range(2, override_num_blocks=1), doubled, num_cpus=0.5, name="first")
    assert ds.count() == 4


def test_the_line_names_rates_and_the_slowest_stages_estimate() -> None:
    totals = {"ingest": StageCount(40, 1.0), "crop": StageCount(80, 2.0)}
    line = progress_line(totals, {"ingest": 40, "crop": 320, "write": 320}, elapsed_s=10.0)
    assert line == "ingest 40/40 (4.0/s), crop 80/320 (8.0/s), write 0/320 (0.0/s); about 30 s left"

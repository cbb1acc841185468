import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.evaluation.score_table import read_score_table
from sr_platform.errors import InputDataError


def test_methods_pictures_and_metrics_come_in_order_with_ours_first(written_report):
    table = read_score_table(written_report)
    assert table.methods == ("ours", "SeeSR", "Real-ESRGAN")
    assert [metric.name for metric in table.metrics] == ["psnr", "ssim", "lpips", "musiq"]
    assert list(table.pictures) == sorted(table.pictures)
    assert table.has_scores == {"psnr", "ssim", "lpips"}


def test_missing_scores_keep_their_reasons(written_report):
    table = read_score_table(written_report)
    assert table.missing("Real-ESRGAN", "psnr") == {"Real-ESRGAN has no picture of this name": 1}
    assert sum(table.missing("ours", "musiq").values()) == len(table.pictures)
    assert table.scores("Real-ESRGAN", "psnr")[table.pictures[-1]] is None


def test_a_picture_without_a_row_is_missing_too(make_report):
    folder = make_report(names=("a", "b"))
    rows = [row for row in pq.read_table(folder / "scores.parquet").to_pylist() if row["picture"] != "b"]
    rows.append({**rows[0], "picture": "b", "metric": "ssim"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "scores.parquet")
    table = read_score_table(folder)
    assert table.scores("ours", "psnr")["b"] is None
    assert table.missing("ours", "psnr") == {"no reason was recorded": 1}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "report.json").unlink(), "report.json: not a report's header"),
        (lambda f: (f / "report.json").write_text("{"), "report.json: not a report's header"),
        (lambda f: (f / "report.json").write_text("[]"), "a list came, a JSON object is needed"),
        (lambda f: (f / "scores.parquet").write_bytes(b"PAR1"), "scores.parquet: not a table of scores"),
        (lambda f: pq.write_table(pa.table({"method": ["a"]}), f / "scores.parquet"), "has no column picture, metric"),
    ],
)
def test_what_is_no_report_is_refused_by_name(make_report, damage, message):
    folder = make_report(names=("a",))
    damage(folder)
    with pytest.raises(InputDataError, match=message):
        read_score_table(folder)


def test_a_metric_that_the_header_does_not_describe_is_refused(make_report):
    folder = make_report(names=("a",), metrics=[{"name": "psnr", "higher_is_better": True, "unit": "dB"}])
    with pytest.raises(InputDataError, match="does not describe lpips, musiq, ssim"):
        read_score_table(folder)


def test_two_rows_for_one_score_are_refused(make_report):
    folder = make_report(names=("a",))
    table = pq.read_table(folder / "scores.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), folder / "scores.parquet")
    with pytest.raises(InputDataError, match="psnr of a by ours has two rows"):
        read_score_table(folder)


def test_the_header_is_read_as_it_was_written(written_report):
    written = json.loads((written_report / "report.json").read_text())
    assert read_score_table(written_report).header == written

import json

import pytest

from pipelines.evaluation.paper import NOT_FOUND, compare_with_paper, paper_markdown, paper_numbers
from pipelines.evaluation.score_table import read_score_table
from pipelines.evaluation.statistics import summarize

NINE = ["Real-ESRGAN", "BSRGAN", "StableSR", "DiffBIR", "PASD", "SeeSR", "DreamClear", "SUPIR", "FaithDiff"]


def with_protocol(folder, **protocol):
    header = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**header, "protocol": protocol}))
    return compare_with_paper(read_score_table(folder))


def cell_of(comparison, row, metric):
    return next(cell for cell in comparison.cells if (cell.row, cell.metric) == (row, metric))


def test_every_number_names_a_source_a_row_and_a_column_of_its_table():
    numbers = paper_numbers()
    rows = {*numbers.methods, *numbers.references}
    assert list(numbers.methods) == NINE
    for table in numbers.tables.values():
        for block in table.blocks:
            keys = [(number.row, number.metric) for number in block.numbers]
            assert len(set(keys)) == len(keys)
            assert {row for row, _ in keys} <= rows
            assert {metric for _, metric in keys} <= set(table.metrics)
            assert {number.source for number in block.numbers} <= set(numbers.sources)
    assert all(source.is_primary or source.caveat for source in numbers.sources.values())


def test_ours_stands_beside_the_row_of_faithdiff_and_others_beside_theirs(written_report):
    table = read_score_table(written_report)
    [comparison] = compare_with_paper(table)
    assert [row for row in dict.fromkeys(cell.row for cell in comparison.cells)] == NINE
    ours = summarize(table.scores("ours", "psnr"))
    cell = cell_of(comparison, "FaithDiff", "PSNR")
    assert (cell.paper, cell.ours, cell.num_scored) == (24.29, pytest.approx(ours.mean), 12)
    assert cell.difference == pytest.approx(ours.mean - 24.29)
    assert cell_of(comparison, "Real-ESRGAN", "SSIM").num_missing == 1


def test_a_number_without_a_source_is_said_to_be_not_found(written_report):
    [comparison] = compare_with_paper(read_score_table(written_report))
    cell = cell_of(comparison, "StableSR", "PSNR")
    assert (cell.paper, cell.difference) == (None, None)
    assert comparison.num_not_found == 20
    text = paper_markdown([comparison])
    assert f"| StableSR | {NOT_FOUND}" in text
    assert "20 of the 45 numbers of this table were found in no source" in text


def test_numbers_that_were_not_read_in_the_paper_are_marked(written_report):
    text = paper_markdown(compare_with_paper(read_score_table(written_report)))
    assert "24.29\\* / " in text
    assert "not read in the paper itself" in text
    assert "not checked against the paper" in text


def test_a_metric_that_is_missing_on_all_pictures_has_no_difference(written_report):
    [comparison] = compare_with_paper(read_score_table(written_report))
    cell = cell_of(comparison, "FaithDiff", "MUSIQ")
    assert (cell.paper, cell.ours, cell.difference, cell.num_missing) == (66.53, None, None, 12)
    assert "66.53\\* / missing on 12 / -" in paper_markdown([comparison])


def test_shares_are_compared_with_percent(make_report):
    metrics = [{"name": name, "higher_is_better": True, "unit": ""} for name in ("psnr", "ssim", "lpips", "musiq")]
    folder = make_report(names=("a",), metrics=[*metrics, {"name": "ocr_recall", "higher_is_better": True, "unit": ""}])
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(folder / "scores.parquet").to_pylist()
    rows.append({**rows[0], "metric": "ocr_recall", "value": 0.5})
    rows.append({**rows[0], "method": "lq", "metric": "ocr_recall", "value": 0.1})
    pq.write_table(pa.Table.from_pylist(rows), folder / "scores.parquet")
    [comparison] = with_protocol(folder, table="3")
    assert cell_of(comparison, "FaithDiff", "Recall").difference == pytest.approx(50 - 46.74)
    assert cell_of(comparison, "LQ", "Recall").ours == pytest.approx(10)
    assert "46.74 / 50" in paper_markdown([comparison])


def test_without_level_and_data_set_every_block_of_the_table_is_compared(make_report):
    folder = make_report(names=("a",))
    assert len(with_protocol(folder, table="1")) == 6
    assert len(with_protocol(folder, table=1, level="II")) == 2
    assert len(with_protocol(folder, table="1", dataset={"name": "lsdir_val"}, level="II")) == 1


def test_a_protocol_of_no_table_is_compared_with_nothing(make_report):
    comparisons = with_protocol(make_report(names=("a",)), name="mine")
    assert paper_markdown(comparisons) == "The protocol names no table of the paper.\n"

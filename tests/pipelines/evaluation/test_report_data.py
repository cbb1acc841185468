import json

import pytest
from PIL import Image

from pipelines.evaluation.report_data import page_data
from pipelines.evaluation.score_table import read_score_table
from sr_platform.errors import InputDataError


@pytest.fixture(scope="module")
def data(written_report):
    return page_data(read_score_table(written_report), written_report)


def test_links_lead_to_pictures_whatever_their_names_hold(make_report):
    names = ("a b", "50% #1?", "straße/nächte", "<b>&'\"")
    folder = make_report(names=names)
    from urllib.parse import unquote

    for picture in page_data(read_score_table(folder), folder)["pictures"]:
        assert set(picture["files"]) >= {"lq", "ours", "hq"}
        for link in picture["files"].values():
            assert not {"#", "?", "<", '"', " "} & set(link)
            assert (folder / unquote(link)).is_file()


def test_results_that_are_not_there_are_not_linked(data):
    last = data["pictures"][-1]
    assert list(last["files"]) == ["lq", "ours", "SeeSR", "hq"]
    assert last["scores"]["Real-ESRGAN"]["psnr"] is None
    gap = next(gap for gap in data["missing"] if gap["method"] == "Real-ESRGAN")
    reason = "Real-ESRGAN has no picture of this name"
    assert gap == {"metric": "psnr", "method": "Real-ESRGAN", "reason": reason, "pictures": 1, "applies": True}


def test_the_size_shown_is_that_of_the_restored_picture(data):
    assert data["pictures"][0]["size_px"] == (240, 240)


def test_thumbnails_are_small(data):
    for picture in data["pictures"]:
        assert set(picture["thumbnails"]) == {"lq", "ours"}
        assert all(len(thumbnail) < 12_000 for thumbnail in picture["thumbnails"].values())


def test_differences_are_ours_minus_the_others(data):
    difference = data["differences"]["SeeSR"]["psnr"]
    means = data["means"]
    assert difference["mean"] == pytest.approx(means["ours"]["psnr"]["mean"] - means["SeeSR"]["psnr"]["mean"])
    assert difference["low"] < difference["mean"] < difference["high"]
    assert data["differences"]["Real-ESRGAN"]["psnr"]["num_unpaired"] == 1
    assert "ours" not in data["differences"]


def test_the_same_report_gives_the_same_data(data, written_report):
    again = page_data(read_score_table(written_report), written_report)
    assert json.dumps(again) == json.dumps(data)


def test_a_picture_that_cannot_be_read_is_refused_by_name(make_report):
    folder = make_report(names=("a",))
    (folder / "pictures" / "ours" / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputDataError, match=r"ours/a\.png: not a picture"):
        page_data(read_score_table(folder), folder)


def test_a_report_of_other_methods_alone_has_no_differences(make_report):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = make_report(names=("a",), methods=["SeeSR"])
    rows = [row for row in pq.read_table(folder / "scores.parquet").to_pylist() if row["method"] == "SeeSR"]
    pq.write_table(pa.Table.from_pylist(rows), folder / "scores.parquet")
    found = page_data(read_score_table(folder), folder)
    assert (found["methods"], found["differences"]) == (["SeeSR"], {})


def test_grey_and_transparent_pictures_have_thumbnails_too(make_report):
    folder = make_report(names=("a",))
    for method, mode in (("ours", "LA"), ("lq", "I;16")):
        Image.new(mode, (40, 30)).save(folder / "pictures" / method / "a.png")
    [picture] = page_data(read_score_table(folder), folder)["pictures"]
    assert set(picture["thumbnails"]) == {"lq", "ours"}

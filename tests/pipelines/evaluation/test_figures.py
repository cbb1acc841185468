from PIL import Image

from pipelines.evaluation.figures import distribution_figure, file_stem, write_figures
from pipelines.evaluation.score_table import read_score_table


def test_every_metric_with_a_score_gets_a_picture_and_no_other(written_report, tmp_path):
    paths = write_figures(read_score_table(written_report), tmp_path / "figures")
    assert [path.name for path in paths] == ["psnr.png", "ssim.png", "lpips.png"]
    for path in paths:
        with Image.open(path) as image:
            assert image.width == 1040
            assert image.convert("L").getextrema()[0] < 100


def test_labels_say_how_many_pictures_were_scored_and_are_missing(written_report):
    table = read_score_table(written_report)
    [axes] = distribution_figure(table, table.metrics[0]).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["ours\nn=12", "SeeSR\nn=12", "Real-ESRGAN\nn=11, 1 missing"]
    assert axes.get_xlabel() == "psnr, dB (higher is better)"


def test_a_method_that_can_have_no_score_has_no_row(report_with_reference):
    table = read_score_table(report_with_reference)
    by_name = {metric.name: metric for metric in table.metrics}
    rows = {name: distribution_figure(table, by_name[name]).axes[0].get_yticklabels() for name in ("psnr", "ssim")}
    assert [label.get_text().split("\n")[0] for label in rows["psnr"]] == ["ours", "SeeSR", "Real-ESRGAN"]
    assert [label.get_text() for label in rows["ssim"]][-1] == "hq\nn=0, 12 missing"


def test_the_same_scores_give_the_same_bytes(written_report, tmp_path):
    table = read_score_table(written_report)
    first, second = (write_figures(table, tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_file_names_are_safe():
    assert file_stem("clipiqa+_vitL14_512") == "clipiqa_plus_vitL14_512"
    assert file_stem("a/b c") == "a_b_c"

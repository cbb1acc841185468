"""The model card: every source with its terms, and no text of a source that could become anything else."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from pipelines.training.model_card import model_card
from sr_platform.shards import Manifest, ShardInfo, Source, make_manifest

TAGS = {"manifest_digest": "d1", "recipe_digest": "r2", "base_model": "nano", "git_commit": "c3-dirty"}


def source(name: str, **fields: Any) -> Source:
    return Source(
        **{"name": name, "uri": "s3://hidden/place", "licence": "CC0", "num_pictures": 7, "sha256": "", **fields}
    )


def manifest(*sources: Source) -> Manifest:
    shard = ShardInfo(name="shards/a-000000.tar", sha256="", num_samples=12, size_bytes=1)
    return make_manifest(shards=[shard], recipe={}, sources=sources, counts={}, index_sha256="")


def card(*sources: Source) -> str:
    return model_card(manifest(*sources), TAGS, name="tiny", stages={"align": 8, "unified": 2}, size_px=64)


def parts(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and body, as the hub splits them: at the first line of three dashes after the first one."""
    lines = text.splitlines()
    assert lines[0] == "---"
    end = lines.index("---", 1)
    return yaml.safe_load("\n".join(lines[1:end])), "\n".join(lines[end + 1 :])


def cells(body: str, first: str) -> list[str]:
    """The row of a table that begins with `first`."""
    (row,) = [line for line in body.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in row.strip("|").split(" | ")]


def test_licence_terms_and_homepage_of_every_source_appear() -> None:
    faces = source(
        "ffhq", licence="CC BY-NC-SA 4.0", terms="Name the authors.", homepage="https://a.org/x", group="faces"
    )
    head, body = parts(card(faces, source("own")))
    assert head["license"] == "other"
    assert head["datasets"] == ["ffhq", "own"]
    assert "faithdiff" in head["tags"]
    assert cells(body, "ffhq") == ["ffhq", "CC BY-NC-SA 4.0", "Name the authors.", "<https://a.org/x>", "faces", "7"]
    assert cells(body, "own") == ["own", "CC0", "-", "-", "-", "7"]
    assert "hidden" not in body, "where pictures lay is nobody's business"


def test_the_card_says_where_the_model_comes_from() -> None:
    given = manifest()
    _, body = parts(card())
    assert cells(body, "base model")[1] == "nano"
    assert cells(body, "training")[1] == "align (8 updates), then unified (2 updates), crops of 64 px"
    assert cells(body, "dataset digest")[1] == "d1"
    assert cells(body, "dataset recipe digest")[1] == given.recipe_digest
    assert cells(body, "training recipe digest")[1] == "r2"
    assert cells(body, "git commit")[1] == "c3-dirty"
    assert "The dataset names none." in body
    assert "## Limits" in body
    assert card() == card()


@pytest.mark.parametrize(
    "text",
    [
        "a\n---\nlicense: mit\n---",
        "---",
        "'] \"}: & * ! %",
        "- x: y # z",
        "\x85\u2028tags: none",
        "a | b\n| c |",
        "[click](javascript:x) <script> ``` ![i](j)",
    ],
)
def test_text_of_a_source_stays_text(text: str) -> None:
    fields = dict.fromkeys(("licence", "terms", "homepage", "group"), text)
    expected_head, expected_body = parts(card(source("plain", **dict.fromkeys(fields, "word"))))
    head, body = parts(card(source(text, **fields)))
    assert head == {**expected_head, "datasets": [" ".join(text.split())]}
    assert len(body.splitlines()) == len(expected_body.splitlines())
    (row,) = [line for line in body.splitlines() if line.endswith("| 7 |")]
    unescaped = row.replace("\\\\", "").replace("\\|", "")
    assert unescaped.count("|") == 7
    for opening in "[<`":
        assert all(before == "\\" for before, char in zip(" " + row, row, strict=False) if char == opening)


def test_results_of_the_run_are_told_with_what_they_mean() -> None:
    metrics = {"train/loss": 0.125, "validation/psnr": 21.5, "perf/tflops": 3.0}
    text = model_card(manifest(), TAGS, name="tiny", stages={"align": 8}, size_px=64, metrics=metrics)
    _, body = parts(text)
    assert cells(body, "PSNR of the validation pictures, dB") == ["PSNR of the validation pictures, dB", "21.5"]
    assert "| 0.125 |" in body
    assert "tflops" not in body
    assert "## Results" not in card()

"""Ingest finds pictures by listing, reads them with what lies beside them, and blames a picture for its own faults."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.stages.ingest import Ingest, find_pictures, plan_row
from pipelines.stages.sample import read_table
from sr_platform.errors import InputDataError
from sr_platform.storage import open_storage


def test_pictures_are_found_in_the_whole_tree_sorted_with_their_captions(picture_folder: Path) -> None:
    pictures = find_pictures(open_storage(picture_folder))
    assert [p.name for p in pictures] == sorted(p.name for p in pictures)
    assert len(pictures) == 9
    assert {p.name: p.sidecar for p in pictures if p.sidecar} == {"deep/0.png": "deep/0.txt"}


def test_a_missing_folder_and_one_without_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputDataError, match="holds nothing, or does not exist"):
        find_pictures(open_storage(tmp_path / "nowhere"))
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(InputDataError, match="holds 1 files, none of them a picture"):
        find_pictures(open_storage(tmp_path))


def test_each_picture_becomes_a_row_with_bytes_digest_and_caption(picture_folder: Path) -> None:
    pictures = find_pictures(open_storage(picture_folder))
    rows = read_table(Ingest(str(picture_folder))(pa.Table.from_pylist([plan_row(7, pictures)])))
    assert [row.source for row in rows] == [p.name for p in pictures]
    assert {(row.shard, row.num_pictures, row.problem) for row in rows} == {(7, 9, "")}
    data = (picture_folder / "deep" / "0.png").read_bytes()
    assert rows[0].caption == "A quiet harbour."
    assert (rows[0].data, rows[0].source_sha256) == (data, hashlib.sha256(data).hexdigest())


def test_pictures_are_read_from_s3(s3_uri: str) -> None:
    storage = open_storage(s3_uri)
    storage.write_bytes_atomic("deep/a.png", b"bytes")
    storage.write_bytes_atomic("deep/a.json", b'{"caption": "A  house."}')
    pictures = find_pictures(storage)
    (row,) = read_table(Ingest(s3_uri)(pa.Table.from_pylist([plan_row(0, pictures)])))
    assert (row.source, row.data, row.caption) == ("deep/a.png", b"bytes", "A house.")


def test_a_picture_that_vanished_is_its_own_problem(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    pictures = find_pictures(open_storage(tmp_path))
    (tmp_path / "a.png").unlink()
    (row,) = read_table(Ingest(str(tmp_path))(pa.Table.from_pylist([plan_row(0, pictures)])))
    assert row.problem.startswith("unreadable: storage: ")


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", b"[]"), ("a.json", b"{"), ("a.json", b'{"caption": 3}'), ("a.txt", b"\xff")]
)
def test_an_unreadable_caption_is_a_problem_rather_than_a_guess(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / name).write_bytes(content)
    pictures = find_pictures(open_storage(tmp_path))
    (row,) = read_table(Ingest(str(tmp_path))(pa.Table.from_pylist([plan_row(0, pictures)])))
    assert row.problem.startswith(f"unreadable caption: {name}: ")

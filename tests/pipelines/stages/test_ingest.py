"""Ingest reads pictures with what lies beside them, and blames a picture for its own faults only."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.sources import SourceConfig
from pipelines.stages.ingest import Ingest, Picture, UnreadableSidecarError, list_pictures, parse_sidecar
from pipelines.stages.sample import Sample, read_table
from sr_platform.errors import InputDataError, StorageError
from sr_platform.storage import Storage, open_storage


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def source(uri: object, name: str = "s") -> SourceConfig:
    return SourceConfig(name=name, uri=str(uri))


def ingested(
    sources: Sequence[SourceConfig], pictures: Sequence[Picture], cache: str, sha256: str = ""
) -> list[Sample]:
    plan = json.dumps([[picture.name, picture.place, sha256] for picture in pictures])
    return read_table(Ingest(sources, cache)(pa.Table.from_pylist([{"shard": 7, "pictures": plan}])))


def test_each_picture_becomes_a_row_with_bytes_digest_and_caption(picture_folder: Path, cache: str) -> None:
    sources = [source(picture_folder)]
    pictures = list_pictures(sources, open_storage(cache))
    rows = ingested(sources, pictures, cache)
    assert [row.source for row in rows] == [picture.name for picture in pictures]
    assert {(row.shard, row.num_pictures, row.problem) for row in rows} == {(7, 9, "")}
    data = (picture_folder / "deep" / "0.png").read_bytes()
    assert (rows[0].source, rows[0].caption, rows[0].data) == ("s/deep/0.png", "A quiet harbour.", data)
    assert rows[0].source_sha256 == hashlib.sha256(data).hexdigest()


def files() -> dict[str, bytes]:
    return {f"f/{i}.{kind}": f"{i}{kind}".encode() * 999 for i in range(20) for kind in ("png", "txt")}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz"])
@pytest.mark.parametrize("where", ["local", "s3"])
def test_folders_and_archives_give_the_same_rows(
    kind: str, where: str, tmp_path: Path, cache: str, request: pytest.FixtureRequest
) -> None:
    uri = str(tmp_path / "in") if where == "local" else request.getfixturevalue("s3_uri") + "/in"
    buffer = io.BytesIO()
    if kind == "folder":
        for name, data in files().items():
            open_storage(uri).write_bytes_atomic(name, data)
    elif kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files().items():
                archive.writestr(name, data)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz" if kind == "tar.gz" else "w") as tar:
            for name, data in files().items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    if buffer.getvalue():
        open_storage(uri).write_bytes_atomic(f"x.{kind}", buffer.getvalue())
    pictures = list_pictures([source(uri)], open_storage(cache))
    rows = ingested([source(uri)], pictures[::-1], cache)
    prefix = "s/" if kind == "folder" else f"s/x.{kind}/"
    assert [row.source for row in rows] == sorted((f"{prefix}f/{i}.png" for i in range(20)), reverse=True)
    for row in rows:
        name = row.source.removeprefix(prefix)
        assert row.data == files()[name]
        assert row.caption == files()[name.replace("png", "txt")].decode()


def test_one_shard_may_hold_pictures_of_several_sources(tmp_path: Path, cache: str) -> None:
    sources = [source(tmp_path / name, name) for name in ("a", "b")]
    for one in sources:
        open_storage(one.uri).write_bytes_atomic("x.png", one.name.encode())
    rows = ingested(sources, list_pictures(sources, open_storage(cache)), cache)
    assert [(row.source, row.data) for row in rows] == [("a/x.png", b"a"), ("b/x.png", b"b")]


def test_a_picture_that_vanished_is_its_own_problem(tmp_path: Path, cache: str) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    pictures = list_pictures([source(tmp_path)], open_storage(cache))
    (tmp_path / "a.png").unlink()
    (row,) = ingested([source(tmp_path)], pictures, cache)
    assert row.problem.startswith("unreadable: storage: ")


def test_a_picture_that_changed_stops_the_job(tmp_path: Path, cache: str) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    pictures = list_pictures([source(tmp_path)], open_storage(cache))
    (row,) = ingested([source(tmp_path)], pictures, cache, sha256=hashlib.sha256(b"x").hexdigest())
    assert row.problem == ""
    with pytest.raises(InputDataError, match=r"s/a.png changed while the dataset was being made; run it again"):
        ingested([source(tmp_path)], pictures, cache, sha256="0" * 64)


def test_storage_that_fails_stops_the_job(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    pictures = list_pictures([source(tmp_path)], open_storage(cache))

    def fail(self: Storage, name: str) -> bytes:
        raise StorageError("storage: gone")

    monkeypatch.setattr(Storage, "read_bytes", fail)
    with pytest.raises(StorageError, match="gone"):
        ingested([source(tmp_path)], pictures, cache)


@pytest.mark.parametrize(
    ("name", "text", "caption", "meta"),
    [
        ("a.txt", "A  quiet\nharbour. ", "A quiet harbour.", {}),
        ("a.txt", "\ufeffStra\u00dfe", "Stra\u00dfe", {}),
        ("a.txt", "", "", {}),
        (
            "a.json",
            '{"caption": " A house.", "text": "EXIT", "b": [1, {"c": null}]}',
            "A house.",
            {"text": "EXIT", "b": [1, {"c": None}]},
        ),
        ("a.json", '{"caption": null, "text": "x"}', "", {"text": "x"}),
        ("a.json", '{"text": "\\ud800"}', "", {"text": "\ud800"}),
    ],
)
def test_sidecars_give_captions_and_everything_else_they_say(
    name: str, text: str, caption: str, meta: dict[str, object]
) -> None:
    found, fields = parse_sidecar(name, text.encode())
    assert (found, json.loads(fields or "{}")) == (caption, meta)
    assert fields.isascii()


def test_a_caption_in_a_text_comes_before_one_in_json(tmp_path: Path, cache: str) -> None:
    for name, text in (("a.png", "x"), ("a.txt", "of the text"), ("a.json", '{"caption": "of json", "b": 1}')):
        (tmp_path / name).write_text(text)
    (row,) = ingested([source(tmp_path)], list_pictures([source(tmp_path)], open_storage(cache)), cache)
    assert (row.caption, row.meta) == ("of the text", '{"b": 1}')


UNREADABLE = [
    ("a.json", b"[]"),
    ("a.json", b"{}"),
    ("a.json", b"{"),
    ("a.json", b'{"caption": 3}'),
    ("a.json", b'{"caption": "x", "score": NaN}'),
    ("a.json", b'{"caption": "\\ud800"}'),
    ("a.json", b"[" * 100_000),
    ("a.json", b""),
    ("a.txt", b"\xff"),
]


@pytest.mark.parametrize(("name", "content"), UNREADABLE)
def test_an_unreadable_caption_is_a_problem_rather_than_a_guess(
    name: str, content: bytes, tmp_path: Path, cache: str
) -> None:
    with pytest.raises(UnreadableSidecarError):
        parse_sidecar(name, content)
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / name).write_bytes(content)
    (row,) = ingested([source(tmp_path)], list_pictures([source(tmp_path)], open_storage(cache)), cache)
    assert row.problem.startswith(f"unreadable caption: {name}: ")
    assert row.data == b""

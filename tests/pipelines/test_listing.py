"""Listing finds every picture of folders and archives with what lies beside it, under a name that can be printed."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import listing
from pipelines.listing import Picture, list_pictures, printable
from pipelines.sources import SourceConfig
from sr_platform.errors import InputDataError
from sr_platform.storage import open_storage

Listed = Callable[..., dict[str, Picture]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def listed(folder: Path, tmp_path: Path) -> Listed:
    """`listed(**fields)` -> the pictures of the folder as source "s", by name."""

    def listed(**fields: object) -> dict[str, Picture]:
        source = SourceConfig.model_validate({"name": "s", "uri": str(folder), **fields})
        pictures = list_pictures([source], open_storage(tmp_path / "cache"))
        assert len({picture.name for picture in pictures}) == len(pictures)
        return {picture.name: picture for picture in pictures}

    return listed


def write_tar(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"1"))


def write_zip(path: Path, names: list[str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"1")


def beside(picture: Picture) -> list[str]:
    return [name for name, _ in json.loads(picture.place)["beside"]]


def test_pictures_of_the_whole_tree_and_its_archives_come_sorted_by_name(folder: Path, listed: Listed) -> None:
    (folder / "deep").mkdir()
    for name in ("b.JPG", "deep/a.png", "notes.md"):
        (folder / name).write_bytes(b"1")
    write_zip(folder / "c.zip", ["x/2.png", "./1.png", "readme.txt"])
    names = ["s/b.JPG", "s/c.zip/1.png", "s/c.zip/x/2.png", "s/deep/a.png"]
    assert list(listed()) == names
    assert {(p.size_bytes, p.problem) for p in listed().values()} == {(1, "")}
    assert list(listed(include=["c.zip/**"], exclude=["**/x/*"])) == ["s/c.zip/1.png"]


def test_several_sources_keep_their_order_and_their_names_apart(folder: Path, tmp_path: Path) -> None:
    (folder / "a.png").write_bytes(b"1")
    sources = [SourceConfig(name=name, uri=str(folder)) for name in ("z", "a")]
    assert [p.name for p in list_pictures(sources, open_storage(tmp_path / "cache"))] == ["z/a.png", "a/a.png"]


def test_a_missing_folder_and_one_without_pictures_are_named(folder: Path, listed: Listed) -> None:
    with pytest.raises(InputDataError, match="holds nothing, or does not exist"):
        listed(uri=str(folder / "nowhere"))
    (folder / "readme.txt").write_text("x")
    with pytest.raises(InputDataError, match=r"source s: .* holds 1 files, none of them a picture"):
        listed()


@pytest.mark.parametrize(
    ("picture", "others", "expected"),
    [
        ("a.png", ["a.txt", "a.json", "b.txt"], ["a.txt", "a.json"]),
        ("a.hq.png", ["a.json"], ["a.json"]),
        ("a.hq.png", ["a.hq.txt", "a.txt"], ["a.hq.txt"]),
        ("deep/a.png", ["a.txt"], []),
        (".a.png", [".txt"], []),
    ],
)
@pytest.mark.parametrize("archive", [False, True])
def test_captions_are_found_beside_pictures(
    picture: str, others: list[str], expected: list[str], archive: bool, folder: Path, listed: Listed
) -> None:
    if archive:
        write_tar(folder / "x.tar", [*others, picture])
    else:
        for name in (picture, *others):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"1")
    (found,) = listed().values()
    assert beside(found) == expected


def test_the_lq_of_a_prepared_dataset_is_no_picture(folder: Path, listed: Listed) -> None:
    (folder / "shards").mkdir()
    write_tar(folder / "shards" / "n-0.tar", ["k.hq.png", "k.json", "k.lq.png", "k.lq1.png", "other.lq.png"])
    found = listed()
    assert list(found) == ["s/shards/n-0.tar/k.hq.png", "s/shards/n-0.tar/other.lq.png"]
    assert beside(found["s/shards/n-0.tar/k.hq.png"]) == ["k.json"]


def test_a_contact_sheet_is_a_picture_only_where_it_is_none_of_a_datasets(folder: Path, listed: Listed) -> None:
    (folder / "data").mkdir()
    for name in ("contact_sheet.png", "data/contact_sheet.png", "data/a.png"):
        (folder / name).write_bytes(b"1")
    (folder / "data" / "manifest.json").write_text("{}")
    assert list(listed()) == ["s/contact_sheet.png", "s/data/a.png"]


def test_names_that_lead_elsewhere_are_problems(folder: Path, listed: Listed) -> None:
    names = ["../a.png", "x/../../b.png", "/etc/c.png", "C:\\d.png", "..\\e.png", "f\n.png", "good.png", "../no.txt"]
    write_tar(folder / "a.tar", names)
    write_zip(folder / "b.zip", names)
    found = listed()
    assert len(found) == 14
    for name, picture in found.items():
        assert picture.problem.startswith("unsafe name: ") == ("good" not in name), name
        assert name.isprintable()


def test_object_stores_may_hold_names_that_no_folder_could(s3_uri: str, tmp_path: Path) -> None:
    import boto3

    bucket = s3_uri.removeprefix("s3://")
    for key in ("in/a/../../b.png", "in//c.png", "in/d.png"):
        boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=b"1")
    source = SourceConfig(name="s", uri=f"{s3_uri}/in")
    pictures = list_pictures([source], open_storage(tmp_path))
    assert [picture.name for picture in pictures if not picture.problem] == ["s/d.png"]
    assert len(pictures) == 3


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_come_twice_are_used_once(folder: Path, listed: Listed) -> None:
    write_tar(folder / "a.tar", ["a.png", "./a.png", "b.png", "a.png", "a.png#2"])
    write_zip(folder / "b.zip", ["a.png", "a.png"])
    problems = {name: picture.problem for name, picture in listed().items()}
    assert problems == {
        "s/a.tar/a.png": "",
        "s/a.tar/a.png#2": "duplicate name: the first a.tar/a.png is used",
        "s/a.tar/a.png#3": "duplicate name: the first a.tar/a.png is used",
        "s/a.tar/b.png": "",
        "s/b.zip/a.png": "",
        "s/b.zip/a.png#2": "duplicate name: the first b.zip/a.png is used",
    }


def test_names_that_are_not_utf8_can_be_printed_and_stay_apart(folder: Path, listed: Listed) -> None:
    for name in (b"\xff.png", b"\\xff.png", b"\xfe.png", "\u2028.png".encode()):
        (folder / os.fsdecode(name)).write_bytes(b"1")
    found = listed()
    assert list(found) == ["s/\\\\xff.png", "s/\\u2028.png", "s/\\xfe.png", "s/\\xff.png"]
    assert all(picture.place.isascii() for picture in found.values())


def test_printable_names_stay_apart() -> None:
    names = [
        "a",
        "\\",
        "\\\\",
        "\udcff",
        "\\xff",
        "\xa0",
        "\udca0",
        "\\xa0",
        "\n",
        "\\n",
        "\ud800",
        "e\u0301",
        "\u00e9",
    ]
    assert len({printable(name) for name in names}) == len(names)
    assert all(printable(name).isprintable() for name in names)
    assert printable("straße/日本.png") == "straße/日本.png"


def test_what_is_too_large_or_no_file_is_a_problem(
    folder: Path, listed: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MAX_PICTURE_BYTES", 100)
    monkeypatch.setattr(listing, "MAX_SIDECAR_BYTES", 10)
    (folder / "large.png").write_bytes(bytes(101))
    (folder / "a.png").write_bytes(b"1")
    (folder / "a.txt").write_bytes(bytes(11))
    with tarfile.open(folder / "b.tar", "w") as tar:
        info = tarfile.TarInfo("link.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    assert {name: picture.problem for name, picture in listed().items()} == {
        "s/a.png": "unreadable caption: a.txt has 11 bytes, more than 10",
        "s/b.tar/link.png": "not a file: a link, device or sparse file",
        "s/large.png": "too many bytes: 101, more than 100",
    }


def test_an_archive_that_cannot_be_read_is_listed_as_a_problem(folder: Path, listed: Listed) -> None:
    (folder / "a.zip").write_bytes(b"damaged")
    (folder / "b.7z").write_bytes(b"7z")
    (folder / "c.png").write_bytes(b"1")
    found = listed()
    assert list(found) == ["s/a.zip", "s/b.7z", "s/c.png"]
    assert [picture.problem.partition(":")[0] for picture in found.values()] == ["unreadable archive"] * 2 + [""]
    assert list(listed(exclude=["a.zip/**", "*.7z/**"])) == ["s/c.png"]


def test_a_fingerprint_changes_with_the_picture_its_caption_or_its_archive(folder: Path, listed: Listed) -> None:
    (folder / "a.png").write_bytes(b"1")
    (folder / "a.txt").write_bytes(b"1")
    write_tar(folder / "b.tar", ["b.png", "b.txt"])
    before = listed()
    assert listed() == before
    for changed, name in (("a.png", "s/a.png"), ("a.txt", "s/a.png"), ("b.tar", "s/b.tar/b.png")):
        os.utime(folder / changed, ns=(5, 5))
        after = listed()
        assert [n for n in after if after[n].fingerprint != before[n].fingerprint] == [name]
        before = after

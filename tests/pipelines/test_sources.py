"""Sources are filled from the catalogue, and of each published layout exactly the training pictures are taken."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from pipelines.listing import list_pictures
from pipelines.sources import QualityConfig, SourceConfig, read_catalogue, resolve_sources, source_of
from sr_platform.errors import ConfigError
from sr_platform.storage import open_storage

DIV2K = ["DIV2K_train_HR/0001.png", "DIV2K_train_HR/0800.png"]
FLICKR2K = ["Flickr2K/Flickr2K_HR/000001.png", "Flickr2K/Flickr2K_HR/002650.png"]
LSDIR = ["0001000/0000001.png", "0085000/0084991.png"]
DIV8K = ["train_HR/0001.png", "train_HR/1500.png"]
FFHQ = ["images1024x1024/00000/00000.png", "images1024x1024/69000/69999.png"]
FFHQ_OTHERS = ["thumbnails128x128/00000/00000.png", "in-the-wild-images/00000/00000.png", "ffhq-dataset-v2.json"]


def prefixed(folder: str, names: Iterable[str]) -> list[str]:
    return [f"{folder}/{name}" for name in names]


LAYOUTS: dict[str, tuple[str, list[str], list[str]]] = {
    # Case -> (source, wanted, others); a first folder with an archive's name is packed as one.
    "div2k, unpacked": (
        "div2k",
        DIV2K,
        ["DIV2K_valid_HR/0801.png", "DIV2K_train_LR_bicubic/X4/0001x4.png", "DIV2K_train_HR_sub/0001_s001.png"],
    ),
    "div2k, as distributed": (
        "div2k",
        prefixed("DIV2K_train_HR.zip", DIV2K),
        ["DIV2K_valid_HR.zip/DIV2K_valid_HR/0801.png", "DIV2K_train_LR_x8.zip/DIV2K_train_LR_x8/0001x8.png"],
    ),
    "flickr2k, unpacked": (
        "flickr2k",
        FLICKR2K,
        ["Flickr2K/Flickr2K_LR_bicubic/X2/000001x2.png", "Flickr2K/Flickr2K_LR_unknown/X4/000001x4.png"],
    ),
    "flickr2k, as distributed": (
        "flickr2k",
        prefixed("Flickr2K.tar", FLICKR2K),
        ["Flickr2K.tar/Flickr2K/Flickr2K_LR_bicubic/X2/000001x2.png"],
    ),
    "lsdir, unpacked": (
        "lsdir",
        prefixed("HR/train", LSDIR),
        [
            "X4/train/0001000/0000001x4.png",
            "HR/val/0000001.png",
            "val1/HR/val/0000001.png",
            "val1/X2/val/0000001x2.png",
        ],
    ),
    "lsdir, as distributed": (
        "lsdir",
        ["shard-00.tar.gz/0001000/0000001.png", "shard-16.tar.gz/0085000/0084991.png"],
        ["val1.tar.gz/HR/val/0000001.png", "val1.tar.gz/X4/val/0000001x4.png", "train_X4.tar.gz/0001000/0000001.png"],
    ),
    "div8k, unpacked": ("div8k", DIV8K, ["val_LR_x16/0001.png", "val_HR/1401.png", "train_LR_x16/0001.png"]),
    "div8k, as distributed": ("div8k", prefixed("DIV8K.zip", DIV8K), ["DIV8K.zip/test_LR/0001.png"]),
    "ffhq, unpacked": ("ffhq", FFHQ, [*FFHQ_OTHERS, "images1024x1024/LICENSE.txt"]),
    "ffhq, as distributed": (
        "ffhq",
        prefixed("images1024x1024.zip", ["00000/00000.png", "69000/69999.png"]),
        ["thumbnails128x128.zip/00000/00000.png", "in-the-wild-images.zip/00000/00000.png"],
    ),
}


def pack(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, name)
        return
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))


def lay_out(folder: Path, names: list[str]) -> None:
    """Files with their own names as content, in folders and archives."""
    packed: dict[str, list[str]] = {}
    for name in names:
        first, _, rest = name.partition("/")
        if first.endswith((".zip", ".tar", ".tar.gz")):
            packed.setdefault(first, []).append(rest)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    for archive, members in packed.items():
        pack(folder / archive, members)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_each_published_layout_exactly_the_training_pictures_are_taken(layout: str, tmp_path: Path) -> None:
    name, wanted, others = LAYOUTS[layout]
    lay_out(tmp_path / "in", [*wanted, *others])
    (source,) = resolve_sources([SourceConfig(name=name, uri=str(tmp_path / "in"))])
    pictures = list_pictures([source], open_storage(tmp_path / "cache"))
    assert [picture.name for picture in pictures] == sorted(prefixed(name, wanted))
    assert {picture.problem for picture in pictures} == {""}


@pytest.mark.parametrize(
    ("name", "inside", "wanted"),
    [
        ("div2k", "DIV2K_train_HR", ["0001.png"]),
        ("div2k", "DIV2K_train_HR.zip", ["DIV2K_train_HR.zip/DIV2K_train_HR/0001.png"]),
        ("ffhq", "images1024x1024", ["00000/00000.png"]),
    ],
)
def test_a_uri_may_name_the_folder_or_the_archive_itself(
    name: str, inside: str, wanted: list[str], tmp_path: Path
) -> None:
    lay_out(tmp_path, [wanted[0] if inside.endswith(".zip") else f"{inside}/{wanted[0]}", "beside.png"])
    (source,) = resolve_sources([SourceConfig(name=name, uri=str(tmp_path / inside))])
    assert [picture.name for picture in list_pictures([source], open_storage(tmp_path / "cache"))] == prefixed(
        name, wanted
    )


def test_archives_that_are_ruled_out_are_not_looked_into(tmp_path: Path) -> None:
    lay_out(tmp_path / "in", ["shard-00.tar.gz/0001000/0000001.png"])
    (tmp_path / "in" / "val1.tar.gz").write_bytes(b"damaged")
    (source,) = resolve_sources([SourceConfig(name="lsdir", uri=str(tmp_path / "in"))])
    assert len(list_pictures([source], open_storage(tmp_path / "cache"))) == 1


def test_the_catalogue_says_licence_and_terms_of_every_source() -> None:
    catalogue = read_catalogue()
    assert set(catalogue) >= {"lsdir", "div2k", "flickr2k", "div8k", "ffhq"}
    for name in catalogue:
        (source,) = resolve_sources([SourceConfig(name=name, uri="in")])
        assert source.licence != "unknown"
        assert source.terms.endswith(".")
        assert source.homepage.startswith("https://")


def test_faces_are_few_whole_and_resized_as_the_specification_says() -> None:
    (faces,) = resolve_sources([SourceConfig(name="ffhq", uri="in")])
    assert (faces.group, faces.max_pictures, faces.cut, faces.resize_px) == ("faces", 10_000, "whole", (512, 768))


def test_what_a_recipe_says_comes_before_the_catalogue() -> None:
    (source,) = resolve_sources([SourceConfig(name="ffhq", uri="in", licence="own", max_pictures=7)])
    assert (source.licence, source.max_pictures, source.group) == ("own", 7, "faces")


def test_a_source_of_ones_own_needs_no_entry(tmp_path: Path) -> None:
    (source,) = resolve_sources([SourceConfig(name="holidays", uri="in")])
    assert (source.licence, source.group, source.cut) == ("unknown", "nature", "tiles")
    catalogue = tmp_path / "sources.yaml"
    catalogue.write_text("holidays: {licence: own, group: people}")
    (source,) = resolve_sources([SourceConfig(name="holidays", uri="in")], catalogue)
    assert (source.licence, source.group) == ("own", "people")


def test_a_name_that_is_nearly_known_is_asked_about() -> None:
    with pytest.raises(ConfigError, match="'lsdri' is not in the catalogue; did you mean 'lsdir'"):
        resolve_sources([SourceConfig(name="lsdri", uri="in")])
    assert resolve_sources([SourceConfig(name="lsdri", uri="in", licence="own")])[0].licence == "own"


def test_sources_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="'a' is given twice"):
        resolve_sources([SourceConfig(name="a", uri="x"), SourceConfig(name="a", uri="y")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a mapping"),
        ("a: [", "cannot be read"),
        ("a: {license: x}", "a: license: no such setting; did you mean 'licence'"),
    ],
)
def test_a_damaged_catalogue_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sources.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_catalogue(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_catalogue(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "a/b"}, "name"),
        ({"include": ["a**/b"]}, r"\*\* stands for whole folders"),
        ({"resize_px": [768, 512]}, "from 768 down to 512"),
        ({"max_pictures": 0}, "max_pictures"),
        ({"quality": {"metric": "niqe"}}, "has no limit"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig.model_validate({"name": "a", "uri": "x", **fields})


def test_patterns_match_whole_paths_in_any_case() -> None:
    source = SourceConfig(name="a", uri="x", include=("**/HR/*.png",), exclude=("**/old/**",))
    assert source.takes("HR/1.PNG")
    assert source.takes("a/hr/1.png")
    assert not source.takes("HR/deep/1.png")
    assert not source.takes("old/HR/1.png")
    assert not SourceConfig(name="a", uri="x").takes("a.zip/__MACOSX/HR/._1.png")


def test_limits_of_quality_are_said_in_words() -> None:
    quality = QualityConfig(metric="niqe", minimum=0.5, maximum=2)
    assert (quality.wanted, quality.accepts(2.0), quality.accepts(0.4)) == ("at least 0.5 and at most 2", True, False)
    assert source_of("lsdir/0001000/0000001.png") == "lsdir"

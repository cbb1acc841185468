"""A contact sheet shows hq, lq and caption of some samples, the same ones every time, of any dataset."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.contact_sheet import CONTACT_SHEET_NAME, SheetRow, contact_sheet, write_contact_sheet
from sr_platform.publication import commit_dataset, publish_shard
from sr_platform.storage import open_storage

RED, BLUE, GREEN = (200, 20, 20), (20, 20, 200), (20, 160, 20)


def plain(width: int, height: int, colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def area_of(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(axis=-1).sum())


def test_every_lq_is_as_large_as_its_hq() -> None:
    row = SheetRow("a", "A plain picture.", plain(512, 256, RED), (plain(128, 64, BLUE), plain(128, 64, GREEN)))
    sheet = contact_sheet([row], "one sample")
    assert area_of(sheet, RED) == area_of(sheet, BLUE) == area_of(sheet, GREEN) == 288 * 144


def test_small_pictures_grow_by_whole_factors_and_large_ones_shrink() -> None:
    assert area_of(contact_sheet([SheetRow("a", "", plain(128, 64, RED))]), RED) == 256 * 128
    assert area_of(contact_sheet([SheetRow("a", "", plain(2048, 1024, RED))]), RED) == 288 * 144
    assert area_of(contact_sheet([SheetRow("a", "", plain(3000, 4, RED))]), RED) == 288


def test_pixels_of_an_enlarged_lq_stay_visible() -> None:
    lq = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    sheet = np.asarray(contact_sheet([SheetRow("a", "", plain(32, 32, RED), (lq,))]))
    colours = {tuple(c) for c in np.asarray(lq).reshape(-1, 3).tolist()}
    assert colours <= {tuple(c) for c in sheet.reshape(-1, 3).tolist()}


def test_mixed_sizes_variants_and_scripts_fit_on_one_sheet() -> None:
    captions = ["", "word " * 200, "x" * 900, "\u0420\u0443\u0441 \u4e2d\u6587 \u0627\u0644\u0639", "two\nlines\x00"]
    rows = [
        SheetRow(f"key-{i}", captions[i % 5], plain(100 + 90 * i, 700 - 50 * i, RED), (plain(40, 30, BLUE),) * (i % 4))
        for i in range(11)
    ]
    sheet = contact_sheet(rows, "title " * 100)
    assert sheet.mode == "RGB"
    assert 900 < sheet.width <= 1900
    assert contact_sheet(rows, "title " * 100).tobytes() == sheet.tobytes()


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """Twenty samples in two shards, with two variants of lq; some also hold latents."""
    storage, reports = open_storage(tmp_path / "data"), []
    for shard in range(2):
        samples = []
        for number in range(10):
            shade = (10 * number, 100 * shard, 50)
            members = {
                "hq.png": png(plain(64, 64, shade)),
                "lq.png": png(plain(16, 16, BLUE)),
                "lq1.png": png(plain(16, 16, GREEN)),
                "json": json.dumps({"caption": f"Number {number}."}).encode(),
            }
            samples.append((f"s{shard}-{number}", members | ({"latents.safetensors": b"."} if number % 2 else {})))
        reports.append(publish_shard(storage, name="test", index=shard, samples=samples))
    commit_dataset(storage, reports, recipe={}, sources=[], counts={"pictures": 20})
    return storage.uri


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_the_same_dataset_gives_the_same_sheet_beside_its_manifest(dataset: str) -> None:
    path = write_contact_sheet(dataset)
    assert path == f"{dataset}/{CONTACT_SHEET_NAME}"
    first = Path(path).read_bytes()
    write_contact_sheet(dataset)
    assert Path(path).read_bytes() == first
    with Image.open(path) as sheet:
        assert area_of(sheet, BLUE) == area_of(sheet, GREEN) == 12 * 256 * 256
    assert Path(write_contact_sheet(dataset, num_samples=3)).read_bytes() != first


def test_a_sheet_of_fewer_samples_than_asked_for_shows_them_all(dataset: str) -> None:
    with Image.open(write_contact_sheet(dataset, num_samples=100)) as sheet:
        assert area_of(sheet, BLUE) == 20 * 256 * 256


def test_a_sheet_appears_on_s3(dataset: str, s3_uri: str) -> None:
    source, target = open_storage(dataset), open_storage(s3_uri)
    for name in source.list():
        target.write_bytes_atomic(name, source.read_bytes(name))
    assert write_contact_sheet(s3_uri) == f"{s3_uri}/{CONTACT_SHEET_NAME}"
    write_contact_sheet(dataset)
    assert target.read_bytes(CONTACT_SHEET_NAME) == source.read_bytes(CONTACT_SHEET_NAME)

"""A thousand malformed or odd inputs: each is read with the right pixels or is a problem with a reason; none is lost.

They lie in a folder and in zip, tar and tar.gz archives, and go the way of `prepare.py`: listing, ingest, filter.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.listing import list_pictures, printable
from pipelines.preparation.recipe import PrepareConfig
from pipelines.prepare import prepare
from pipelines.sources import SourceConfig
from pipelines.stages.decode import decode_picture
from pipelines.stages.filter import Filter
from pipelines.stages.ingest import Ingest
from pipelines.stages.sample import Sample, read_table
from sr_platform.storage import open_storage

NUM_INPUTS = 1000
MAX_PIXELS = 1_000_000
CONTAINERS = ("folder", "a.zip", "b.tar", "c.tar.gz")
REASONS = {
    "unreadable",
    "unreadable caption",
    "unreadable archive",
    "unsafe name",
    "duplicate name",
    "not a file",
}

Pixels = NDArray[np.uint8]


class Outcome(NamedTuple):
    """What has to become of an input."""

    pixels: Pixels | None = None
    """None: it has to be a problem."""
    tolerance: int = 0
    reason: str = ""
    """Of the problem; with pixels as well: either is right."""


class Input(NamedTuple):
    suffix: str
    data: bytes
    outcome: Outcome


def picture(rng: np.random.Generator, channels: int = 3) -> Pixels:
    height, width = rng.integers(32, 64, 2)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 120 * np.sin(x / rng.uniform(3, 9) + y / rng.uniform(3, 9)) for _ in range(channels)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def saved(image: Image.Image | Pixels, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def on_white(rgba: Pixels) -> Pixels:
    alpha = rgba[..., 3:].astype(float) / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def gray(levels: Pixels) -> Pixels:
    return np.repeat(levels.reshape(*levels.shape[:2], 1), 3, axis=2)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# -- inputs that have to be read ---------------------------------------------------------------------------------------


def wrong_suffix(rng: np.random.Generator) -> Input:
    pixels = picture(rng)
    kind, suffix = [("PNG", "jpg"), ("BMP", "png"), ("TIFF", "webp"), ("PPM", "PNG"), ("WEBP", "tif")][rng.integers(5)]
    return Input(suffix, saved(pixels, kind, **({"lossless": True} if kind == "WEBP" else {})), Outcome(pixels))


def cmyk(rng: np.random.Generator) -> Input:
    image = Image.fromarray(picture(rng)).convert("CMYK")
    kind, options = [("TIFF", {}), ("JPEG", {"quality": 100, "subsampling": 0})][rng.integers(2)]
    return Input("jpg", saved(image, kind, **options), Outcome(np.asarray(image.convert("RGB")), tolerance=8))


def sixteen_bit_gray(rng: np.random.Generator) -> Input:
    levels = picture(rng, 1)[..., 0]
    kind = ["PNG", "TIFF"][rng.integers(2)]
    return Input("png", saved(Image.fromarray(levels.astype(np.uint16) * 257), kind), Outcome(gray(levels)))


def sixteen_bit_colour(rng: np.random.Generator) -> Input:
    import cv2

    pixels = picture(rng)
    return Input("png", cv2.imencode(".png", pixels[..., ::-1].astype(np.uint16) * 257)[1].tobytes(), Outcome(pixels))


def palette(rng: np.random.Generator) -> Input:
    image = Image.fromarray(picture(rng)).quantize(32)
    kind = ["PNG", "GIF", "BMP"][rng.integers(3)]
    return Input(kind.lower(), saved(image, kind), Outcome(np.asarray(image.convert("RGB"))))


def transparent_palette(rng: np.random.Generator) -> Input:
    image = Image.fromarray(picture(rng)).quantize(32)
    pixels = np.asarray(image.convert("RGB")).copy()
    pixels[np.asarray(image) == 3] = 255
    return Input("png", saved(image, "PNG", transparency=3), Outcome(pixels))


def alpha(rng: np.random.Generator) -> Input:
    rgba = picture(rng, 4)
    kind, options = [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})][rng.integers(3)]
    return Input("png", saved(rgba, kind, **options), Outcome(on_white(rgba), tolerance=1))


def gray_alpha(rng: np.random.Generator) -> Input:
    la = picture(rng, 2)
    pixels = on_white(np.concatenate([gray(la[..., 0]), la[..., 1:]], axis=-1))
    return Input("png", saved(Image.fromarray(la, "LA"), "PNG"), Outcome(pixels, tolerance=1))


def plain_gray(rng: np.random.Generator) -> Input:
    levels = picture(rng, 1)[..., 0]
    return Input("png", saved(levels, ["PNG", "TIFF", "PPM"][rng.integers(3)]), Outcome(gray(levels)))


def one_bit(rng: np.random.Generator) -> Input:
    bits = picture(rng, 1)[..., 0] > 127
    return Input(
        "tiff", saved(Image.fromarray(bits), ["PNG", "TIFF"][rng.integers(2)]), Outcome(gray(bits * np.uint8(255)))
    )


def rotated(rng: np.random.Generator) -> Input:
    pixels, orientation = picture(rng), int(rng.integers(1, 9))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = pixels[:, ::-1] if orientation in (2, 4, 5, 7) else pixels
    turned = np.rot90(turned, {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation])
    return Input("png", saved(pixels, ["PNG", "TIFF"][rng.integers(2)], exif=exif), Outcome(turned))


def animated(rng: np.random.Generator) -> Input:
    first = Image.fromarray(picture(rng)).quantize(64).convert("RGB")
    kind, options = [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})][rng.integers(4)]
    second = Image.new("RGB", first.size, "blue")
    return Input(
        "gif", saved(first, kind, save_all=True, append_images=[second], **options), Outcome(np.asarray(first))
    )


def odd_profile(rng: np.random.Generator) -> Input:
    pixels = picture(rng)
    return Input("png", saved(pixels, "PNG", icc_profile=rng.bytes(200)), Outcome(pixels))


def trailing_bytes(rng: np.random.Generator) -> Input:
    pixels = picture(rng)
    return Input("png", saved(pixels, ["PNG", "BMP", "TIFF"][rng.integers(3)]) + rng.bytes(100), Outcome(pixels))


# -- inputs that have to be problems, or may be ------------------------------------------------------------------------


def truncated(rng: np.random.Generator) -> Input:
    kind = ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"][rng.integers(6)]
    data = saved(picture(rng), kind)
    return Input("png", data[: int(rng.integers(1, len(data) * 3 // 4))], Outcome(reason="unreadable"))


def empty(rng: np.random.Generator) -> Input:
    return Input("png", b"", Outcome(reason="unreadable"))


def no_picture(rng: np.random.Generator) -> Input:
    page, postscript = b"<html>404 Not Found</html>", saved(picture(rng), "EPS")
    return Input("jpg", [page, rng.bytes(500), bytes(500), postscript][rng.integers(4)], Outcome(reason="unreadable"))


def bomb(rng: np.random.Generator) -> Input:
    side = int(rng.integers(20_000, 65_000))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100_000)))
        + chunk(b"IEND", b"")
    )
    bmp = bytearray(saved(picture(rng), "BMP"))
    struct.pack_into("<ii", bmp, 18, side, side)
    return Input("png", [png, bytes(bmp)][rng.integers(2)], Outcome(reason="unreadable"))


def inflated_text(rng: np.random.Generator) -> Input:
    pixels = picture(rng)
    data = saved(pixels, "PNG")
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000)))
    return Input("png", data[:33] + text + data[33:], Outcome(pixels, reason="unreadable"))


def floating(rng: np.random.Generator) -> Input:
    return Input("tif", saved(picture(rng, 1)[..., 0].astype(np.float32), "TIFF"), Outcome(reason="unreadable"))


def flipped_bytes(rng: np.random.Generator) -> Input:
    pixels = picture(rng)
    data = bytearray(saved(pixels, "PNG"))
    for place in rng.integers(8, len(data), 3):
        data[place] ^= int(rng.integers(1, 256))
    return Input("png", bytes(data), Outcome(pixels, reason="unreadable"))


KINDS: list[Callable[[np.random.Generator], Input]] = [
    *(wrong_suffix, cmyk, sixteen_bit_gray, sixteen_bit_colour, palette, transparent_palette, alpha, gray_alpha),
    *(plain_gray, one_bit, rotated, animated, odd_profile, trailing_bytes),
    *(truncated, empty, no_picture, bomb, inflated_text, floating, flipped_bytes),
]
NAMES = [
    "{i}.{s}",
    "deep/er/{i}.{S}",
    "\u65e5\u672c-\u00e9-{i}.{s}",
    "caf\udce9-{i}.{s}",
    "a b;'{i}.x.{s}",
    "b\\x{i}.{s}",
]
CAPTIONS = [b"\xff\xfe", b"[]", b"{", b'{"caption": 1}', b'{"caption": "\\ud800"}', b"[" * 5000]
UNSAFE = [
    "../{i}.png",
    "a/../../{i}.png",
    "/etc/{i}.png",
    "C:\\{i}.png",
    "..\\{i}.png",
    "a\n{i}.png",
    "a\x1b[2J{i}.png",
]


# -- where they lie ----------------------------------------------------------------------------------------------------


class Corpus:
    """Fills containers, and knows what has to become of every name."""

    def __init__(self) -> None:
        self.files: dict[str, list[tuple[str, bytes]]] = {container: [] for container in CONTAINERS}
        self.outcomes: dict[str, Outcome] = {}

    def add(self, container: str, name: str, data: bytes, outcome: Outcome | None) -> None:
        self.files[container].append((name, data))
        if outcome is not None:
            prefix = "" if container == "folder" else f"{container}/"
            full = f"s/{prefix}{printable(name)}"
            while full in self.outcomes:  # of equal names the later ones are numbered
                stem, _, number = full.partition("#")
                full = f"{stem}#{int(number or 1) + 1}"
            self.outcomes[full] = outcome

    def write(self, folder: Path) -> None:
        for name, data in self.files["folder"]:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (folder / "a.zip").write_bytes(as_zip(self.files["a.zip"]))
        (folder / "b.tar").write_bytes(as_tar(self.files["b.tar"]))
        (folder / "c.tar.gz").write_bytes(gzip.compress(as_tar(self.files["c.tar.gz"]), 1, mtime=0))


def as_zip(files: list[tuple[str, bytes]]) -> bytes:
    """Names that are not UTF-8 are written as their bytes, undeclared."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")
        for name, data in files:
            archive.writestr(zipfile.ZipInfo(name.replace("\udce9", "\u0001")), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue().replace(b"caf\x01", b"caf\xe9")


def as_tar(files: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name.startswith("link"):
                info.size, info.type, info.linkname = 0, tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def add_hostile_members(corpus: Corpus, rng: np.random.Generator) -> None:
    """What only archives can hold: unsafe names, names that come twice, links; and captions that say nothing."""
    for index, container in enumerate(itertools.islice(itertools.cycle(CONTAINERS[1:]), 105)):
        data = saved(picture(rng), "PNG")
        corpus.add(container, UNSAFE[index % len(UNSAFE)].format(i=index), data, Outcome(reason="unsafe name"))
        if index % 5 == 0:
            pixels = picture(rng)
            corpus.add(container, f"twice/{index}.png", saved(pixels, "PNG"), Outcome(pixels))
            for _ in range(2):
                corpus.add(container, f"twice/{index}.png", data, Outcome(reason="duplicate name"))
        if index % 7 == 0 and "tar" in container:
            corpus.add(container, f"link-{index}.png", b"", Outcome(reason="not a file"))
    for index, container in enumerate(itertools.islice(itertools.cycle(CONTAINERS), 48)):
        suffix = "txt" if index % len(CAPTIONS) == 0 else "json"
        corpus.add(container, f"told/{index}.{suffix}", CAPTIONS[index % len(CAPTIONS)], None)
        corpus.add(container, f"told/{index}.png", saved(picture(rng), "PNG"), Outcome(reason="unreadable caption"))


def add_broken_archives(corpus: Corpus, rng: np.random.Generator) -> None:
    """Each an input of its own: no archive at all, or one without its end."""
    files = [("inside.txt", rng.bytes(3000))]
    for index in range(6):
        for name, whole in (
            ("zip", as_zip(files)),
            ("tar", as_tar(files)[:3584]),
            ("tgz", gzip.compress(as_tar(files), mtime=0)),
        ):
            data = [b"", rng.bytes(700), whole[: int(rng.integers(20, len(whole) - 20))]][index % 3]
            corpus.add("folder", f"broken-{index}.{name}", data, Outcome(reason="unreadable archive"))
    corpus.add("folder", "other.7z", b"7z\xbc\xaf", Outcome(reason="unreadable archive"))


def make_corpus() -> Corpus:
    corpus, rng = Corpus(), np.random.default_rng(0)
    add_hostile_members(corpus, rng)
    add_broken_archives(corpus, rng)
    kinds, names = itertools.cycle(KINDS), itertools.cycle(NAMES)
    for index in range(NUM_INPUTS - len(corpus.outcomes)):
        suffix, data, outcome = next(kinds)(rng)
        name = next(names).format(i=index, s=suffix, S=suffix.upper())
        corpus.add(CONTAINERS[index % len(CONTAINERS)], name, data, outcome)
    return corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    """The folder, and what has to become of every picture in it."""
    folder, made = tmp_path_factory.mktemp("malformed"), make_corpus()
    made.write(folder)
    return folder, made.outcomes


# -- what becomes of them ----------------------------------------------------------------------------------------------


def shards_of(source: SourceConfig, cache: str) -> Iterator[tuple[list[str], list[Sample]]]:
    """Problems of the listing, then the samples of every shard of 50 pictures."""
    pictures = list_pictures([source], open_storage(cache))
    yield [f"{p.name}\t{p.problem}" for p in pictures if p.problem], []
    good = [[p.name, p.place, ""] for p in pictures if not p.problem]
    ingest = Ingest([source], cache)
    for index, start in enumerate(range(0, len(good), 50)):
        plan = {"shard": index, "pictures": json.dumps(good[start : start + 50])}
        yield [], read_table(ingest(pa.Table.from_pylist([plan])))


def verdict(outcome: Outcome, sample: Sample) -> str:
    """What is wrong with how the sample was read; empty when nothing is."""
    facts = Filter(MAX_PIXELS, {}).measure(sample)
    if facts.problem:
        reason, _, detail = facts.problem.partition(": ")
        return "" if outcome.reason == reason and detail else f"unexpected problem {facts.problem}"
    if outcome.pixels is None:
        return f"read, and should be a problem: {outcome.reason}"
    pixels = decode_picture(sample.data, max_pixels=MAX_PIXELS)
    if pixels.shape != outcome.pixels.shape or (facts.height_px, facts.width_px) != pixels.shape[:2]:
        return f"{pixels.shape} instead of {outcome.pixels.shape}"
    error = int(np.abs(pixels.astype(int) - outcome.pixels).max())
    return "" if error <= outcome.tolerance else f"pixels are off by {error}"


def test_a_thousand_inputs_are_all_read_rightly_or_named_with_a_reason(
    corpus: tuple[Path, dict[str, Outcome]], tmp_path: Path
) -> None:
    folder, outcomes = corpus
    assert len(outcomes) == NUM_INPUTS
    seen: Counter[str] = Counter()
    wrong = {}
    for problems, samples in shards_of(SourceConfig(name="s", uri=str(folder)), str(tmp_path / "cache")):
        for line in problems:
            name, _, problem = line.partition("\t")
            seen[name] += 1
            expected = outcomes[name].reason if name in outcomes else "nothing of that name"
            if not re.match(f"{expected}: .", problem):
                wrong[name] = f"{problem}; expected {expected}"
        for sample in samples:
            seen[sample.source] += 1
            if found := verdict(outcomes[sample.source], sample):
                wrong[sample.source] = found
    assert wrong == {}
    assert seen == Counter(dict.fromkeys(outcomes, 1)), "none lost, none twice"
    assert all(name.isprintable() for name in seen)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_all_of_them_are_in_the_dataset_or_in_quarantine(
    corpus: tuple[Path, dict[str, Outcome]], tmp_path: Path
) -> None:
    folder, outcomes = corpus
    settings: dict[str, Any] = {
        "filter": {"min_side_px": 32, "min_deviation": 0, "duplicate_bits": -1, "max_pixels": MAX_PIXELS},
        "crop": {"size_px": 32, "min_deviation": 0},
        "quarantine": {"max_fraction": 1.0},
    }
    out = tmp_path / "out"
    prepare(PrepareConfig.model_validate({"input": str(folder), "out": str(out), "source": {"name": "s"}, **settings}))
    left_out = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    used: set[str] = set()
    for shard in (out / "shards").iterdir():
        with tarfile.open(shard) as tar:
            samples = [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]  # type: ignore[arg-type]
        used |= {sample["source"] for sample in samples}
    assert Counter([*used, *(line["source"] for line in left_out)]) == Counter(dict.fromkeys(outcomes, 1))
    assert used >= {name for name, outcome in outcomes.items() if not outcome.reason} - _equal_files(left_out)
    assert not used & {name for name, outcome in outcomes.items() if outcome.pixels is None}


def _equal_files(left_out: list[dict[str, str]]) -> set[str]:
    return {line["source"] for line in left_out if line["reason"] == "duplicate"}


def test_every_kind_of_outcome_occurs(corpus: tuple[Path, dict[str, Outcome]]) -> None:
    _, outcomes = corpus
    assert {outcome.reason for outcome in outcomes.values()} == REASONS | {""}
    assert sum(outcome.pixels is not None for outcome in outcomes.values()) > NUM_INPUTS // 3
    for container in CONTAINERS[1:]:
        assert sum(name.startswith(f"s/{container}/") for name in outcomes) > NUM_INPUTS // 8


def test_the_inputs_are_the_same_every_time() -> None:
    first, second = make_corpus(), make_corpus()
    assert first.files == second.files

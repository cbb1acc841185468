"""The pictures of an evaluation: found, paired, checked, and loaded as every worker loads them.

    pictures = list_pictures(cfg)                  EvaluationPicture per name, without reading one
    loaded = load(pictures[0], cfg)                hq, lq, caption, words; lq degraded where the protocol says so

A folder holds pictures (kind hq or lq), or `hq/` and `lq/` with the same names (pairs), as a prepared dataset does.
Beside a picture may lie `a.txt`, its caption, and `a.words.json` or `gt_a.txt`, the words that are written in it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from faithdiff.degradation import degrade
from faithdiff.degradation.recipe import SCALE
from pipelines.contact_sheet import CONTACT_SHEET_NAME
from pipelines.evaluation.protocol import EvaluateConfig
from pipelines.evaluation.text_reading import ILLEGIBLE, Word, parse_words
from pipelines.stages.decode import SUFFIXES, UnreadablePictureError, decode_picture
from sr_platform.errors import InputDataError
from sr_platform.sample_reader import SampleReader
from sr_platform.shards import MANIFEST_NAME, json_digest
from sr_platform.storage import Storage, open_storage

Picture = NDArray[np.uint8]
MAX_PIXELS = 200_000_000
_NAMED = 5
"""How many names an error tells."""


@dataclass(frozen=True)
class Place:
    """Where bytes lie: a file below a URI, or a member of a prepared dataset's sample."""

    uri: str
    name: str
    sample: int = -1

    def read(self) -> bytes:
        if self.sample < 0:
            return open_storage(self.uri).read_bytes(self.name)
        return _samples(self.uri).read_many([self.sample], [self.name])[0][self.name]


@dataclass(frozen=True)
class EvaluationPicture:
    """One picture of the data set, not read yet."""

    name: str
    """Path below the data, without a suffix."""
    hq: Place | None = None
    lq: Place | None = None
    caption: Place | None = None
    words: Place | None = None

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def parse(cls, text: str) -> EvaluationPicture:
        values = json.loads(text)
        places = {key: Place(**value) for key, value in values.items() if key != "name" and value}
        return cls(values["name"], **places)


@dataclass(frozen=True)
class Loaded:
    """One picture, read."""

    name: str
    hq: Picture | None
    lq: Picture
    caption: str
    words: tuple[Word, ...] | None
    digest: str
    """sha256 of the files it was read from."""


def list_pictures(cfg: EvaluateConfig) -> list[EvaluationPicture]:
    """All pictures of the data, in the order of their names.

    Raises:
        InputDataError: there are none, names do not pair, or two differ only in their suffix.
    """
    storage = open_storage(cfg.data)
    if storage.exists(MANIFEST_NAME):
        found = _prepared(cfg, storage)
    elif cfg.pictures.kind == "pairs":
        found = _pairs(storage)
    else:
        listing = _Listing(storage.list(), storage.uri)
        found = [listing.picture(name, cfg.pictures.kind) for name in listing.pictures]
    if not found:
        raise InputDataError(
            f"evaluate: --data {storage.uri} holds no picture ({', '.join(SUFFIXES[:6])} ...); give another folder"
        )
    found.sort(key=lambda picture: picture.name)
    return found[: cfg.pictures.max_pictures or None]


def load(picture: EvaluationPicture, cfg: EvaluateConfig) -> Loaded:
    """Raises InputDataError, with the picture's name, where a file is damaged or sizes do not fit."""
    hashes: dict[str, str] = {}

    def read(role: str, place: Place | None) -> bytes:
        data = place.read() if place else b""
        hashes[role] = hashlib.sha256(data).hexdigest() if place else ""
        return data

    hq_bytes, lq_bytes = read("hq", picture.hq), read("lq", picture.lq)
    hq = _decoded(hq_bytes, picture.name, "hq") if picture.hq else None
    lq = _decoded(lq_bytes, picture.name, "lq") if picture.lq else None
    caption = _caption(read("caption", picture.caption), picture) if cfg.pictures.captions == "beside" else ""
    words = parse_words(read("words", picture.words), picture.words.name) if picture.words else None
    if hq is not None and picture.lq is None:
        hq, words = _cut(hq, words, cfg.pictures.crop_px, picture.name)
        lq = degrade(hq, cfg.degradation, key=picture.name, seed=cfg.degradation_seed)
    assert lq is not None
    _check_sizes(hq, lq, cfg.restoration.scale, picture.name)
    return Loaded(picture.name, hq, lq, caption, None if words is None else tuple(words), json_digest(hashes))


def data_digest(digests: Mapping[str, str]) -> str:
    """Of all pictures: name and content of each."""
    return f"sha256:{json_digest(sorted(digests.items()))}"


def pixels_digest(pixels: Picture) -> str:
    """sha256 of uint8 RGB [H, W, 3] and its size."""
    return hashlib.sha256(f"{pixels.shape}".encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def outputs_of(method: str, folder: str, names: Sequence[str]) -> tuple[dict[str, Place], list[str]]:
    """Where another method's outputs of the pictures `names` lie, and its files that belong to none of them.

    Raises:
        InputDataError: the folder holds none of them.
    """
    storage = open_storage(folder)
    listing = _Listing(storage.list(), storage.uri)
    found = {name: Place(storage.uri, listing.pictures[name]) for name in names if name in listing.pictures}
    if not found:
        there = ", ".join(list(listing.pictures)[:_NAMED]) or "no picture"
        raise InputDataError(
            f"evaluate: --method {method}={folder}: holds {there}, and none of the data's names "
            f"({', '.join(names[:_NAMED])}); name the outputs as the pictures, with any suffix"
        )
    return found, sorted(set(listing.pictures) - set(names))


@functools.lru_cache(maxsize=2)
def _samples(uri: str) -> SampleReader:
    return SampleReader(uri)


class _Listing:
    """Files of a folder: pictures by their names without a suffix, and what lies beside them."""

    def __init__(self, files: Iterable[str], uri: str, below: str = "") -> None:
        self.uri = uri
        self.files = {name for name in files if name.startswith(below)}
        self.below = below
        self.pictures: dict[str, str] = {}
        for file in sorted(self.files):
            stem, dot, suffix = file.rpartition(".")
            if f"{dot}{suffix}".lower() not in SUFFIXES or file.rpartition("/")[2] == CONTACT_SHEET_NAME:
                continue
            name = stem.removeprefix(below)
            if name in self.pictures:
                raise InputDataError(
                    f"evaluate: {uri}: {self.pictures[name]} and {file} have one name; rename one, or take it out"
                )
            self.pictures[name] = file

    def picture(self, name: str, role: str) -> EvaluationPicture:
        places = {role: Place(self.uri, self.pictures[name])}
        return EvaluationPicture(name, **places, **self.beside(name))

    def beside(self, name: str) -> dict[str, Place]:
        folder, slash, stem = f"{self.below}{name}".rpartition("/")
        words = (f"{self.below}{name}.words.json", f"{folder}{slash}gt_{stem}.txt")
        candidates = {"caption": (f"{self.below}{name}.txt",), "words": words}
        return {
            role: Place(self.uri, next(file for file in files if file in self.files))
            for role, files in candidates.items()
            if any(file in self.files for file in files)
        }


def _pairs(storage: Storage) -> list[EvaluationPicture]:
    files = storage.list()
    hq, lq = (_Listing(files, storage.uri, below) for below in ("hq/", "lq/"))
    alone = [f"hq/{name}" for name in hq.pictures.keys() - lq.pictures.keys()]
    alone += [f"lq/{name}" for name in lq.pictures.keys() - hq.pictures.keys()]
    if alone:
        raise InputDataError(
            f"evaluate: --data {storage.uri}: {len(alone)} pictures have no partner of their name in the other folder: "
            f"{_some(sorted(alone))}; hq/a.png belongs to lq/a.png"
        )
    return [
        EvaluationPicture(
            name,
            hq=Place(storage.uri, hq.pictures[name]),
            lq=Place(storage.uri, lq.pictures[name]),
            **{**lq.beside(name), **hq.beside(name)},
        )
        for name in hq.pictures
    ]


def _prepared(cfg: EvaluateConfig, storage: Storage) -> list[EvaluationPicture]:
    if cfg.pictures.kind != "pairs":
        raise InputDataError(
            f"evaluate: --data {storage.uri} is a prepared dataset, which holds pairs, and pictures.kind is "
            f"{cfg.pictures.kind}; give --pictures.kind pairs, or a folder of pictures"
        )
    keys = SampleReader(storage.uri).keys
    members = {"hq": "hq.png", "lq": "lq.png", "caption": "json"}
    return [
        EvaluationPicture(key, **{role: Place(storage.uri, member, index) for role, member in members.items()})
        for index, key in enumerate(keys)
    ]


def _decoded(data: bytes, name: str, role: str) -> Picture:
    try:
        return decode_picture(data, max_pixels=MAX_PIXELS)
    except UnreadablePictureError as error:
        raise InputDataError(f"{name}: its {role} picture cannot be read: {error}") from error


def _caption(data: bytes, picture: EvaluationPicture) -> str:
    try:
        text = data.decode("utf-8")
        if picture.caption and picture.caption.sample >= 0:
            text = str(json.loads(text).get("caption", ""))
    except ValueError as error:
        raise InputDataError(f"{picture.name}: its caption is not UTF-8 text: {error}") from error
    return text.strip()


def _cut(hq: Picture, words: list[Word] | None, crop_px: int, name: str) -> tuple[Picture, list[Word] | None]:
    """The middle, or the whole to multiples of SCALE; words that are cut are illegible from then on."""
    height, width = hq.shape[:2]
    if min(height, width) < max(crop_px, SCALE):
        raise InputDataError(f"{name}: is {width}x{height} px, smaller than {max(crop_px, SCALE)} px; take it out")
    rows, columns = (crop_px, crop_px) if crop_px else (height - height % SCALE, width - width % SCALE)
    top, left = ((height - rows) // 2, (width - columns) // 2) if crop_px else (0, 0)
    cut = np.ascontiguousarray(hq[top : top + rows, left : left + columns])
    return cut, None if words is None else [moved for word in words if (moved := _moved(word, left, top, cut))]


def _moved(word: Word, left: int, top: int, picture: Picture) -> Word | None:
    box = tuple((x - left, y - top) for x, y in word.box)
    height, width = picture.shape[:2]
    inside = [0 <= x <= width and 0 <= y <= height for x, y in box]
    if not any(inside):
        return None
    return Word(word.text if all(inside) else ILLEGIBLE, box)


def _check_sizes(hq: Picture | None, lq: Picture, scale: int, name: str) -> None:
    if hq is not None and hq.shape[:2] != (lq.shape[0] * scale, lq.shape[1] * scale):
        raise InputDataError(
            f"{name}: hq is {hq.shape[1]}x{hq.shape[0]} px and lq {lq.shape[1]}x{lq.shape[0]} px, which is not "
            f"{scale} times smaller; give restoration.scale, or other pictures"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def all_problems(problems: Mapping[str, str], num_pictures: int, uri: str) -> InputDataError:
    """One error for every picture that cannot be used: none is left out in silence."""
    told = [text if text.startswith(name) else f"{name}: {text}" for name, text in sorted(problems.items())]
    return InputDataError(
        f"evaluate: {len(told)} of {num_pictures} pictures of {uri} cannot be used: {_some(told).replace(', ', '; ')}; "
        "mend them, or take them out of the data"
    )

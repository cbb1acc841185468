"""Text in pictures: a recogniser reads it, and what was read is compared with what is known to be written.

    reader = Reader(TextConfig())
    matches = match(known_words, reader.read(picture), min_overlap=0.5)
    matches.precision, matches.recall

The recogniser is rapidocr's, whose wheel carries PP-OCR models as ONNX files; other ONNX files can be given. The rule
of a match is ours, since the paper states none: boxes overlap by at least half (intersection over union), and strings
are equal without case, spaces and punctuation; each is matched once, the best overlaps first.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import pydantic
from numpy.typing import NDArray

from sr_platform.config import StrictConfig
from sr_platform.errors import InputDataError, RequestError

ILLEGIBLE = "###"
"""A known word that nobody can read, as in the ICDAR sets: neither missed nor wrong."""
READER_LIBRARY = "rapidocr"

Corner = tuple[float, float]
Picture = NDArray[np.uint8]


class TextConfig(StrictConfig):
    """How text is read and compared, for the metrics that read."""

    unit: Literal["word", "line"] = "word"
    """What counts as one: a word, or a whole line."""
    min_overlap: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.5
    """Intersection over union of the boxes of what is written and what was read."""
    min_confidence: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.5
    """Of the reader; what it is less sure of is not counted."""


class UnavailableReaderError(RequestError):
    """The recogniser is not installed, or its model cannot be had."""


@dataclass(frozen=True)
class Word:
    """A string and where it is: four corners (x, y) in px, in the order of reading, from the top left."""

    text: str
    box: tuple[Corner, ...]


@dataclass(frozen=True)
class Matches:
    """How many words are written, were read, and both."""

    num_known: int
    num_read: int
    num_matched: int

    @property
    def precision(self) -> float:
        """Share of what was read that is written there; where nothing was read, nothing right was."""
        return self.num_matched / self.num_read if self.num_read else 0.0

    @property
    def recall(self) -> float:
        """Share of what is written that was read. There must be something."""
        return self.num_matched / self.num_known


class Reader:
    """PP-OCR on one CPU thread, so that it reads the same wherever it runs."""

    def __init__(self, cfg: TextConfig, *, detector: str = "", recogniser: str = "") -> None:
        """The models of the wheel, or those of ONNX files.

        Raises:
            UnavailableReaderError: rapidocr is not installed, or its models cannot be loaded.
        """
        try:
            from onnxruntime import InferenceSession
            from rapidocr import RapidOCR
        except ImportError as error:
            raise UnavailableReaderError(
                f"text: reading needs rapidocr and onnxruntime, which cannot be imported ({error}); "
                "install the extra: pip install 'faithdiff-platform[eval]'"
            ) from error
        engine = "EngineConfig.onnxruntime"
        params: dict[str, Any] = {
            "Global.log_level": "critical",
            "Global.text_score": cfg.min_confidence,
            f"{engine}.intra_op_num_threads": 1,
            f"{engine}.inter_op_num_threads": 1,
        }
        params |= {"Det.model_path": detector} if detector else {}
        params |= {"Rec.model_path": recogniser} if recogniser else {}
        try:
            for file in filter(None, [detector, recogniser]):  # or a damaged one would be found at the first picture
                InferenceSession(file, providers=["CPUExecutionProvider"])
            self.engine: Any = RapidOCR(params=params)
        except Exception as error:
            given = ", ".join(filter(None, [detector, recogniser])) or "of the installed rapidocr"
            raise UnavailableReaderError(
                f"text: the models {given} cannot be loaded: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        self.unit = cfg.unit

    def read(self, picture: Picture) -> list[Word]:
        """Everything that is read in uint8 RGB [H, W, 3]."""
        found = self.engine(np.ascontiguousarray(picture[..., ::-1]), return_word_box=self.unit == "word")
        if found.txts is None:
            return []
        if self.unit == "line":
            return [_word(text, box) for text, box in zip(found.txts, found.boxes, strict=True)]
        return [_word(text, box) for line in found.word_results or () for text, _, box in line if box is not None]


def match(known: Sequence[Word], read: Sequence[Word], *, min_overlap: float) -> Matches:
    """One-to-one, the largest overlaps first. What was read where a known word is illegible counts for nothing."""
    legible = [word for word in known if word.text != ILLEGIBLE]
    illegible = [word for word in known if word.text == ILLEGIBLE]
    counted = [word for word in read if not any(_covered(word, region) >= min_overlap for region in illegible)]
    pairs = [
        (overlap, i, j)
        for i, written in enumerate(legible)
        for j, word in enumerate(counted)
        if plain(written.text) == plain(word.text) and (overlap := overlap_of(written, word)) >= min_overlap
    ]
    matched_known: set[int] = set()
    matched_read: set[int] = set()
    for _, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if i not in matched_known and j not in matched_read:
            matched_known.add(i)
            matched_read.add(j)
    return Matches(len(legible), len(counted), len(matched_known))


def plain(text: str) -> str:
    """Without case, spaces and punctuation: "Mind the step!" -> "mindthestep"."""
    characters = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in characters if unicodedata.category(c)[0] not in "PZSC")


def overlap_of(one: Word, other: Word) -> float:
    """Intersection over union of two convex boxes."""
    shared, areas = _shared_area(one, other), [_area(one), _area(other)]
    union = sum(areas) - shared
    return shared / union if union > 0 else 0.0


def parse_words(data: bytes, name: str) -> list[Word]:
    """The words of a `.words.json` ([{"text", "box"}]) or of ICDAR's text files (x1,y1,...,x4,y4,transcription).

    Raises:
        InputDataError: it is neither.
    """
    try:
        text = data.decode("utf-8-sig")
        if name.endswith(".json"):
            return [_word(entry["text"], entry["box"]) for entry in json.loads(text)]
        lines = [line.split(",", 8) for line in text.splitlines() if line.strip()]
        return [_word(line[8], np.array(line[:8], float).reshape(4, 2)) for line in lines]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputDataError(
            f'text: {name} cannot be read ({error}); give [{{"text": ..., "box": [[x, y], 4 times]}}, ...] or lines of '
            "x1,y1,...,x4,y4,transcription"
        ) from error


def dump_words(words: Sequence[Word]) -> bytes:
    """What `parse_words` reads, as `.words.json`."""
    return (json.dumps([{"text": word.text, "box": word.box} for word in words], ensure_ascii=True) + "\n").encode()


def _word(text: str, box: Any) -> Word:
    corners = np.asarray(box, float)
    if corners.shape != (4, 2) or not np.isfinite(corners).all():
        raise ValueError(f"a box of shape {corners.shape}")
    return Word(str(text), tuple((float(x), float(y)) for x, y in corners))


def _shared_area(one: Word, other: Word) -> float:
    return float(cv2.intersectConvexConvex(_corners(one), _corners(other))[0])


def _corners(word: Word) -> NDArray[np.float32]:
    return np.array(word.box, np.float32)


def _area(word: Word) -> float:
    return float(cv2.contourArea(_corners(word)))


def _covered(word: Word, region: Word) -> float:
    area = _area(word)
    return _shared_area(word, region) / area if area > 0 else 0.0

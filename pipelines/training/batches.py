"""Prepared dataset -> micro-batches: which samples an update sees, how each is cut, and the tensors of it.

In : a prepared dataset (`hq.png`, `lq.png`, perhaps `lq1.png` ..., `json` with the caption, perhaps what the encode
stage made of hq and caption).
Out: `Batch`: hq, lq float [B, 3, S, S] in [-1, 1], captions, time_ids [B, 6] in pixels, and the samples' numbers.

The samples of a run form one endless stream (sr_platform/sample_order.py). Sample number n of the stream belongs to
update n // global batch. Whatever is random about it is drawn from (seed, n), so the number of workers, the micro-batch
and any restart leave every update as it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from faithdiff.degradation.recipe import SCALE
from pipelines.training.batch_split import BatchSplit, Slot
from sr_platform.errors import InputDataError
from sr_platform.sample_order import SampleOrder

Upsampling = Literal["nearest", "bilinear", "bicubic"]
Picture = npt.NDArray[np.uint8]

_UPSAMPLING: tuple[Upsampling, ...] = ("nearest", "bilinear", "bicubic")
_PIL_FILTER = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
HQ_SUFFIX = "hq.png"
ENCODED_SUFFIX = "latents.safetensors"
"""The member that the encode stage adds to a sample."""
_ITEM_STREAM, _VARIANT_STREAM = 3, 4
_LQ_NAME = re.compile(r"lq(\d*)\.png")


class Samples(Protocol):
    """What is read: `sr_platform.sample_reader.SampleReader`."""

    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def groups(self) -> Mapping[str, npt.NDArray[np.int64]]: ...
    @property
    def mixture(self) -> Mapping[str, float]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, bytes]: ...
    def suffixes(self, index: int) -> list[str]: ...
    def read_members(self, wanted: Sequence[tuple[int, Sequence[str]]]) -> list[dict[str, bytes]]: ...


@dataclass(frozen=True)
class ItemDraws:
    """Everything random about one cut-out."""

    is_flipped: bool
    top_px: int
    """Of the low-quality crop, 0 .. padded height - crop."""
    left_px: int
    upsampling: Upsampling
    is_caption_dropped: bool


@dataclass(frozen=True)
class Item:
    """One training example: uint8 RGB pictures [S, S, 3] of equal size, its text and its micro-conditioning."""

    hq: Picture | None
    """None where its latents are read instead."""
    lq: Picture
    caption: str
    time_ids: tuple[int, int, int, int, int, int]
    """original height and width, top and left of the crop, target height and width, all in high-quality pixels."""
    draws: ItemDraws


@dataclass(frozen=True)
class Batch:
    hq: Tensor | None
    """None where latents are read instead."""
    lq: Tensor
    captions: list[str]
    time_ids: Tensor
    samples: list[int]
    """Numbers in the stream of samples; the noise of the batch is drawn from them."""
    weights: Tensor
    """float32 [B]: 1, or 0 for samples that only fill the batch."""
    encoded: list[bytes] | None = None
    """`ENCODED_SUFFIX` of every sample, where it is read."""
    flips: list[bool] = field(default_factory=list)
    """Which samples are mirrored."""
    dropped: list[bool] = field(default_factory=list)
    """Which samples have lost their caption."""

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which a GPU copies while others work; DataLoader calls it."""
        return replace(
            self,
            hq=None if self.hq is None else self.hq.pin_memory(),
            lq=self.lq.pin_memory(),
            time_ids=self.time_ids.pin_memory(),
            weights=self.weights.pin_memory(),
        )


def draw_item(
    seed: int, sample: int, lq_height_px: int, lq_width_px: int, *, crop_px: int, caption_dropout: float
) -> ItemDraws:
    """The draws of sample number `sample`, whose low-quality picture is of the given size; `crop_px` is its crop."""
    rng = np.random.default_rng([seed, _ITEM_STREAM, sample])
    return ItemDraws(
        is_flipped=bool(rng.random() < 0.5),
        top_px=int(rng.integers(max(lq_height_px - crop_px, 0) + 1)),
        left_px=int(rng.integers(max(lq_width_px - crop_px, 0) + 1)),
        upsampling=_UPSAMPLING[int(rng.integers(len(_UPSAMPLING)))],
        is_caption_dropped=bool(rng.random() < caption_dropout),
    )


def draw_variant(seed: int, sample: int, num_variants: int) -> int:
    """Which of its low-quality pictures sample number `sample` shows.

    Not among the draws of `draw_item`: those need the picture's size, and only the picture shown is read.
    """
    return int(np.random.default_rng([seed, _VARIANT_STREAM, sample]).integers(num_variants))


def cut_item(hq: Picture | None, lq: Picture, caption: str, draws: ItemDraws, *, crop_px: int) -> Item:
    """Flip, pad, crop and up-sample one pair; `crop_px` is the side of the low-quality crop, a quarter of the result's.

    Source: Realesrgan_offline_dataset.py:166-229 @ f11af6c, with `target_size` 512 px as since 2025-08-11.
    """
    lq = _pad(lq[:, ::-1] if draws.is_flipped else lq, crop_px)
    top_px, left_px, side_px = draws.top_px * SCALE, draws.left_px * SCALE, crop_px * SCALE
    lq_crop = lq[draws.top_px : draws.top_px + crop_px, draws.left_px : draws.left_px + crop_px]
    upsampled = Image.fromarray(lq_crop).resize((side_px, side_px), _PIL_FILTER[draws.upsampling])
    if hq is not None:
        hq = _pad(hq[:, ::-1] if draws.is_flipped else hq, side_px)
        hq = hq[top_px : top_px + side_px, left_px : left_px + side_px]
    return Item(
        hq=hq,
        lq=np.asarray(upsampled),
        caption="" if draws.is_caption_dropped else caption,
        time_ids=(lq.shape[0] * SCALE, lq.shape[1] * SCALE, top_px, left_px, side_px, side_px),
        draws=draws,
    )


def _pad(picture: Picture, side_px: int) -> Picture:
    """Mirrored at the right and bottom edge (the edge pixel once) until both sides have `side_px`."""
    bottom_px, right_px = max(0, side_px - picture.shape[0]), max(0, side_px - picture.shape[1])
    padded = cv2.copyMakeBorder(np.ascontiguousarray(picture), 0, bottom_px, 0, right_px, cv2.BORDER_REFLECT_101)
    return np.asarray(padded, dtype=np.uint8)


@dataclass(frozen=True)
class CropConfig:
    """How samples are cut: the numbers of the recipe that `draw_item` and `cut_item` need."""

    size_px: int
    caption_dropout: float


class MicroBatches(Dataset[Batch]):
    """The micro-batches of one rank, numbered from the first update of the run: update * accumulation + micro-step."""

    def __init__(
        self,
        reader: Samples,
        split: BatchSplit,
        *,
        rank: int,
        seed: int,
        crop: CropConfig,
        reads: Sequence[str] = (HQ_SUFFIX,),
        mixture: Mapping[str, float] | None = None,
    ) -> None:
        """`reads` are the members that are read besides lq and json: hq.png, or `ENCODED_SUFFIX`, or both.

        `mixture` replaces the dataset's shares of its groups; {} draws every sample equally often.
        """
        self.reader, self.split, self.rank, self.seed, self.crop = reader, split, rank, seed, crop
        self.reads = tuple(reads)
        shares = reader.mixture if mixture is None else mixture
        self.order = SampleOrder(seed, len(reader), groups=reader.groups, mixture=shares)

    def __getitem__(self, number: int) -> Batch:
        update, micro_step = divmod(number, self.split.accumulation)
        return self.batch(self.split.slots(update, micro_step, self.rank))

    def keys_of_update(self, update: int) -> list[str]:
        """Keys of all samples of an update (from 0), over all ranks."""
        first = update * self.split.global_batch
        return [self.reader.keys[self.order.index(n)] for n in range(first, first + self.split.global_batch)]

    def batch(self, slots: Sequence[Slot]) -> Batch:
        """Reads all samples at the same time, and of each only what it shows."""
        samples = [slot.sample for slot in slots]
        shown = [self._shown(sample) for sample in samples]
        found = self.reader.read_members([(index, (*self.reads, lq_suffix, "json")) for index, lq_suffix in shown])
        items = [
            self._item(sample, index, lq_suffix, members)
            for sample, (index, lq_suffix), members in zip(samples, shown, found, strict=True)
        ]
        return Batch(
            hq=to_tensor([item.hq for item in items if item.hq is not None]) if HQ_SUFFIX in self.reads else None,
            lq=to_tensor([item.lq for item in items]),
            captions=[item.caption for item in items],
            time_ids=torch.tensor([item.time_ids for item in items], dtype=torch.float32),
            samples=samples,
            weights=torch.tensor([slot.weight for slot in slots]),
            encoded=[members[ENCODED_SUFFIX] for members in found] if ENCODED_SUFFIX in self.reads else None,
            flips=[item.draws.is_flipped for item in items],
            dropped=[item.draws.is_caption_dropped for item in items],
        )

    def _shown(self, sample: int) -> tuple[int, str]:
        """Where sample number `sample` lies, and which of its low-quality pictures it shows."""
        index = self.order.index(sample)
        variants = sorted(int(found[1] or 0) for s in self.reader.suffixes(index) if (found := _LQ_NAME.fullmatch(s)))
        if not variants:
            raise InputDataError(f"train: sample {self.reader.keys[index]} has no lq.png; prepare the dataset again")
        variant = variants[draw_variant(self.seed, sample, len(variants))]
        return index, f"lq{variant or ''}.png"

    def _item(self, sample: int, index: int, lq_suffix: str, members: Mapping[str, bytes]) -> Item:
        lq = self._decoded(index, members[lq_suffix])
        hq = self._decoded(index, members[HQ_SUFFIX]) if HQ_SUFFIX in members else None
        assert hq is None or hq.shape[:2] == (lq.shape[0] * SCALE, lq.shape[1] * SCALE), (hq.shape, lq.shape)
        crop_px = self.crop.size_px // SCALE
        draws = draw_item(self.seed, sample, *lq.shape[:2], crop_px=crop_px, caption_dropout=self.crop.caption_dropout)
        caption: str = json.loads(members["json"])["caption"]
        return cut_item(hq, lq, caption, draws, crop_px=crop_px)

    def _decoded(self, index: int, png: bytes) -> Picture:
        picture = decode(png)
        if picture is None:
            raise InputDataError(
                f"train: a picture of sample {self.reader.keys[index]} is damaged; "
                "run pipelines/prepare.py verify on the dataset"
            )
        return picture


def micro_batches(
    dataset: MicroBatches, first_update: int, last_update: int, *, num_workers: int, pin_memory: bool = False
) -> Iterator[Batch]:
    """The micro-batches of updates `first_update` .. `last_update` - 1, in order, decoded ahead by `num_workers`.

    `pin_memory` is for a GPU, which stands still for copies from ordinary memory.
    """
    accumulation = dataset.split.accumulation
    numbers = range(first_update * accumulation, last_update * accumulation)
    context: dict[str, Any] = {"multiprocessing_context": "spawn", "prefetch_factor": 4} if num_workers else {}
    # batch_size=None: an item of the dataset is a whole micro-batch already.
    return iter(
        DataLoader(dataset, batch_size=None, sampler=numbers, num_workers=num_workers, pin_memory=pin_memory, **context)
    )


def decode(png: bytes) -> Picture | None:
    """uint8 RGB [H, W, 3] of a picture as `prepare` writes it; None when it is damaged."""
    # The same pixels as PIL's, sooner.
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if pixels is None else np.asarray(pixels, dtype=np.uint8)


def to_tensor(pictures: Sequence[Picture]) -> Tensor:
    """float32 [B, 3, H, W] in [-1, 1] of uint8 RGB pictures [H, W, 3] of equal size."""
    stacked = torch.from_numpy(np.stack([np.ascontiguousarray(picture) for picture in pictures]))
    return stacked.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0

"""Reads the pictures of orders, and finds their captions, with the stages of `prepare.py`.

In : orders.
Out: `Sample`s: a picture's file, its sha256, and its caption; one that cannot be used has a problem.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import pyarrow as pa

from faithdiff.errors import InputError
from faithdiff.image_modes import to_eight_bits
from faithdiff.picture_files import Limits, PictureTooLarge, UnsupportedPicture, read_picture, read_size
from pipelines.restoration.orders import Order
from pipelines.restoration.recipe import LimitsConfig, RestoreConfig
from pipelines.restoration.records import FOLDER
from pipelines.stages.caption import CaptionConfig, EndpointCaption, LlavaCaption
from pipelines.stages.ingest import Ingest
from pipelines.stages.sample import Sample, read_table, to_table
from sr_platform.storage import open_storage

Stage = Callable[[pa.Table], pa.Table]

_ORDER = "order"


def cache_uri(cfg: RestoreConfig) -> str:
    """Where the listing of archives remembers what it saw."""
    return f"{open_storage(cfg.out).uri}/{FOLDER}/listing"


def order_row(index: int, orders: Sequence[Order]) -> dict[str, object]:
    """Some orders as the row that `Ingest` takes."""
    pictures = [[order.path, json.dumps({**json.loads(order.place), _ORDER: order.to_json()}), ""] for order in orders]
    return {"shard": index, "pictures": json.dumps(pictures)}


def order_of(sample: Sample) -> Order:
    """The order that a sample was read for."""
    return Order.from_json(json.loads(sample.place)[_ORDER])


def make_ingest(cfg: RestoreConfig) -> Ingest:
    return Ingest([cfg.source()], cache_uri(cfg))


class Show:
    """Puts the pixels that a captioner sees beside the files: uint8, no larger than it takes."""

    def __init__(self, cfg: CaptionConfig, limits: LimitsConfig) -> None:
        self._cfg, self._limits = cfg, limits

    def __call__(self, table: pa.Table) -> pa.Table:
        return to_table([sample if sample.problem else self._shown(sample) for sample in read_table(table)])

    def _shown(self, sample: Sample) -> Sample:
        # What lies beside a picture is its owner's, and the model is not asked.
        if self._cfg.reuse_existing and sample.caption.strip():
            return sample
        try:
            pixels = to_eight_bits(read_picture(sample.data, self._limits).rgb)
        except InputError as error:
            return sample.rejected(reason_of(error), str(error))
        scale = self._cfg.max_side_px / max(pixels.shape[:2])
        if scale < 1:
            height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
            pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        pixels = np.ascontiguousarray(pixels)
        # By content: what a model says of a picture must not depend on the picture's name.
        key = sample.source_sha256
        height, width = pixels.shape[:2]
        return dataclasses.replace(sample, hq=pixels.tobytes(), height_px=height, width_px=width, key=key)


def make_captioner(cfg: RestoreConfig) -> Stage | None:
    """Show and ask, in this process; None where captions are only what lies beside the pictures."""
    if cfg.caption.mode == "text":
        return None
    show = Show(cfg.caption, cfg.limits)
    ask: Stage
    if cfg.caption.mode == "llava":
        ask = LlavaCaption(cfg.caption, seed=cfg.seed, batch_size=cfg.workers.caption_batch_size)
    else:
        ask = EndpointCaption(cfg.caption, seed=cfg.seed)
    return lambda table: ask(show(table))


def prompt_of(cfg: RestoreConfig, sample: Sample) -> str:
    """The caption that a picture is restored with."""
    if cfg.caption.mode == "text" and not cfg.caption.reuse_existing:
        return cfg.prompt
    return sample.caption.strip() or cfg.prompt


def reason_of(error: InputError) -> str:
    """In a word or two."""
    if isinstance(error, PictureTooLarge):
        return "too large"
    return "unsupported" if isinstance(error, UnsupportedPicture) else "unreadable"


def size_problem(data: bytes, limits: Limits, scale: int, max_output_megapixels: float) -> str:
    """Why a file is not restored, as "reason: detail", from its header alone; empty when nothing speaks against it."""
    try:
        width, height = read_size(data, limits)
    except InputError as error:
        return f"{reason_of(error)}: {error}"
    megapixels = width * height * scale**2 / 1e6
    if megapixels <= max_output_megapixels:
        return ""
    return (
        f"too large: {width}x{height} px at scale {scale} make {megapixels:,.1f} megapixels; at most "
        f"{max_output_megapixels:g} are allowed: take a smaller scale, or raise limits.max_output_megapixels if the "
        "memory of a worker allows it"
    )

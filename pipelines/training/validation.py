"""Fixed pictures, restored while training goes on: what the weights can do by now, to look at and as PSNR.

In : the first pictures of a prepared dataset, and the module that is trained.
Out: <uri>/<key>/update_00000100.png, low-quality input | restored | original, and `validation/psnr`.

The weights are copied for it, which takes their memory for a while. Nothing of training is touched so: no mode, no
flag, no compiled block, no random number, and no rank has to wait for another's picture where ZeRO shares parameters.
"""

from __future__ import annotations

import io
import json
import logging
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed
from PIL import Image, ImageDraw
from torch import Tensor, nn

from faithdiff.degradation.recipe import SCALE
from faithdiff.loss import FaithDiffForTraining
from faithdiff.pipeline import FaithDiffPipeline
from faithdiff.precision import move
from faithdiff.text import PromptEmbeds, encode_prompts
from pipelines.synthetic.fonts import font
from pipelines.training.batches import HQ_SUFFIX, Picture, Samples, decode
from pipelines.training.recipe import ValidationConfig
from sr_platform.errors import InputDataError
from sr_platform.storage import open_storage

logger = logging.getLogger("pipelines.train")

_LQ_SUFFIX = "lq.png"
_LABEL_PX, _GAP_PX, _MIN_WIDTH_PX = 18, 4, 160
_PAPER, _INK = (250, 249, 246), (30, 30, 30)


@dataclass(frozen=True)
class ValidationPicture:
    """One picture with what its restoration needs."""

    number: int
    key: str
    lq: Picture
    hq: Picture
    text: PromptEmbeds
    """Of its caption, one row."""
    seed: int


@dataclass(frozen=True)
class ValidationResult:
    """The same on all ranks."""

    metrics: dict[str, float]
    pictures: dict[str, str]
    """Key -> URI of its comparison."""


class Validation:
    """One rank's share of the pictures, read and ready: their captions are encoded once."""

    def __init__(
        self,
        cfg: ValidationConfig,
        uri: str,
        reader: Samples,
        pipeline: FaithDiffPipeline,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Comparisons are written below `uri`. Of `pipeline` everything but UNet and LQ encoder is used, as it is.

        Raises:
            InputDataError: a picture is damaged.
        """
        self.cfg, self.uri, self.world_size = cfg, uri, world_size
        self.keys = list(reader.keys[: cfg.num_pictures])
        self.vae, self.scheduler = pipeline.vae, pipeline.scheduler
        self.no_text = _encode_text("", pipeline)
        numbers = range(rank, len(self.keys), world_size)
        self.share = [self._read(reader, number, pipeline) for number in numbers]

    def is_due(self, update: int, last_update: int) -> bool:
        """After every so many updates, and at the end of the stage."""
        return update % self.cfg.every_updates == 0 or update == last_update

    def run(self, update: int, module: FaithDiffForTraining) -> ValidationResult:
        """Restores the pictures with the weights of `module`; all ranks must call it together.

        A picture that is not finite in the weights' precision is left out, and counted.
        """
        device = next(module.parameters()).device
        unet, lq_encoder = (copy_of(part, is_needed=bool(self.share)) for part in (module.unet, module.lq_encoder))
        found = torch.zeros(len(self.keys), 2, dtype=torch.float64, device=device)
        with _placed(self.vae, device):
            for picture in self.share:
                restored = self._restored(picture, unet, lq_encoder)
                if restored is not None:
                    quality_db = psnr_db(restored, picture.hq)
                    self._write(update, picture, restored, quality_db)
                    found[picture.number] = torch.tensor([quality_db, 1.0])
        if self.world_size > 1:
            torch.distributed.all_reduce(found)
        return self._result(update, found.cpu())

    def _result(self, update: int, found: Tensor) -> ValidationResult:
        """`found` has a row (PSNR, 1) for every picture, and zeros for one that was left out."""
        quality_db, is_done = found.unbind(1)
        num_done = int(is_done.sum())
        metrics = {"validation/psnr": float(quality_db.sum()) / num_done} if num_done else {}
        if num_done < len(self.keys):
            metrics["validation/failed_pictures"] = float(len(self.keys) - num_done)
        done = [key for key, flag in zip(self.keys, is_done.tolist(), strict=True) if flag]
        return ValidationResult(metrics, {key: open_storage(self.uri).path(_name(key, update)) for key in done})

    def _read(self, reader: Samples, number: int, pipeline: FaithDiffPipeline) -> ValidationPicture:
        key = self.keys[number]
        members = reader.read_members([(number, (_LQ_SUFFIX, HQ_SUFFIX, "json"))])[0]
        lq, hq = decode(members[_LQ_SUFFIX]), decode(members[HQ_SUFFIX])
        if lq is None or hq is None:
            raise InputDataError(
                f"validation: a picture of sample {key} is damaged; run pipelines/prepare.py verify on the dataset"
            )
        assert hq.shape[:2] == (lq.shape[0] * SCALE, lq.shape[1] * SCALE), (hq.shape, lq.shape)
        text = _encode_text(json.loads(members["json"])["caption"], pipeline)
        return ValidationPicture(number, key, lq, hq, text, seed=zlib.crc32(f"{self.cfg.seed} {key}".encode()))

    def _restored(self, picture: ValidationPicture, unet: Any, lq_encoder: Any) -> Picture | None:
        pipeline = FaithDiffPipeline(
            vae=self.vae,
            unet=unet,
            lq_encoder=lq_encoder,
            scheduler=self.scheduler,
            # The text is encoded already.
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
        )
        try:
            result = pipeline(
                picture.lq,
                scale=SCALE,
                num_inference_steps=self.cfg.num_inference_steps,
                guidance_scale=self.cfg.guidance_scale,
                start_from=self.cfg.start_from,
                seed=picture.seed,
                prompt_embeds=picture.text,
                negative_prompt_embeds=self.no_text,
            )
        except FloatingPointError as error:
            logger.warning("validation: picture %s is left out: %s", picture.key, error)
            return None
        return np.asarray(result.image)

    def _write(self, update: int, picture: ValidationPicture, restored: Picture, quality_db: float) -> None:
        strip = comparison({"lq": enlarged(picture.lq), f"{quality_db:.2f} dB": restored, "hq": picture.hq})
        buffer = io.BytesIO()
        strip.save(buffer, "PNG")
        open_storage(self.uri).write_bytes_atomic(_name(picture.key, update), buffer.getvalue())


def copy_of(live: Any, *, is_needed: bool) -> Any:
    """A diffusers model like `live`, in eval mode, with its weights as they are; None where it is not needed.

    Where ZeRO shares parameters out, all ranks must call it together, whether they need it or not.
    """
    is_shared_out = any(hasattr(parameter, "ds_id") for parameter in live.parameters())
    if not is_needed and not is_shared_out:
        return None
    dtype, device = live.dtype, next(live.parameters()).device
    # The config alone makes it: a deep copy of the live one would follow DeepSpeed's hooks to everything else.
    with torch.device("meta"):
        empty: nn.Module = type(live).from_config(live.config)
    move(empty, dtype=dtype)
    copied = empty.to_empty(device=device).eval().requires_grad_(False)
    theirs = {**dict(live.named_parameters()), **dict(live.named_buffers())}
    for name, tensor in (*copied.named_parameters(), *copied.named_buffers()):
        with _whole(theirs[name]):
            tensor.copy_(theirs[name].detach())
    return copied


def _whole(tensor: Tensor) -> AbstractContextManager[Any]:
    """A block in which a parameter that ZeRO has shared out is whole."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([tensor])
    return gathered


@contextmanager
def _placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A block in which a model is on `device`; it goes back after that."""
    before = next(model.parameters()).device
    if before == device:
        yield
        return
    move(model, device=device)
    try:
        yield
    finally:
        move(model, device=before)


def _encode_text(text: str, pipeline: FaithDiffPipeline) -> PromptEmbeds:
    parts = (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.text_encoder, pipeline.text_encoder_2)
    encoded = encode_prompts([text], *parts)
    return PromptEmbeds(encoded.prompt_embeds.cpu(), encoded.pooled_prompt_embeds.cpu())


def psnr_db(picture: Picture, reference: Picture) -> float:
    """PSNR in dB of uint8 RGB [H, W, 3], over all values, without a border cut off; 100 where they are equal."""
    mse = float(np.mean((picture.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return min(100.0, 10 * float(np.log10(255**2 / max(mse, 1e-12))))


def enlarged(lq: Picture) -> Picture:
    """Every pixel as a square of SCALE x SCALE."""
    return lq.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def comparison(pictures: dict[str, Picture]) -> Image.Image:
    """Pictures of one size beside each other, each below its label; small ones grow by a whole factor."""
    height, width = next(iter(pictures.values())).shape[:2]
    factor = -(-_MIN_WIDTH_PX // width)
    height, width = height * factor, width * factor
    strip = Image.new("RGB", (len(pictures) * (width + _GAP_PX) - _GAP_PX, _LABEL_PX + height), _PAPER)
    for place, (label, pixels) in enumerate(pictures.items()):
        left = place * (width + _GAP_PX)
        ImageDraw.Draw(strip).text((left + 2, 2), label, fill=_INK, font=font("DejaVuSans", 12))
        strip.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (left, _LABEL_PX))
    return strip


def _name(key: str, update: int) -> str:
    return f"{key}/update_{update:08d}.png"

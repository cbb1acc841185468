"""FaithDiffPipeline: a low-quality picture in, the restored picture out. The public entry of `faithdiff`.

A thin loop over `denoiser.advance`: `prepare` turns a request into a `Restoration` with its canvas, `finish` turns the
denoised canvas into a picture. Serving prepares many, advances them together and finishes each when it is done; it
calls the halves of both, because `enlarge` and `compose` need no device while `encode` and `decode` do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from faithdiff import bundle
from faithdiff.alignment import AlignmentAttention
from faithdiff.breaks import take_break
from faithdiff.canvas_state import CanvasState, fingerprint_of
from faithdiff.checkpoint import load_released
from faithdiff.color_fix import color_fix
from faithdiff.compat import Switches, resolve_switches
from faithdiff.conditioning import build_condition, text_rows
from faithdiff.denoiser import Canvas, advance, prepare_condition
from faithdiff.errors import Cancelled, InputError
from faithdiff.image_modes import to_eight_bits
from faithdiff.latents import decode_latents, encode_latents, preview_image, start_latents, unit_noise
from faithdiff.pictures import Levels, input_consistency_db, to_network_input, to_rgb_array, upscale_lq
from faithdiff.precision import move
from faithdiff.request import ColorFix, RestorationRequest, Size, StartFrom
from faithdiff.schedule import EulerSchedule, alphas_cumprod
from faithdiff.text import PromptEmbeds
from faithdiff.tiling import CELL_PX, TilePlan, plan_tiles

Callback = Callable[[int, int, Image.Image], bool | None]


@dataclass(frozen=True)
class RestorationResult:
    """`image`: RGB of exactly scale x the input. `report`: steps, tiles, seconds per phase, version, consistency.

    `array` [H, W, 3] holds the same levels, at the depth of the input: uint8, or uint16 for an array of uint16.
    """

    array: Levels
    report: dict[str, Any]

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(to_eight_bits(self.array))


@dataclass(frozen=True)
class EnlargedPicture:
    """A request before the device has seen it: the picture as it came and at its final size."""

    request: RestorationRequest
    lq_rgb: np.ndarray
    reference_rgb: np.ndarray
    seconds: dict[str, float]


@dataclass
class Restoration:
    """A request under way: its canvas, what `finish` needs, and the seconds spent so far per phase."""

    request: RestorationRequest
    lq_rgb: np.ndarray
    reference_rgb: np.ndarray
    canvas: Canvas
    seconds: dict[str, float] = field(default_factory=dict)


class FaithDiffPipeline:
    """All components of a model on one device in one dtype; stateless between pictures.

    `tiles_per_batch`: see `denoiser.step_tiles`; left out, a picture's bits never depend on what else is restored.
    """

    def __init__(
        self,
        *,
        vae: Any,
        lq_encoder: Any,
        unet: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        scheduler: Any,
        tile_stride_fraction: float = 0.5,
        model_version: str = "unversioned",
        tiles_per_batch: int | None = None,
    ) -> None:
        self.vae, self.lq_encoder, self.unet = vae, lq_encoder, unet
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.tokenizer, self.tokenizer_2, self.scheduler = tokenizer, tokenizer_2, scheduler
        self.tile_stride_fraction = tile_stride_fraction
        self.model_version = model_version
        self.tiles_per_batch = tiles_per_batch

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        **settings: Any,
    ) -> FaithDiffPipeline:
        """A preset name ("nano"), a folder written by `save_pretrained`, or a model id of the hub.

        A preset that names its parts (`sdxl`) is put together with `from_base`.

        Raises:
            InputError: unknown name, or a folder that is incomplete or does not fit its configs.
        """
        folder = bundle.find_folder(os.fspath(name_or_path))
        index = bundle.read_index(folder)
        if "base" in index:
            return cls.from_base(**index["base"], dtype=dtype, device=device, **settings)
        components = bundle.load_components(folder, dtype)
        saved = {"tile_stride_fraction": index.get("tile_stride_fraction", 0.5)}
        saved["model_version"] = index.get("model_version", folder.resolve().name)
        return cls(**components, **{**saved, **settings}).to(device)

    @classmethod
    def from_base(
        cls,
        base: str | os.PathLike[str],
        *,
        vae: str | os.PathLike[str] | None = None,
        released: str | os.PathLike[str] | None = None,
        attention: AlignmentAttention = "value",
        variant: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        **settings: Any,
    ) -> FaithDiffPipeline:
        """A model from a plain SDXL folder or id: untrained alignment, or with the weights of a released file."""
        components = bundle.load_base_components(
            bundle.find_folder(os.fspath(base)),
            vae=None if vae is None else bundle.find_folder(os.fspath(vae)),
            dtype=dtype,
            attention=attention,
            variant=variant,
        )
        if released is not None:
            load_released(components["unet"], components["lq_encoder"], bundle.find_file(os.fspath(released)))
        return cls(**components, **settings).to(device)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that `from_pretrained` loads offline; it appears only when complete."""
        settings = {"tile_stride_fraction": self.tile_stride_fraction, "model_version": self.model_version}
        bundle.save_components(self.components, Path(folder), settings)

    @property
    def components(self) -> dict[str, Any]:
        """Every component by the name of its sub-folder."""
        return {name: getattr(self, name) for name in bundle.COMPONENTS}

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> FaithDiffPipeline:
        """Moves all models to `device`, and to `dtype` when given."""
        for name in bundle.MODELS:
            move(getattr(self, name), device=device, dtype=dtype)
        return self

    def __call__(
        self,
        image: Image.Image | np.ndarray,
        scale: int = 4,
        prompt: str = "",
        negative_prompt: str = "",
        *,
        num_inference_steps: int = 20,
        guidance_scale: float = 5.0,
        seed: int = 0,
        start_from: StartFrom = "lq",
        tile_px: Size = 1024,
        tile_stride_px: Size | None = None,
        vae_tile_px: int = 1024,
        color_fix: ColorFix = "adain",
        callback: Callback | None = None,
        compat: str | Switches | None = None,
        noise: Tensor | None = None,
        lq_latents: Tensor | None = None,
        prompt_embeds: PromptEmbeds | None = None,
        negative_prompt_embeds: PromptEmbeds | None = None,
    ) -> RestorationResult:
        """The restored picture of exactly `scale` x the input size, and a report.

        `image` is a PIL image, or uint8 or uint16 RGB [H, W, 3], of any size. `guidance_scale` <= 1 turns guidance off:
        the prompt alone predicts. `start_from` "lq" starts from the noised input, "noise" from noise alone. Sizes in
        pixels are one number or (height, width), multiples of 8; a picture longer than `vae_tile_px`, a multiple of
        64, passes the VAE in parts, with the same result. `callback(step, num_steps, preview)` follows every
        step; returning False cancels. `compat="released"` gives the released code's numbers. The last four replace
        what would be drawn or encoded: unit `noise` and scaled `lq_latents` [1, 4, H/8, W/8], and text embeddings.

        Raises:
            InputError: a setting is out of range.
            Cancelled: the callback returned False.
            FloatingPointError: the weights give no finite result even in fp32.
        """
        request = RestorationRequest(
            scale=scale,
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            start_from=start_from,
            tile_px=tile_px,
            tile_stride_px=tile_stride_px,
            vae_tile_px=vae_tile_px,
            color_fix=color_fix,
            switches=resolve_switches(compat),
            noise=noise,
            lq_latents=lq_latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        restoration = self.prepare(image, request)
        self._denoise(restoration, callback)
        return self.finish(restoration)

    def prepare(
        self, image: Image.Image | np.ndarray, request: RestorationRequest, *, resume: CanvasState | None = None
    ) -> Restoration:
        """Everything before the first step: up-scaling, LQ features, text, tiles and the start latents.

        With `resume` the restoration goes on from that state, and gives the bits it would have given undisturbed.

        Raises:
            InputError: the state is one of another picture, request or model.
        """
        return self.encode(self.enlarge(image, request), resume=resume)

    def enlarge(self, image: Image.Image | np.ndarray, request: RestorationRequest) -> EnlargedPicture:
        """The first half of `prepare`; needs no device."""
        seconds: dict[str, float] = {}
        lq_rgb = to_rgb_array(image)
        with timed(seconds, "upscale"):
            reference_rgb = upscale_lq(lq_rgb, request.scale)
        return EnlargedPicture(request, lq_rgb, reference_rgb, seconds)

    @torch.inference_mode()
    def encode(
        self, enlarged: EnlargedPicture, *, resume: CanvasState | None = None, tiles: Sequence[int] | None = None
    ) -> Restoration:
        """The second half of `prepare`; pauses at `take_break`.

        Only the given `tiles` are made ready for the network, all by default; `denoiser.prepare_tiles` adds others.
        """
        request, seconds = enlarged.request, dict(enlarged.seconds)
        picture = to_network_input(enlarged.reference_rgb, self.device)
        plan = self.plan((picture.shape[2], picture.shape[3]), request)
        with timed(seconds, "text"):
            text = text_rows(request, self.components)
        take_break()
        with timed(seconds, "encode"):
            condition = build_condition(picture, plan, request, lq_encoder=self.lq_encoder, text=text)
            take_break()
            prepared = prepare_condition(self.unet, condition, plan, tiles=tiles, tiles_per_batch=self.tiles_per_batch)
            schedule = EulerSchedule.from_scheduler(self.scheduler, request.num_inference_steps).to(self.device)
            if resume is None:
                latents = self._start(picture, schedule, request)
            else:
                latents = self._resumed(resume, enlarged, plan)
        step = 0 if resume is None else resume.step
        canvas = Canvas(latents, plan, schedule, condition, prepared, float(request.guidance_scale), step)
        return Restoration(request, enlarged.lq_rgb, enlarged.reference_rgb, canvas, seconds)

    def fingerprint(self, picture: EnlargedPicture | Restoration) -> str:
        """Of everything that the restoration of this picture depends on."""
        return fingerprint_of(picture.lq_rgb, picture.request, self.model_version)

    def state(self, restoration: Restoration) -> CanvasState:
        """What `prepare` needs to go on from where this restoration is, on any machine with the same model."""
        canvas = restoration.canvas
        return CanvasState(canvas.step, canvas.latents.float().cpu().clone(), self.fingerprint(restoration))

    def plan(self, size_px: tuple[int, int], request: RestorationRequest) -> TilePlan:
        """The tiles of a picture of (height, width) px, multiples of 8, under a request."""
        return plan_tiles(
            (size_px[0] // CELL_PX, size_px[1] // CELL_PX),
            request.tile_cells(),
            request.stride_cells(self.tile_stride_fraction),
            placement=request.switches.tile_placement,
            weights=request.switches.tile_weights,
        )

    def finish(self, restoration: Restoration) -> RestorationResult:
        """Everything after the last step: decoding, cropping, colour transfer and the report."""
        return self.compose(restoration, self.decode(restoration))

    @torch.inference_mode()
    def decode(self, restoration: Restoration) -> np.ndarray:
        """The first half of `finish`: the picture as the network sees it. Pauses at `take_break`."""
        canvas = restoration.canvas
        assert canvas.is_done, f"finish at step {canvas.step} of {canvas.schedule.num_steps}"
        height, width = restoration.reference_rgb.shape[:2]
        with timed(restoration.seconds, "decode"):
            levels = decode_latents(self.vae, canvas.latents, restoration.request, restoration.lq_rgb.dtype)
        return levels[:height, :width]

    def compose(self, restoration: Restoration, decoded: np.ndarray) -> RestorationResult:
        """The second half of `finish`; needs no device."""
        request, canvas, seconds = restoration.request, restoration.canvas, restoration.seconds
        height, width = restoration.reference_rgb.shape[:2]
        with timed(seconds, "color_fix"):
            rounding = request.switches.color_rounding
            restored = color_fix(decoded, restoration.reference_rgb, method=request.color_fix, rounding=rounding)
        report = {
            "model_version": self.model_version,
            "size_px": [width, height],
            "steps": canvas.step,
            "tiles": canvas.plan.num_tiles,
            "seed": request.seed,
            "seconds": {phase: round(spent, 4) for phase, spent in seconds.items()},
            "consistency_psnr_db": input_consistency_db(restored, restoration.lq_rgb),
        }
        return RestorationResult(restored, report)

    def preview(self, canvas: Canvas) -> Image.Image:
        """A small picture of what the canvas is becoming: the current clean estimate, decoded at low resolution."""
        return preview_image(self.vae, canvas.latents if canvas.denoised is None else canvas.denoised)

    def _start(self, picture: Tensor, schedule: EulerSchedule, request: RestorationRequest) -> Tensor:
        channels = self.unet.config.in_channels
        noise = unit_noise((1, channels, picture.shape[2] // CELL_PX, picture.shape[3] // CELL_PX), request)
        x0 = encode_latents(self.vae, picture, request) if request.start_from == "lq" else None
        final_abar = float(alphas_cumprod(self.scheduler.config)[-1])
        return start_latents(noise.to(self.device), x0, schedule, request, final_abar)

    def _resumed(self, state: CanvasState, enlarged: EnlargedPicture, plan: TilePlan) -> Tensor:
        shape = (1, self.unet.config.in_channels, *plan.canvas)
        num_steps = enlarged.request.num_inference_steps
        if state.fingerprint != self.fingerprint(enlarged) or tuple(state.latents.shape) != shape:
            raise InputError("resume: this state is of another picture, request or model; start the picture again")
        if not 0 <= state.step <= num_steps:
            raise InputError(f"resume: this state is at step {state.step} of {num_steps}; start the picture again")
        return state.latents.to(self.device)

    def _denoise(self, restoration: Restoration, callback: Callback | None) -> None:
        canvas = restoration.canvas
        num_steps = canvas.schedule.num_steps
        with timed(restoration.seconds, "denoise"):
            while not canvas.is_done:
                advance(self.unet, [canvas], tiles_per_batch=self.tiles_per_batch)
                if callback is not None and callback(canvas.step, num_steps, self.preview(canvas)) is False:
                    raise Cancelled(f"restoration: cancelled by its callback after step {canvas.step} of {num_steps}")


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the wall time of the block to `seconds[phase]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start

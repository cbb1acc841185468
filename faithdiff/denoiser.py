"""The denoising loop as data: a Canvas is one picture's state, `advance` performs one step for many of them.

A canvas is cut into latent tiles; the tiles of all canvases, at whatever timestep each canvas stands, share UNet
batches of equal tile shape. After a step each canvas is blended from its own tiles alone, and a batch of a shape always
has the same number of rows (`tiles_per_pass`), so what else ran in a batch never changes a bit of a picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from faithdiff.breaks import take_break
from faithdiff.precision import as_float32
from faithdiff.prepared_text import PreparedText
from faithdiff.schedule import EulerSchedule
from faithdiff.tiling import CELL_PX, TilePlan
from faithdiff.unet import FaithDiffUNet

_PASS_PX = 1024 * 1024
_MAX_TILES_PER_PASS = 8


def tiles_per_pass(tile: tuple[int, int], device: torch.device) -> int:
    """Tiles of (height, width) cells that the network takes at once: a number that depends on nothing else.

    Another number of rows makes other kernels, which round differently. So a pass always has this many: whoever has
    fewer tiles repeats one. On a CPU, where a repeated tile costs what a tile costs, that number is one.
    """
    if device.type == "cpu":
        return 1
    tile_px = tile[0] * tile[1] * CELL_PX * CELL_PX
    return max(1, min(_MAX_TILES_PER_PASS, _PASS_PX // tile_px))


class BrokenTiles(FloatingPointError):  # noqa: N818 - the family's name says that it is an error
    """Tiles that are not finite even in fp32; all others of their batch were stepped."""

    def __init__(self, jobs: Sequence[TileJob]) -> None:
        first = jobs[0]
        super().__init__(
            f"denoiser: tile {first.tile} is not finite at step {first.canvas.step} even in fp32; "
            f"the weights or the input are broken"
        )
        self.jobs = list(jobs)


@dataclass(frozen=True)
class Condition:
    """What steers one picture, before the network has seen it.

    `lq_features` [1, L, H, W] of the whole picture; `prompt_embeds` [P, 77, D] and `pooled_prompt_embeds` [P, E] with
    P = 2 rows (negative, positive) under guidance and 1 (positive) without; `time_ids` [N, 6] of its N tiles.
    """

    lq_features: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    time_ids: Tensor

    @property
    def num_prompts(self) -> int:
        return len(self.prompt_embeds)


@dataclass(frozen=True)
class PreparedCondition:
    """What of a condition the network would repeat at every step, computed once: f_m [C, h, w] by tile, text keys."""

    lq_embeddings: dict[int, Tensor]
    text: PreparedText


@dataclass
class Canvas:
    """One picture between start and finish: latents, conditioning and position in its schedule.

    `latents` [1, 4, H, W] fp32 are those after `step` steps; `denoised` is the network's current estimate of the
    clean latents, for previews.
    """

    latents: Tensor
    plan: TilePlan
    schedule: EulerSchedule
    condition: Condition
    prepared: PreparedCondition
    guidance_scale: float = 5.0
    step: int = 0
    denoised: Tensor | None = None
    _stepped: dict[int, Tensor] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.step >= self.schedule.num_steps

    def pending_tiles(self) -> list[int]:
        """Tiles that the current step still lacks, in row-major order."""
        return [] if self.is_done else [i for i in range(self.plan.num_tiles) if i not in self._stepped]

    def finish_step(self) -> None:
        """Blends the stepped tiles to the next latents. Every tile must have been stepped."""
        assert not self.pending_tiles(), "finish_step before all tiles were stepped"
        tiles = torch.cat([self._stepped[i] for i in range(self.plan.num_tiles)])
        self._stepped.clear()
        self._move_to(self.plan.blend(tiles))

    def _move_to(self, latents: Tensor) -> None:
        sigma, next_sigma = self.schedule.sigmas[self.step], self.schedule.sigmas[self.step + 1]
        self.denoised = self.latents + (latents - self.latents) * (sigma / (sigma - next_sigma))
        self.latents = latents
        self.step += 1

    def accept(self, tile: int, noise_pred: Tensor) -> None:
        """Takes the Euler step of one tile with its guided noise prediction [1, 4, h, w]."""
        latents = self.plan.cut(self.latents, tile)
        self._stepped[tile] = self.schedule.euler_step(latents, noise_pred.float(), self.step)

    def stepped(self, tiles: Sequence[int]) -> Tensor:
        """The latents [N, 4, h, w] of tiles that have taken the current step, for whoever blends them."""
        return torch.cat([self._stepped[tile] for tile in tiles])

    def receive(self, tile: int, stepped: Tensor) -> None:
        """Takes the current step of one tile from elsewhere: its latents [1, 4, h, w] after the step."""
        self._stepped[tile] = stepped.to(self.latents.device)

    def stand_at(self, step: int, latents: Tensor) -> None:
        """Begins step `step` from `latents` [1, 4, H, W], whatever was done before."""
        self._stepped.clear()
        self.step, self.latents, self.denoised = step, latents.to(self.latents.device), None

    def retract(self, tile: int) -> None:
        """Forgets the current step of a tile, if it was taken."""
        self._stepped.pop(tile, None)


@dataclass(frozen=True)
class TileJob:
    """One tile of one canvas, due for its canvas' current step."""

    canvas: Canvas
    tile: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Jobs of equal shape fit one batch: tile height and width in cells, and prompts per tile."""
        return (*self.canvas.plan.tile, self.canvas.condition.num_prompts)

    @property
    def scaled_latents(self) -> Tensor:
        canvas = self.canvas
        return canvas.schedule.scale_model_input(canvas.plan.cut(canvas.latents, self.tile), canvas.step)


def prepare_condition(
    unet: FaithDiffUNet,
    condition: Condition,
    plan: TilePlan,
    *,
    tiles: Sequence[int] | None = None,
    tiles_per_batch: int | None = None,
) -> PreparedCondition:
    """The part of the network that depends on neither timestep nor latents, in the network's dtype.

    Of all tiles of the plan or of those given. `tiles_per_batch` as in `step_tiles`.
    """
    wanted = range(plan.num_tiles) if tiles is None else tiles
    prepared = PreparedCondition({}, unet.prepare_text(condition.prompt_embeds.to(unet.dtype)))
    prepare_tiles(unet, condition, plan, prepared, wanted, tiles_per_batch=tiles_per_batch)
    return prepared


@torch.inference_mode()
def prepare_tiles(
    unet: FaithDiffUNet,
    condition: Condition,
    plan: TilePlan,
    prepared: PreparedCondition,
    tiles: Sequence[int],
    *,
    tiles_per_batch: int | None = None,
) -> None:
    """Adds to `prepared` what it lacks of `tiles`. Pauses at `take_break`."""
    missing = [tile for tile in tiles if tile not in prepared.lq_embeddings]
    features = condition.lq_features.to(unet.dtype) if missing else condition.lq_features
    for rows in _chunks(missing, plan.tile, features.device, tiles_per_batch):
        embedded = unet.alignment.embed(torch.cat([plan.cut(features, i) for i in rows]))
        prepared.lq_embeddings.update(zip(rows, embedded, strict=True))
        take_break()


@torch.inference_mode()
def advance(unet: FaithDiffUNet, canvases: Sequence[Canvas], *, tiles_per_batch: int | None = None) -> None:
    """One step for every canvas that is not done, whatever their sizes and timesteps. One device sync in all.

    `tiles_per_batch` as in `step_tiles`.

    Raises:
        FloatingPointError: a tile is not finite even in fp32.
    """
    active = [canvas for canvas in canvases if not canvas.is_done]
    step_tiles(
        unet,
        [TileJob(canvas, tile) for canvas in active for tile in canvas.pending_tiles()],
        tiles_per_batch=tiles_per_batch,
    )
    for canvas in active:
        canvas.finish_step()


@torch.inference_mode()
def step_tiles(unet: FaithDiffUNet, jobs: Sequence[TileJob], *, tiles_per_batch: int | None = None) -> None:
    """Steps the given tiles, in batches of equal shape; a tile that is not finite is computed again in fp32.

    A batch has `tiles_per_pass` tiles, or at most `tiles_per_batch` where given; the last bits of a tile may then
    depend on how many share its batch. When this raises, no canvas has taken a step that is not finite.

    Raises:
        BrokenTiles: some tiles are not finite even in fp32; the others were stepped.
    """
    try:
        broken = _step_batches(unet, jobs, tiles_per_batch)
        hopeless = _redo_in_float32(unet, broken) if broken else []
    except BaseException:
        for job in jobs:
            job.canvas.retract(job.tile)
        raise
    if hopeless:
        raise BrokenTiles(hopeless)


def _step_batches(unet: FaithDiffUNet, jobs: Sequence[TileJob], tiles_per_batch: int | None) -> list[TileJob]:
    """Steps the tiles and returns those whose prediction was not finite."""
    finite: list[Tensor] = []
    order: list[TileJob] = []
    for batch in _batches(jobs, tiles_per_batch):
        noise_pred = predict_noise(unet, batch, [job.canvas.prepared for job in batch])
        finite.append(torch.isfinite(noise_pred).flatten(1).all(dim=1))
        order += batch
        for job, noise in zip(batch, noise_pred.split(1), strict=True):
            job.canvas.accept(job.tile, noise)
    if not finite:
        return []
    broken = {
        (id(job.canvas), job.tile): job
        for job, is_finite in zip(order, torch.cat(finite).tolist(), strict=True)
        if not is_finite
    }
    return list(broken.values())


def predict_noise(unet: FaithDiffUNet, jobs: Sequence[TileJob], prepared: Sequence[PreparedCondition]) -> Tensor:
    """Guided noise [B, 4, h, w] of B tiles of one shape. A guidance pair shares everything before the first block.

    Classifier-free guidance is eps = u + g (t - u), rows ordered [all u, all t]; a canvas with a single prompt row
    (guidance_scale <= 1) predicts with its prompt alone.
    """
    num_prompts = jobs[0].shape[2]
    dtype, device = unet.dtype, jobs[0].canvas.latents.device
    sample = torch.cat([job.scaled_latents for job in jobs]).to(dtype)
    lq_embedding = torch.stack([p.lq_embeddings[job.tile] for job, p in zip(jobs, prepared, strict=True)])
    features = unet.entrance(sample, lq_embedding).repeat(num_prompts, 1, 1, 1)
    timestep = torch.stack([job.canvas.schedule.timesteps[job.canvas.step] for job in jobs]).repeat(num_prompts)
    conditions = [job.canvas.condition for job in jobs]
    pooled = torch.cat([c.pooled_prompt_embeds[p : p + 1] for p in range(num_prompts) for c in conditions])
    time_ids = torch.stack([c.time_ids[job.tile] for job, c in zip(jobs, conditions, strict=True)])
    added = {"text_embeds": pooled.to(dtype), "time_ids": time_ids.repeat(num_prompts, 1)}
    noise_pred = unet.trunk(features, timestep, _batch_text(prepared, num_prompts), added).float()
    if num_prompts == 1:
        return noise_pred
    negative, positive = noise_pred.chunk(2)
    guidance = torch.tensor([job.canvas.guidance_scale for job in jobs]).to(device, non_blocking=True)
    return negative + guidance.view(-1, 1, 1, 1) * (positive - negative)


def _batch_text(prepared: Sequence[PreparedCondition], num_prompts: int) -> PreparedText:
    texts = {id(p.text): p.text for p in prepared}
    position = {key: index for index, key in enumerate(texts)}
    rows = [(position[id(p.text)], prompt) for prompt in range(num_prompts) for p in prepared]
    return PreparedText.batch(list(texts.values()), rows)


def _redo_in_float32(unet: FaithDiffUNet, jobs: Sequence[TileJob]) -> list[TileJob]:
    """Computes tiles again one by one in fp32, conditioning included: its half-precision copy may be what broke.

    Returns the tiles that are not finite in fp32 either, with no step taken.
    """
    hopeless = []
    with as_float32(unet):
        for job in jobs:
            canvas = job.canvas
            prepared = prepare_condition(unet, canvas.condition, canvas.plan, tiles=[job.tile], tiles_per_batch=1)
            noise_pred = predict_noise(unet, [job], [prepared])
            if torch.isfinite(noise_pred).all():
                canvas.accept(job.tile, noise_pred)
            else:
                canvas.retract(job.tile)
                hopeless.append(job)
    return hopeless


def _batches(jobs: Sequence[TileJob], tiles_per_batch: int | None) -> Iterator[list[TileJob]]:
    by_shape: dict[tuple[int, int, int], list[TileJob]] = defaultdict(list)
    for job in jobs:
        by_shape[job.shape].append(job)
    for (height, width, _), same_shape in by_shape.items():
        device = same_shape[0].canvas.latents.device
        for indices in _chunks(range(len(same_shape)), (height, width), device, tiles_per_batch):
            yield [same_shape[i] for i in indices]


def _chunks(
    items: Sequence[int], tile: tuple[int, int], device: torch.device, tiles_per_batch: int | None
) -> Iterable[list[int]]:
    """At most `tiles_per_batch` items each, or exactly `tiles_per_pass`: the last item fills up what is missing."""
    size = tiles_per_batch or tiles_per_pass(tile, device)
    for start in range(0, len(items), size):
        chunk = list(items[start : start + size])
        missing = size - len(chunk) if tiles_per_batch is None else 0
        yield chunk + missing * chunk[-1:]

"""`restore.py --dry-run`: what would be done and how long it would take.

Sizes come from the headers of the pictures, of a random sample where there are many. The rate is measured: a worker
loads the model and restores a tile of a picture of the input with two steps; a run's steps take that much each. An
endpoint is asked instead.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from PIL import Image

from faithdiff.errors import InputError
from faithdiff.image_modes import to_eight_bits
from faithdiff.picture_files import Limits, read_picture, read_size, write_picture
from pipelines.restoration.model import Model, load_pipeline
from pipelines.restoration.orders import Order, Plan
from pipelines.restoration.reading import make_ingest, order_row, size_problem
from pipelines.restoration.recipe import RestoreConfig
from pipelines.restoration.service import PictureRefusedError, Service
from pipelines.stages.sample import read_table, sample_rng

MEASURED_PICTURES = 64
_READERS = 8
_MEASURED_STEPS = 2


@dataclass(frozen=True)
class Look:
    """At a sample of the pictures to do."""

    sizes_px: tuple[tuple[int, int], ...]
    """(width, height) of those that can be restored."""
    problems: Counter[str]
    """Of the others, by reason."""
    share: float
    """All pictures to do / those that were looked at."""


@dataclass(frozen=True)
class Cost:
    """Of the pictures that were looked at."""

    num_tiles: int
    seconds: float
    """Of one worker's device."""
    output_bytes: float | None
    rate: str
    """In words: where the seconds come from."""
    extra: tuple[str, ...] = ()


def estimate_text(cfg: RestoreConfig, plan: Plan, model: Model) -> str:
    """The plan as a person reads it. Runs on the connected Ray, or asks the endpoint."""
    look, example = look_at(cfg, plan.todo)
    lines = _what(cfg, plan, look)
    if not look.sizes_px:
        return "\n".join([*lines, "seconds      0"])
    if not cfg.endpoint and not example:
        return "\n".join([*lines, "seconds      not measured: of the pictures looked at, none can be read whole"])
    cost = asked_cost(cfg, look) if cfg.endpoint else measured_cost(cfg, model, look, example)
    about = "" if look.share == 1 else "about "
    num_workers = cfg.service.max_in_flight if cfg.endpoint else min(cfg.workers.num_actors, len(plan.todo))
    seconds = cost.seconds * look.share
    of_size = "" if cfg.endpoint else f" of {cfg.tile_px} px"
    lines.append(f"tiles        {about}{round(cost.num_tiles * look.share)}{of_size}")
    if cost.output_bytes is not None:
        lines.append(f"bytes out    about {cost.output_bytes * look.share / 2**20:.1f} MiB")
    lines.append(f"seconds      about {seconds:.0f} of one device ({cost.rate})")
    if not cfg.endpoint:
        lines.append(f"             about {seconds / num_workers:.0f} with {num_workers} workers, and the time to load")
    if cfg.caption.mode != "text":
        lines.append(f"captions     by {cfg.caption.model}, not measured")
    return "\n".join([*lines, *cost.extra])


def look_at(cfg: RestoreConfig, todo: Sequence[Order]) -> tuple[Look, bytes]:
    """The sizes, and one picture's file to measure with; empty where none can be read whole."""
    chosen = list(todo)
    if len(chosen) > MEASURED_PICTURES:
        drawn = sample_rng(cfg.seed, "dry run", "estimate").choice(len(chosen), MEASURED_PICTURES, replace=False)
        chosen = [todo[index] for index in sorted(drawn.tolist())]
    ingest, limits = make_ingest(cfg), cfg.limits

    def look(order: Order) -> tuple[tuple[int, int] | None, str, bytes]:
        (sample,) = read_table(ingest(pa.Table.from_pylist([order_row(0, [order])])))
        problem = sample.problem or size_problem(sample.data, limits, cfg.scale, limits.max_output_megapixels)
        return (None, problem, b"") if problem else (read_size(sample.data, limits), "", sample.data)

    sizes, problems, example = list[tuple[int, int]](), Counter[str](), b""
    with ThreadPoolExecutor(_READERS) as pool:
        for size, problem, data in pool.map(look, chosen):
            if size is None:
                problems[problem.partition(": ")[0]] += 1
            else:
                sizes.append(size)
                example = example or (data if _is_whole(data, limits) else b"")
    return Look(tuple(sizes), problems, len(todo) / max(1, len(chosen))), example


def measured_cost(cfg: RestoreConfig, model: Model, look: Look, example: bytes) -> Cost:
    """Measured by a worker with the resources of those that would work."""
    workers = cfg.workers
    task = ray.remote(_measure).options(num_cpus=workers.num_cpus, num_gpus=workers.num_gpus or None)
    step_s, other_s, bytes_per_px, stride_fraction, device = ray.get(task.remote(cfg, model, example))
    num_tiles, tile_px, output_px = 0, 0, 0
    for width, height in look.sizes_px:
        count, pixels = _tiles(cfg, (width * cfg.scale, height * cfg.scale), stride_fraction)
        num_tiles, tile_px = num_tiles + count, tile_px + count * pixels
        output_px += width * height * cfg.scale**2
    steps = cfg.num_inference_steps
    rate = f"measured on {device}: {step_s * 1e6:.3g} s for a step of a megapixel of tiles, {other_s * 1e6:.3g} s more"
    seconds = tile_px * steps * step_s + output_px * other_s
    return Cost(num_tiles, seconds, bytes_per_px * output_px, f"{rate} for one of results")


def asked_cost(cfg: RestoreConfig, look: Look) -> Cost:
    """Told by the endpoint."""

    async def ask() -> list[tuple[dict[str, Any] | None, int]]:
        async with Service(cfg.endpoint, cfg.service) as service:
            answers: list[tuple[dict[str, Any] | None, int]] = []
            for size, count in Counter(look.sizes_px).items():
                try:
                    answers.append((await service.estimate(size, cfg.request_fields("a.png", cfg.prompt)), count))
                except PictureRefusedError:
                    answers.append((None, count))
            return answers

    answers = asyncio.run(ask())
    taken = [(answer, count) for answer, count in answers if answer is not None]
    extra = []
    if refused := sum(count for answer, count in answers if answer is None):
        extra.append(f"refused      about {refused * look.share:.0f}, too large for the service")
    if taken:
        price = sum(answer["price"] * count for answer, count in taken) * look.share
        extra.append(f"price        about {price:.2f} {taken[0][0]['currency']}")
        extra.append(f"wait         {taken[0][0]['wait_seconds']:.0f} s for what is queued there now")
    return Cost(
        num_tiles=sum(answer["tiles"] * count for answer, count in taken),
        seconds=sum(answer["device_seconds"] * count for answer, count in taken),
        output_bytes=None,
        rate=f"told by {cfg.endpoint}",
        extra=tuple(extra),
    )


def _what(cfg: RestoreConfig, plan: Plan, look: Look) -> list[str]:
    about = "" if look.share == 1 else "about "
    num_pictures = len(plan.todo) + len(plan.done) + len(plan.unusable)
    megapixels = sum(width * height for width, height in look.sizes_px) * look.share / 1e6
    lines = [f"pictures     {num_pictures}", f"  done       {len(plan.done)}, skipped"]
    if plan.unusable:
        lines.append(f"  unusable   {len(plan.unusable)}")
    lines.append(f"  to do      {len(plan.todo)}, {sum(o.size_bytes for o in plan.todo) / 2**20:.1f} MiB")
    for number, why in ((plan.num_changed, "of changed inputs"), (plan.num_replaced, "overwritten")):
        if number:
            lines.append(f"    of these {number} {why}")
    for reason, count in sorted(look.problems.items()):
        lines.append(f"  will fail  {about}{round(count * look.share)}: {reason}")
    lines.append(f"megapixels   {about}{megapixels:.2f} in, {about}{megapixels * cfg.scale**2:.2f} out")
    return lines


def _tiles(cfg: RestoreConfig, size_px: tuple[int, int], stride_fraction: float) -> tuple[int, int]:
    """Number of tiles of a result of (width, height) px, and pixels of each."""
    from faithdiff.request import RestorationRequest
    from faithdiff.tiling import CELL_PX, plan_tiles

    request = RestorationRequest(**cfg.restoration(""))
    width, height = (-(-side // CELL_PX) for side in size_px)
    plan = plan_tiles((height, width), request.tile_cells(), request.stride_cells(stride_fraction))
    return plan.num_tiles, plan.tile[0] * plan.tile[1] * CELL_PX**2


def _is_whole(data: bytes, limits: Limits) -> bool:
    """Whether its pixels can be read, which a header does not tell."""
    try:
        read_picture(data, limits)
    except InputError:
        return False
    return True


def _measure(cfg: RestoreConfig, model: Model, example: bytes) -> tuple[float, float, float, float, str]:
    """Seconds of a step per pixel of a tile; of all else per pixel of the result; bytes per pixel of the result;
    stride of tiles as a fraction of their side; the device."""
    import torch

    pipeline = load_pipeline(model, cfg.workers)
    picture = read_picture(example, cfg.limits)
    side = max(16, cfg.tile_px // cfg.scale)
    part = picture.rgb[:side, :side]
    settings = {**cfg.restoration(cfg.prompt), "num_inference_steps": _MEASURED_STEPS}
    pipeline(part, **settings)  # the first one compiles, allocates and reads
    start_s = time.perf_counter()
    result = pipeline(part, **settings)
    whole_s = time.perf_counter() - start_s
    output_px = part.shape[0] * part.shape[1] * cfg.scale**2
    _, tile_px = _tiles(cfg, (part.shape[1] * cfg.scale, part.shape[0] * cfg.scale), pipeline.tile_stride_fraction)
    denoise_s = result.report["seconds"]["denoise"]
    size = _file_bytes(cfg, result.array, part)
    device = torch.cuda.get_device_name() if pipeline.device.type == "cuda" else "the CPU"
    step_s = denoise_s / _MEASURED_STEPS / tile_px
    return step_s, (whole_s - denoise_s) / output_px, size / output_px, pipeline.tile_stride_fraction, device


def _file_bytes(cfg: RestoreConfig, levels: Any, part: Any) -> int:
    """Of a result as a file, in the format of most."""
    buffer = io.BytesIO()
    Image.fromarray(to_eight_bits(part)).save(buffer, "PNG")
    source = read_picture(buffer.getvalue(), cfg.limits)
    return len(write_picture(to_eight_bits(levels), source, cfg.scale, cfg.output_options(f"a.{cfg.output.format}"))[0])

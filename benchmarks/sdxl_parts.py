"""Where does an update of SDXL-size stage 2 on one GPU spend its time: milliseconds by part, and the longest kernels.

Also holds what sdxl_throughput.py measures: module, engine and update as in pipelines/training/updates.py, with random
weights and inputs, without Ray, data and frozen models. Prints a table, writes JSON and the list of kernels; on a CPU
nano stands in, which proves that it runs and says nothing about speed.

    python benchmarks/sdxl_parts.py [--micro-batch 8] [--setting.checkpointing none] [--setting.compile blocks]
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

Preset = Literal["sdxl", "nano"]
HAS_GPU = torch.cuda.is_available()
PRESET: Preset = "sdxl" if HAS_GPU else "nano"
SIZE_PX = 512 if HAS_GPU else 64
SAMPLES = 32
"""Per update: the share of one GPU of eight in a global batch of 256."""
MAX_MICRO_BATCH = 32
_REPEATS = 10 if HAS_GPU else 2


@dataclass(frozen=True)
class Setting:
    """What one process measures; the defaults are the recipe's."""

    checkpointing: Literal["none", "first", "encoder", "unet", "all"] = "all"
    """first: the LQ encoder's first block alone, half of the encoder's memory for a quarter of its arithmetic."""
    compile: Literal["no", "blocks", "all"] = "no"
    """blocks: as `compile: true` in a recipe; all: residual blocks too, and static shapes."""
    zero_stage: int = 2
    overlap: bool = True
    """DeepSpeed's contiguous buffers and second stream for gradients, which one GPU shares with nobody."""
    encoder_attention: Literal["sdpa", "math"] = "sdpa"
    """Of the LQ encoder's one head of 512 channels, which flash kernels do not take."""
    cudnn_benchmark: bool = False
    channels_last: bool = False
    """Every convolution gets and gives NHWC; ZeRO's flat weights stay NCHW."""

    def __str__(self) -> str:
        usual = Setting()
        changes = {name: value for name, value in asdict(self).items() if value != getattr(usual, name)}
        return " ".join(f"{name}={value}" for name, value in changes.items()) or "recipe"


def build(preset: Preset, device: torch.device) -> Any:
    """The untrained module of the preset's size on `device`, its parts of stage 2 unfrozen."""
    from faithdiff.encoder import LQEncoder
    from faithdiff.loss import FaithDiffForTraining, trained_parameters
    from faithdiff.nano import SCHEDULER_CONFIG, UNET_CONFIG, VAE_CONFIG
    from faithdiff.schedule import alphas_cumprod
    from faithdiff.unet import FaithDiffUNet

    unet_config, encoder_config = UNET_CONFIG, dict[str, Any]()
    if preset == "sdxl":
        path = Path(__file__).parents[1] / "faithdiff/presets/sdxl/unet_config.json"
        unet_config = json.loads(path.read_text(encoding="utf-8"))
    else:
        encoder_config = {name: VAE_CONFIG[name] for name in ("block_out_channels", "layers_per_block")}
        encoder_config["norm_num_groups"] = VAE_CONFIG["norm_num_groups"]
    with device:
        encoder = LQEncoder(**encoder_config)
        unet = FaithDiffUNet.from_config(unet_config, lq_channels=encoder.out_channels, alignment_attention="tokens")
    module = FaithDiffForTraining(unet, encoder, alphas_cumprod(SCHEDULER_CONFIG))
    trained_parameters(module, ("alignment", "lq_encoder", "unet"))
    return module


def recipe(setting: Setting, size_px: int, device: torch.device) -> Any:
    """A recipe of stage 2 in bf16 on one worker."""
    from pipelines.training.recipe import TrainConfig

    stage = {"num_updates": 1000, "learning_rate": 1e-5}
    quiet = {"contiguous_gradients": False, "overlap_comm": False}
    return TrainConfig.model_validate(
        {
            "data": "none",
            "align": stage,
            "unified": stage,
            "size_px": size_px,
            "num_workers": 1,
            "global_batch": MAX_MICRO_BATCH,
            "max_micro_batch": MAX_MICRO_BATCH,
            "precision": "bf16",
            "use_gpu": device.type == "cuda",
            "zero_stage": setting.zero_stage,
            "compile": setting.compile == "blocks",
            "deepspeed": {} if setting.overlap else {"zero_optimization": quiet},
        }
    )


def apply(setting: Setting, module: Any) -> None:
    """All of a setting that `initialize` does not do."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = setting.cudnn_benchmark
    if setting.checkpointing in ("unet", "all"):
        module.unet.enable_gradient_checkpointing()
    if setting.checkpointing in ("encoder", "all"):
        module.lq_encoder.enable_gradient_checkpointing()
    if setting.checkpointing == "first":
        first = module.lq_encoder.down_blocks[0]
        first.forward = partial(checkpoint, first.forward, use_reentrant=False)
    if setting.encoder_attention == "math":
        block = module.lq_encoder.mid_block
        block.forward = sdpa_kernel(SDPBackend.MATH)(block.forward)
    if setting.channels_last:
        for child in module.modules():
            if isinstance(child, nn.Conv2d):
                child.register_forward_pre_hook(lambda _, x: (x[0].to(memory_format=torch.channels_last),))


def compile_all(module: Any) -> None:
    """Transformer, alignment and residual blocks and the LQ encoder's down blocks, one graph per shape."""
    from diffusers.models.resnet import ResnetBlock2D

    torch._dynamo.config.recompile_limit = 64
    module.unet.compile_repeated_blocks(dynamic=False)
    for block in [*module.lq_encoder.down_blocks, module.unet.alignment.condition]:
        block.compile(dynamic=False)
    for owner in (module.unet, module.lq_encoder.mid_block):
        for block in owner.modules():
            if isinstance(block, ResnetBlock2D):
                block.compile(dynamic=False)


def placed(preset: Preset, device: torch.device) -> Any:
    """The module on `device` in bf16."""
    module = build(preset, device)
    nn.Module.to(module, dtype=torch.bfloat16)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return module


def engine_of(module: Any, setting: Setting, size_px: int, device: torch.device, micro_batch: int) -> tuple[Any, Any]:
    """DeepSpeed's engine around `module` and its guard; the module is compiled as the setting says."""
    from pipelines.training.deepspeed_config import initialize
    from pipelines.training.guard import FiniteGuard

    if setting.compile == "all":
        compile_all(module)
    cfg = recipe(setting, size_px, device)
    engine = initialize(module, cfg, cfg.unified, split_of(SAMPLES, micro_batch))
    return engine, FiniteGuard(engine)


def alone() -> torch.device:
    """A process group of this process, which DeepSpeed wants."""
    os.environ["LOCAL_RANK"] = "0"
    store = f"file://{tempfile.mkdtemp()}/store"
    device = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
    options = {"device_id": device} if HAS_GPU else {}
    torch.distributed.init_process_group(
        "nccl" if HAS_GPU else "gloo", init_method=store, rank=0, world_size=1, **options
    )
    return device


def split_of(samples: int, micro_batch: int) -> Any:
    """`samples` per update, rounded up to whole micro-batches."""
    from pipelines.training.batch_split import BatchSplit

    return BatchSplit(math.ceil(samples / micro_batch) * micro_batch, 1, micro_batch)


def update(engine: Any, guard: Any, split: Any, inputs: Any, weights: Any, number: int) -> None:
    """`Worker._update` with inputs that are there already."""
    from pipelines.training.deepspeed_config import set_learning_rate

    set_learning_rate(engine, 0.5)
    for _ in range(split.accumulation):
        losses = engine(*inputs)
        loss = (losses * weights).sum() * split.loss_scale
        engine.backward(guard.poisoned(loss))
        engine.step()
    guard.updated(number)


def take_split(engine: Any, split: Any) -> None:
    """Other micro-batches for an engine that is there already."""
    engine.set_train_micro_batch_size(split.micro_batch)
    engine.set_train_batch_size(split.num_slots)
    engine.optimizer.gradient_accumulation_steps = split.accumulation


def about() -> dict[str, str]:
    """What a number is reported with."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()  # noqa: S607
    return {"commit": commit, "torch": torch.__version__, "date": time.ctime(), "device": device_name()}


def device_name() -> str:
    """Asked of the driver, which takes no memory of the GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)))
    except pynvml.NVMLError:
        return "cpu"


@dataclass(frozen=True)
class Parts:
    """What to take apart."""

    setting: Setting = Setting(checkpointing="none")
    micro_batch: int = 8
    preset: Preset = PRESET
    size_px: int = SIZE_PX
    out: Path = Path("out/benchmarks")


def milliseconds(run: Callable[[], Any]) -> float:
    """Median of some runs after two that load kernels; each is waited for, so that small parts include launching."""
    seconds = []
    for _ in range(2 + _REPEATS):
        wait()
        started_s = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - started_s)
    return 1000 * statistics.median(seconds[2:])


def wait() -> None:
    if HAS_GPU:
        torch.cuda.synchronize()


def forward_and_backward(run: Callable[[], Any], module: nn.Module) -> dict[str, float]:
    """Milliseconds of both; gradients are thrown away."""

    def both() -> None:
        run().float().mean().backward()
        for parameter in module.parameters():
            parameter.grad = None

    with torch.no_grad():
        forward_ms = milliseconds(run)
    both_ms = milliseconds(both)
    return {"forward_ms": forward_ms, "backward_ms": both_ms - forward_ms}


def network_parts(module: Any, inputs: Any) -> Iterator[tuple[str, dict[str, float]]]:
    """The network alone, before DeepSpeed: its parts with what they take from each other detached."""
    latents, draws, conditions = inputs
    unet, dtype = module.unet, module.unet.dtype
    lq = conditions["lq"].to(dtype)
    yield "LQ encoder", forward_and_backward(lambda: module.lq_encoder(lq), module)
    for number, block in enumerate([*module.lq_encoder.down_blocks, module.lq_encoder.mid_block]):
        given = captured(block, lambda: module.lq_encoder(lq))
        name = f"  down block {number}" if block is not module.lq_encoder.mid_block else "  middle block"
        yield name, forward_and_backward(lambda: block(*given), module)  # noqa: B023
    for backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH) if HAS_GPU else ():
        with sdpa_kernel(backend):
            yield f"  middle block, {backend.name}", forward_and_backward(lambda: block(*given), module)
    with torch.no_grad():
        features = module.lq_encoder(lq)
        hidden = unet.conv_in(latents.to(dtype))
        embedding = unet.alignment.embed(features)
        aligned = unet.entrance(latents.to(dtype), embedding)
    yield "LQ embedding", forward_and_backward(lambda: unet.alignment.embed(features), module)
    yield "alignment", forward_and_backward(lambda: unet.alignment.align(hidden, embedding), module)
    text = conditions["prompt_embeds"].to(dtype)
    added = {"text_embeds": conditions["pooled_prompt_embeds"].to(dtype), "time_ids": conditions["time_ids"]}
    yield "UNet", forward_and_backward(lambda: unet.trunk(aligned, draws.timesteps, text, added), module)


def captured(block: nn.Module, run: Callable[[], Any]) -> tuple[Any, ...]:
    """The positional arguments that `block` gets when `run` runs."""
    found: list[tuple[Any, ...]] = []
    with torch.no_grad():
        hook = block.register_forward_pre_hook(lambda _, args: found.append(args))
        run()
        hook.remove()
    return found[0]


def beside(bench: Parts, device: torch.device) -> Iterator[tuple[str, dict[str, float]]]:
    """What else a micro-batch costs: the frozen VAE in fp32, where latents are not stored, and drawing the noise."""
    from diffusers import AutoencoderKL

    from faithdiff.loss import noise_for
    from faithdiff.nano import VAE_CONFIG

    config = VAE_CONFIG
    if bench.preset == "sdxl":
        config = VAE_CONFIG | {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
    with device:
        vae = AutoencoderKL(**config).requires_grad_(False)
    hq = torch.rand(bench.micro_batch, 3, bench.size_px, bench.size_px, device=device)
    with torch.no_grad():
        yield "VAE's latents, fp32 (TF32)", {"forward_ms": milliseconds(lambda: vae.encode(hq))}
    side = bench.size_px // 8
    samples = range(bench.micro_batch)
    yield "noise, on the CPU", {"forward_ms": milliseconds(lambda: noise_for(0, samples, (4, side, side)))}


@contextmanager
def kernels(path: Path) -> Iterator[None]:
    """The twenty operations that take longest, into a file."""
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if HAS_GPU else [])]
    with torch.profiler.profile(activities=activities) as profile:
        yield
        wait()
    by = "self_device_time_total" if HAS_GPU else "self_cpu_time_total"
    path.write_text(profile.key_averages().table(sort_by=by, row_limit=20) + "\n", encoding="utf-8")


def engine_parts(bench: Parts, engine: Any, guard: Any, inputs: Any) -> Iterator[tuple[str, dict[str, float]]]:
    """Micro-batches under DeepSpeed, and what the last one of an update adds: clipping, AdamW, weights in bf16."""
    weights = torch.ones(bench.micro_batch, device=engine.device)

    def updates(accumulation: int) -> Callable[[], None]:
        split = split_of(accumulation * bench.micro_batch, bench.micro_batch)

        def run() -> None:
            take_split(engine, split)
            update(engine, guard, split, inputs, weights, 1)

        return run

    one_ms, three_ms = milliseconds(updates(1)), milliseconds(updates(3))
    micro_ms = (three_ms - one_ms) / 2
    yield "micro-batch, all of it", {"forward_ms": micro_ms}
    yield "optimiser step", {"forward_ms": one_ms - micro_ms}
    run = updates(2)
    with kernels(bench.out / "sdxl_kernels.txt"):
        run()


def main(bench: Parts) -> None:
    from pipelines.training.memory_probe import random_inputs

    bench.out.mkdir(parents=True, exist_ok=True)
    device, rows = alone(), dict[str, dict[str, float]]()

    def show(parts: Iterator[tuple[str, dict[str, float]]]) -> None:
        for name, row in parts:
            rows[name] = row
            print(f"{name:32}" + "".join(f"{value:14.2f}" for value in row.values()), flush=True)
            values = {"setting": asdict(bench.setting), **about(), "micro_batch": bench.micro_batch, "parts": rows}
            (bench.out / "sdxl_parts.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    print(f"{'ms per micro-batch':32}{'forward':>14}{'backward':>14}")
    module = placed(bench.preset, device)
    apply(replace(bench.setting, compile="no"), module)
    inputs = random_inputs(module, bench.micro_batch, size_px=bench.size_px, device=device)
    show(network_parts(module, inputs))
    show(beside(bench, device))
    engine, guard = engine_of(module, bench.setting, bench.size_px, device, bench.micro_batch)
    show(engine_parts(bench, engine, guard, inputs))
    print(f"longest kernels of an update of two micro-batches: {bench.out / 'sdxl_kernels.txt'}")


if __name__ == "__main__":
    main(tyro.cli(Parts))

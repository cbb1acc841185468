"""The degradation done plainly, as the specification describes it: the baseline of degradation.py and its tests.

One picture at a time, in torch tensors [1, 3, H, W] of 0..1: every kernel padded to 21 x 21, reflect padding and a
convolution, `interpolate`, `torch.poisson` and `torch.randn`, JPEG simulated with cosine transforms. Choices come from
`random`, ranges from `numpy`, noise and JPEG quality from `torch`, all global, as in the code it stands for. It shares
nothing with `faithdiff.degradation`: the numbers of the recipes stand here a second time.

    python benchmarks/plain_degradation.py [--recipe pasd]     (degrades one picture and prints what was drawn)
"""

# ruff: noqa: S311 - nothing here is a secret
from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from scipy import special
from torch import Tensor

PAD_TO = 21
MODES = ["area", "bilinear", "bicubic"]


@dataclass
class Order:
    """The numbers of one order."""

    sigma: tuple[float, float]
    resize: tuple[float, float, float]
    """Chances of up, down, keep."""
    factor: tuple[float, float]
    gaussian: tuple[float, float]
    poisson: tuple[float, float]
    jpeg: tuple[float, float]
    blur_probability: float = 1.0


@dataclass
class Settings:
    """The numbers of one recipe."""

    first: Order
    second: Order | None
    sizes: list[int]
    shapes: dict[str, float]
    sinc_probability: float
    final_sinc_probability: float
    gray_probability: float = 0.4


_MIXTURE = {"iso": 0.45, "aniso": 0.25, "gen_iso": 0.12, "gen_aniso": 0.03, "plateau_iso": 0.12, "plateau_aniso": 0.03}
_PLAIN_MIXTURE = {"iso": 0.65, "aniso": 0.35}
SETTINGS = {
    "pasd": Settings(
        first=Order((0.2, 3.0), (0.2, 0.7, 0.1), (0.3, 1.5), (1, 15), (0.05, 2.0), (60, 95)),
        second=Order((0.2, 1.5), (0.3, 0.4, 0.3), (0.6, 1.2), (1, 12), (0.05, 1.0), (60, 100), blur_probability=0.5),
        sizes=[7, 9, 11, 13, 15, 17, 19, 21],
        shapes=_MIXTURE,
        sinc_probability=0.1,
        final_sinc_probability=0.8,
    ),
    "level_I": Settings(
        first=Order((0.2, 0.8), (0.1, 0.2, 0.7), (0.85, 1.2), (1, 10), (0.05, 0.5), (90, 95)),
        second=None,
        sizes=[9, 11, 13, 15, 17, 19, 21],
        shapes=_PLAIN_MIXTURE,
        sinc_probability=0.0,
        final_sinc_probability=0.0,
    ),
    "level_II": Settings(
        first=Order((0.2, 1.5), (0.3, 0.4, 0.3), (0.5, 1.2), (1, 20), (0.05, 1.5), (50, 95)),
        second=None,
        sizes=[9, 11, 13, 15, 17, 19, 21],
        shapes=_PLAIN_MIXTURE,
        sinc_probability=0.0,
        final_sinc_probability=0.0,
    ),
    "level_III": Settings(
        first=Order((0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1, 30), (0.05, 3.0), (30, 95)),
        second=Order((0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5), (30, 95), blur_probability=0.8),
        sizes=[9, 11, 13, 15, 17, 19, 21],
        shapes=_PLAIN_MIXTURE,
        sinc_probability=0.0,
        final_sinc_probability=0.8,
    ),
}


@dataclass
class Drawn:
    """One picture's kernels, and everything that was drawn for it."""

    kernels: list[Tensor | None] = field(default_factory=list)
    """First blur, second blur, final low-pass."""
    values: dict[str, Any] = field(default_factory=dict)
    """By the name of the parameter, with 1_, 2_ or final_ before it."""


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def plain_degrade(hq: np.ndarray, recipe: str = "pasd", drawn: Drawn | None = None) -> np.ndarray:
    """hq uint8 [H, W, 3] -> lq uint8 [H/4, W/4, 3] with the global generators; `drawn` receives the parameters."""
    settings, drawn = SETTINGS[recipe], drawn or Drawn()
    draw_kernels(settings, drawn)
    image = torch.from_numpy(hq.copy()).permute(2, 0, 1)[None].contiguous().float() / 255.0
    height, width = image.shape[2:]
    image = first_order(image, settings, drawn)
    if settings.second is None:
        image = to_quarter(image, height, width, drawn)
    else:
        image = second_order(image, settings, drawn, height, width)
    return torch.clamp((image * 255.0).round(), 0, 255)[0].permute(1, 2, 0).byte().numpy()


def draw_kernels(settings: Settings, drawn: Drawn) -> None:
    """All three kernels, as the dataset class of the released code draws them before it touches the picture."""
    drawn.kernels.append(draw_blur(settings, settings.first, "1_", drawn.values))
    if settings.second is None:
        return
    drawn.kernels.append(draw_blur(settings, settings.second, "2_", drawn.values))
    size = random.choice(settings.sizes)
    applied = bool(np.random.uniform() < settings.final_sinc_probability)
    drawn.values["final_sinc"] = applied
    if applied:
        omega = float(np.random.uniform(np.pi / 3, np.pi))
        drawn.values |= {"final_size": size, "final_cutoff": omega}
        drawn.kernels.append(padded(sinc_kernel(size, omega)))
    else:
        drawn.kernels.append(None)


def draw_blur(settings: Settings, order: Order, name: str, values: dict[str, Any]) -> Tensor | None:
    """A 21 x 21 kernel, or nothing when this order does not blur."""
    applied = bool(np.random.uniform() < order.blur_probability)
    values[name + "blur"] = applied
    if not applied:
        return None
    size = random.choice(settings.sizes)
    values[name + "size"] = size
    if np.random.uniform() < settings.sinc_probability:
        omega = float(np.random.uniform(np.pi / 3 if size < 13 else np.pi / 5, np.pi))
        values |= {name + "shape": "sinc", name + "cutoff": omega}
        return padded(sinc_kernel(size, omega))
    shape = random.choices(list(settings.shapes), list(settings.shapes.values()))[0]
    sigma_x = float(np.random.uniform(*order.sigma))
    sigma_y, theta = sigma_x, 0.0
    values |= {name + "shape": shape, name + "sigma_x": sigma_x}
    if shape.endswith("aniso"):
        sigma_y, theta = float(np.random.uniform(*order.sigma)), float(np.random.uniform(-math.pi, math.pi))
        values |= {name + "sigma_y": sigma_y, name + "theta": theta}
    beta = draw_beta(shape)
    if beta is not None:
        values[name + "beta_" + shape.split("_")[0]] = beta
    return padded(shaped_kernel(shape, size, sigma_x, sigma_y, theta, beta))


def draw_beta(shape: str) -> float | None:
    if shape.startswith("gen"):
        return float(np.random.uniform(0.5, 1) if np.random.uniform() < 0.5 else np.random.uniform(1, 4))
    if shape.startswith("plateau"):
        return float(np.random.uniform(1, 1) if np.random.uniform() < 0.5 else np.random.uniform(1, 2))
    return None


def shaped_kernel(shape: str, size: int, sigma_x: float, sigma_y: float, theta: float, beta: float | None) -> Any:
    grid = np.stack(np.meshgrid(*[np.arange(-(size // 2), size // 2 + 1.0)] * 2), axis=-1)
    turn = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
    inverse = np.linalg.inv(turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T)
    distance = np.einsum("hwi,ij,hwj->hw", grid, inverse, grid)
    if shape.startswith("plateau"):
        kernel = 1 / (1 + distance**beta)
    else:
        kernel = np.exp(-0.5 * (distance if beta is None else distance**beta))
    return kernel / kernel.sum()


def sinc_kernel(size: int, omega: float) -> Any:
    y, x = np.mgrid[0:size, 0:size] - (size - 1) / 2
    radius = np.sqrt(x * x + y * y)
    with np.errstate(invalid="ignore"):
        kernel = omega * special.j1(omega * radius) / (2 * np.pi * radius)
    kernel[size // 2, size // 2] = omega * omega / (4 * np.pi)
    return kernel / kernel.sum()


def padded(kernel: Any) -> Tensor:
    rim = (PAD_TO - len(kernel)) // 2
    return torch.from_numpy(np.pad(kernel, rim)).float()


def filter2d(image: Tensor, kernel: Tensor | None) -> Tensor:
    """Every channel filtered with the kernel, borders mirrored."""
    if kernel is None:
        return image
    rim = len(kernel) // 2
    mirrored = F.pad(image, (rim, rim, rim, rim), mode="reflect")
    # One kernel per channel: twice as fast here as channels taken for a batch, which is how the released code does it.
    return F.conv2d(mirrored, kernel.expand(3, 1, *kernel.shape), groups=3)


def first_order(image: Tensor, settings: Settings, drawn: Drawn) -> Tensor:
    order, values = settings.first, drawn.values
    image = filter2d(image, drawn.kernels[0])
    factor, mode = draw_resize(order), random.choice(MODES)
    values |= {"1_factor": factor, "1_mode": mode}
    image = interpolate(image, mode, scale_factor=factor)
    image = add_noise(image, settings, order, "1_", values)
    return jpeg(image, order, "1_", values)


def second_order(image: Tensor, settings: Settings, drawn: Drawn, height: int, width: int) -> Tensor:
    order, values = settings.second, drawn.values
    assert order is not None
    image = filter2d(image, drawn.kernels[1])
    factor, mode = draw_resize(order), random.choice(MODES)
    values |= {"2_factor": factor, "2_mode": mode}
    image = interpolate(image, mode, size=(int(height / 4 * factor), int(width / 4 * factor)))
    image = add_noise(image, settings, order, "2_", values)
    values["jpeg_last"] = bool(np.random.uniform() < 0.5)
    if values["jpeg_last"]:
        image = filter2d(to_quarter(image, height, width, drawn), drawn.kernels[2])
        return jpeg(image, order, "2_", values)
    image = jpeg(image, order, "2_", values)
    return filter2d(to_quarter(image, height, width, drawn), drawn.kernels[2])


def to_quarter(image: Tensor, height: int, width: int, drawn: Drawn) -> Tensor:
    mode = random.choice(MODES)
    drawn.values["final_mode"] = mode
    return interpolate(image, mode, size=(height // 4, width // 4))


def draw_resize(order: Order) -> float:
    direction = random.choices(["up", "down", "keep"], order.resize)[0]
    if direction == "up":
        return float(np.random.uniform(1, order.factor[1]))
    return float(np.random.uniform(order.factor[0], 1)) if direction == "down" else 1.0


def interpolate(image: Tensor, mode: str, **kwargs: Any) -> Tensor:
    return F.interpolate(image, mode=mode, **kwargs)


def add_noise(image: Tensor, settings: Settings, order: Order, name: str, values: dict[str, Any]) -> Tensor:
    gaussian = bool(np.random.uniform() < 0.5)
    strength = float(np.random.uniform(*(order.gaussian if gaussian else order.poisson)))
    gray = bool(np.random.uniform() < settings.gray_probability)
    values |= {name + "noise": "gaussian" if gaussian else "poisson", name + "gray": gray}
    values[name + ("gaussian" if gaussian else "poisson")] = strength
    noise = gaussian_noise(image, strength, gray) if gaussian else poisson_noise(image, strength, gray)
    return torch.clamp(image + noise, 0, 1)


def gaussian_noise(image: Tensor, sigma: float, gray: bool) -> Tensor:
    # As in the released code, the field and its gray sibling are both drawn, and one is taken.
    noise = torch.randn_like(image) * sigma / 255.0
    gray_noise = torch.randn(image.shape[0], 1, *image.shape[2:]) * sigma / 255.0
    return gray_noise.expand_as(image) if gray else noise


def poisson_noise(image: Tensor, scale: float, gray: bool) -> Tensor:
    if gray:
        weights = torch.tensor([0.2989, 0.587, 0.114])[None, :, None, None]
        image = (image * weights).sum(dim=1, keepdim=True)
    rounded = torch.clamp((image * 255.0).round(), 0, 255) / 255.0
    vals = 2.0 ** math.ceil(math.log2(len(torch.unique(rounded))))
    return (torch.poisson(rounded * vals) / vals - rounded) * scale


def jpeg(image: Tensor, order: Order, name: str, values: dict[str, Any]) -> Tensor:
    quality = float(image.new_empty(1).uniform_(*order.jpeg))
    values[name + "quality"] = quality
    return simulated_jpeg(torch.clamp(image, 0, 1), quality)


# fmt: off
LUMA_TABLE = torch.tensor([
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56], [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
], dtype=torch.float32).T
# fmt: on
CHROMA_TABLE = torch.full((8, 8), 99.0)
CHROMA_TABLE[:4, :4] = torch.tensor([[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99.0]]).T
YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
RGB = torch.tensor([[1.0, 0.0, 1.402], [1.0, -0.344136, -0.714136], [1.0, 1.772, 0.0]])
_U, _X = np.mgrid[0:8, 0:8]
COSINES = torch.from_numpy(np.cos((2 * _X + 1) * _U * np.pi / 16) * np.where(_U == 0, 8**-0.5, 0.5)).float()


def simulated_jpeg(image: Tensor, quality: float) -> Tensor:
    """[1, 3, H, W] in 0..1 after JPEG without entropy coding: zero-padded to 16, 4:2:0, tables not rounded."""
    height, width = image.shape[2:]
    image = F.pad(image, (0, -width % 16, 0, -height % 16)) * 255.0
    planes = torch.einsum("ij,bjhw->bihw", YCBCR, image) + torch.tensor([0.0, 128.0, 128.0])[None, :, None, None]
    factor = (5000.0 / quality if quality < 50 else 200.0 - 2.0 * quality) / 100.0
    luma = quantised(planes[:, :1], LUMA_TABLE * factor)
    chroma = quantised(F.avg_pool2d(planes[:, 1:], 2), CHROMA_TABLE * factor)
    chroma = chroma.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) - 128.0
    image = torch.einsum("ij,bjhw->bihw", RGB, torch.cat([luma, chroma], dim=1))
    return (torch.clamp(image, 0, 255) / 255.0)[:, :, :height, :width]


def quantised(planes: Tensor, table: Tensor) -> Tensor:
    """Planes [1, C, H, W] in 0..255 with every 8 x 8 block's coefficients rounded to multiples of the table."""
    _, channels, height, width = planes.shape
    blocks = planes.reshape(1, channels, height // 8, 8, width // 8, 8).permute(0, 1, 2, 4, 3, 5) - 128.0
    coefficients = COSINES @ blocks @ COSINES.T
    blocks = COSINES.T @ (torch.round(coefficients / table) * table) @ COSINES + 128.0
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(1, channels, height, width)


def main(recipe: str = "pasd", seed: int = 0) -> None:
    """Degrades a picture of 256 x 256 px once and prints every drawn value."""
    seed_everything(seed)
    drawn = Drawn()
    waves = np.sin(np.arange(256)[:, None, None] / 9.0 + np.arange(256)[:, None] / 5.0 + np.arange(3))
    lq = plain_degrade((127.5 + 120 * waves).astype(np.uint8), recipe, drawn)
    print(f"{recipe}: lq of {lq.shape[1]}x{lq.shape[0]} px, mean {lq.mean():.1f}")
    for name, value in drawn.values.items():
        print(f"  {name:20}{value}")


if __name__ == "__main__":
    tyro.cli(main)

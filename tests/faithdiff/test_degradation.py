"""The degradation against the released code's golden tensors, and the promises its engine makes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from faithdiff.degradation import (
    D_LEVELS,
    PASD,
    RECIPES,
    BlurStep,
    JpegStep,
    NoiseStep,
    ResizeStep,
    apply_steps,
    degrade,
    draw_parameters,
    kernels,
    load_steps,
)
from faithdiff.degradation.filtering import filter2d
from faithdiff.degradation.jpeg import real_jpeg
from faithdiff.degradation.levels import to_uint8
from faithdiff.degradation.noise import add_noise, gaussian_noise, poisson_noise
from faithdiff.degradation.resizing import resize
from faithdiff.degradation.simulated_jpeg import simulated_jpeg
from faithdiff.errors import InputError

GoldenLoader = Callable[[str], Any]
PRIMITIVES = "case06a_degradation_primitives"
TRACE = "case06b_degradation_trace"


def hwc(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.reshape(tensor.shape[-3:]).permute(1, 2, 0).numpy())


def chw(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(picture, 2, 0)))


def unit(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().astype(np.float32) / np.float32(255.0)


def photograph(height_px: int = 128, width_px: int = 160) -> np.ndarray:
    y, x = np.mgrid[0:height_px, 0:width_px]
    waves = [127 + 90 * np.sin(x / a) * np.cos(y / b) for a, b in ((5.0, 9.0), (11.0, 4.0), (3.0, 17.0))]
    return np.stack(waves, axis=-1).astype(np.uint8)


def golden_kernel(name: str, about: dict[str, Any]) -> np.ndarray:
    size = about["kernel_size"]
    if name.startswith("sinc"):
        return np.pad(kernels.sinc_kernel(size, about["cutoff"]), max(0, (about["pad_to"] - size) // 2))
    place = (size, about["sig_x"], about["sig_y"], about["theta"])
    if name.startswith("gauss"):
        return kernels.gaussian_kernel(*place)
    make = kernels.generalized_kernel if name.startswith("ggauss") else kernels.plateau_kernel
    return make(*place, beta=about["beta"])


def test_every_kernel_equals_the_released_one(golden: GoldenLoader) -> None:
    case = golden(PRIMITIVES)
    assert len(case.about["kernel_parameters"]) >= 20
    for name, about in case.about["kernel_parameters"].items():
        assert case.max_error(name, torch.from_numpy(golden_kernel(name, about))) <= 1e-12, name


@pytest.mark.parametrize(("name", "kernel"), [("gauss", "gauss_3"), ("sinc", "sinc_1"), ("plateau", "plateau_2")])
def test_filtering_mirrors_at_the_border_as_the_released_code_does(
    golden: GoldenLoader, name: str, kernel: str
) -> None:
    case = golden(PRIMITIVES)
    filtered = filter2d(unit(case["image_u8"]), case[kernel].numpy())
    assert case.max_error(f"filter2D_{name}", chw(filtered)) <= 1e-6


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
def test_resizing_equals_interpolation_without_antialiasing(golden: GoldenLoader, mode: Any) -> None:
    case = golden(PRIMITIVES)
    image = unit(case["image_u8"])
    for factor in (0.37, 1.31):
        resized = resize(image, mode, factor=factor)
        assert case.max_error(f"interp_{mode}_sf{factor}", chw(resized)) <= 1e-6
    resized = resize(image, mode, size_px=(10, 13))
    assert case.max_error(f"interp_{mode}_size", chw(resized)) <= 1e-6


@pytest.mark.parametrize("quality", [30.0, 60.0, 75.5, 95.0])
def test_simulated_jpeg_equals_the_released_one(golden: GoldenLoader, quality: float) -> None:
    case = golden(PRIMITIVES)
    compressed = simulated_jpeg(unit(case["image_u8"]), quality)
    assert case.max_error(f"jpeg_q{quality}", chw(compressed)) <= 1e-6


def test_simulated_jpeg_of_a_batch_is_the_same_for_each_picture(golden: GoldenLoader) -> None:
    case = golden(PRIMITIVES)
    image = unit(case["image_u8"])
    flips = [image[::-1].copy(), image[:, ::-1].copy(), image[::-1, ::-1].copy()]
    np.testing.assert_allclose(simulated_jpeg(image, 40.0), hwc(case["jpeg_batch_q40_q80"][0]), atol=1e-6, rtol=0)
    expected = hwc(case["jpeg_batch_q40_q80"][1])
    assert min(np.abs(simulated_jpeg(flip, 80.0) - expected).max() for flip in flips) <= 1e-6


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("kind", ["gauss", "poisson"])
def test_noise_has_the_mean_and_spread_of_the_released_noise(golden: GoldenLoader, kind: str, gray: bool) -> None:
    case = golden(PRIMITIVES)
    image = unit(case["image_u8"])
    expected = hwc(case[f"noise_{kind}_{'gray' if gray else 'color'}"])
    fields = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        if kind == "gauss":
            fields.append(gaussian_noise(image.shape, 12.0, gray=gray, rng=rng))
        else:
            fields.append(poisson_noise(image, 1.4, gray=gray, rng=rng))
    assert fields[0].shape[2] == (1 if gray else 3)
    assert np.mean([f.mean() for f in fields]) == pytest.approx(0.0, abs=1e-3)
    assert np.mean([f.std() for f in fields]) == pytest.approx(expected.std(), rel=0.03)
    assert gray == bool(np.array_equal(expected[..., 0], expected[..., 1]))


def replay(image: np.ndarray, step: dict[str, Any], case: Any) -> np.ndarray:
    if step["op"] == "filter2D":
        return filter2d(image, case[step["kernel"]].numpy())
    if step["op"] == "resize":
        size = tuple(step["size"]) if "size" in step else None
        return resize(image, step["mode"], factor=step.get("scale_factor"), size_px=size)
    assert step["op"] == "jpeg"
    return simulated_jpeg(image, step["quality"])


def drawn_noise(image: np.ndarray, step: dict[str, Any]) -> np.ndarray:
    rng = np.random.default_rng(0)
    if step["kind"] == "gaussian":
        return gaussian_noise(image.shape, step["sigma"], gray=bool(step["gray"]), rng=rng)
    return poisson_noise(image, step["scale"], gray=bool(step["gray"]), rng=rng)


@pytest.mark.parametrize("run", ["s0", "s1"])
def test_a_recorded_run_replays_stage_by_stage(golden: GoldenLoader, run: str) -> None:
    case = golden(TRACE)
    image = unit(case["hr_u8"])
    for step in case.about["traces"][run]:
        expected = hwc(case[step["out"]])
        if step["op"] == "noise":
            # The field itself is not in the file (its name holds the picture after it), its size is.
            ours = add_noise(image, drawn_noise(image, step)) - image
            assert ours.std() == pytest.approx((expected - image).std(), rel=0.1), step["out"]
        else:
            # torch's own float32 sum over a 21x21 kernel is off by up to 2e-6; a JPEG coefficient on a rounding
            # boundary may fall to the other side.
            tolerance, allowed = {"filter2D": (2e-6, 0.0), "resize": (1e-6, 0.0), "jpeg": (1e-6, 1e-3)}[step["op"]]
            replayed = replay(image, step, case)
            off = np.abs(replayed - expected) > tolerance
            case.max_error(step["out"], chw(replayed)[None])
            assert off.mean() <= allowed, f"{step['out']}: {off.mean():.2%} of the values differ"
        image = expected
    np.testing.assert_array_equal(to_uint8(image), to_uint8(hwc(case[f"{run}_lq"])))


def test_real_and_simulated_jpeg_lose_the_same_amount(golden: GoldenLoader) -> None:
    image = unit(golden(TRACE)["hr_u8"])
    for quality in (35.0, 60.0, 95.0):
        real = np.square(real_jpeg(image, quality) - image).mean()
        simulated = np.square(simulated_jpeg(image, quality) - image).mean()
        assert 10 * abs(math.log10(real / simulated)) < 0.2


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_lq_is_a_quarter_of_hq_and_depends_on_seed_key_and_variant_alone(recipe: str) -> None:
    hq = photograph()
    lq = degrade(hq, recipe, key="a", seed=1)
    degrade(photograph(64, 64), recipe, key="other", seed=9)
    assert lq.shape == (32, 40, 3)
    assert lq.dtype == np.uint8
    np.testing.assert_array_equal(lq, degrade(hq, RECIPES[recipe], key="a", seed=1, variant=0))
    others = [degrade(hq, recipe, key=k, seed=s, variant=v) for k, s, v in (("b", 1, 0), ("a", 2, 0), ("a", 1, 1))]
    assert all(not np.array_equal(lq, other) for other in others)


def test_the_levels_are_ordered_by_what_they_destroy() -> None:
    hq = photograph()
    small = resize(unit(torch.from_numpy(hq)), "area", size_px=(32, 40))

    def loss(level: str) -> float:
        degraded = [degrade(hq, D_LEVELS[level], key=f"k{i}", seed=0) for i in range(40)]
        return float(np.median([np.square(lq / 255.0 - small).mean() for lq in degraded]))

    assert loss("I") < loss("II") < loss("III")


def test_drawn_parameters_have_the_frequencies_and_ranges_of_pasd() -> None:
    runs = [draw_parameters(PASD, key=str(i), seed=0) for i in range(4000)]
    first_blur = [run[0] for run in runs]
    shapes = Counter(blur.shape for blur in first_blur if isinstance(blur, BlurStep))
    assert shapes["sinc"] / 4000 == pytest.approx(0.1, abs=0.02)
    assert shapes["iso"] / 4000 == pytest.approx(0.9 * 0.45, abs=0.03)
    assert shapes["generalized_aniso"] / 4000 == pytest.approx(0.9 * 0.03, abs=0.01)
    sigmas = [b.sigma_x_px for b in first_blur if isinstance(b, BlurStep) and b.shape != "sinc"]
    assert (min(sigmas), max(sigmas)) == pytest.approx((0.2, 3.0), abs=0.02)
    assert {b.size_px for b in first_blur if isinstance(b, BlurStep)} == set(range(7, 22, 2))
    factors = [run[1].factor for run in runs if isinstance(run[1], ResizeStep)]
    assert sum(f > 1 for f in factors) / 4000 == pytest.approx(0.2, abs=0.03)
    assert sum(f == 1 for f in factors) / 4000 == pytest.approx(0.1, abs=0.02)
    noises = [run[2] for run in runs if isinstance(run[2], NoiseStep)]
    assert sum(n.kind == "gaussian" for n in noises) / 4000 == pytest.approx(0.5, abs=0.03)
    assert sum(n.gray for n in noises) / 4000 == pytest.approx(0.4, abs=0.03)
    qualities = [run[3].quality for run in runs if isinstance(run[3], JpegStep)]
    assert (min(qualities), max(qualities)) == pytest.approx((60, 95), abs=0.2)


def test_the_end_of_pasd_is_jpeg_first_or_last_with_an_occasional_low_pass() -> None:
    runs = [draw_parameters(PASD, key=str(i), seed=0) for i in range(4000)]
    jpeg_last = [isinstance(run[-1], JpegStep) for run in runs]
    assert np.mean(jpeg_last) == pytest.approx(0.5, abs=0.03)
    before = [run[-2] if last else run[-1] for run, last in zip(runs, jpeg_last, strict=True)]
    assert np.mean([isinstance(step, BlurStep) for step in before]) == pytest.approx(0.8, abs=0.03)
    assert np.mean([sum(isinstance(s, BlurStep) for s in run) for run in runs]) == pytest.approx(2.3, abs=0.05)


def test_one_order_levels_end_at_the_quarter_size_after_jpeg() -> None:
    for level in ("I", "II"):
        steps = draw_parameters(D_LEVELS[level], key="k", seed=0)
        kinds = [type(step) for step in steps]
        assert kinds == [BlurStep, ResizeStep, NoiseStep, JpegStep, ResizeStep]
        assert steps[-1] == dataclasses.replace(steps[-1], factor=1.0, of="lq")


def test_the_trace_names_every_step_and_the_steps_alone_repeat_the_picture() -> None:
    hq, trace = photograph(), []
    lq = degrade(hq, PASD, key="k", seed=3, trace=trace)
    steps = draw_parameters(PASD, key="k", seed=3)
    assert [record["step"] for record in trace] == [type(step).__name__ for step in steps]
    assert all("noise_seed" in record for record in trace if record["step"] == "NoiseStep")
    np.testing.assert_array_equal(apply_steps(hq, steps), lq)
    assert load_steps(json.loads(json.dumps(trace))) == steps


def test_simulated_jpeg_in_the_engine_gives_nearly_the_same_gray_picture() -> None:
    # In colour a coefficient near a rounding boundary may fall to either side, as little lost, but elsewhere.
    hq = photograph()[..., :1].repeat(3, axis=-1)
    steps = [s for s in draw_parameters(PASD, key="k", seed=3) if not isinstance(s, NoiseStep)]
    real, simulated = apply_steps(hq, steps), apply_steps(hq, steps, simulate_jpeg=True)
    assert np.abs(real.astype(int) - simulated.astype(int)).mean() < 3


@pytest.mark.parametrize(
    "kernel",
    [
        kernels.gaussian_kernel(21, 3.0, 3.0),
        kernels.gaussian_kernel(21, 0.2, 0.2),
        kernels.gaussian_kernel(11, 0.4, 3.0, 0.5),
        kernels.gaussian_kernel(21, 0.5, 2.5, 1.0),
        kernels.plateau_kernel(15, 2.5, 0.8, 1.1, beta=1.5),
        kernels.plateau_kernel(21, 3.0, 2.0, 0.3, beta=1.0),
        kernels.sinc_kernel(21, 0.7),
        kernels.sinc_kernel(7, 3.0),
    ],
    ids=["separable", "one tap", "denormal taps", "thin", "strips", "fourier", "large sinc", "small sinc"],
)
def test_every_way_of_filtering_gives_the_same_numbers(kernel: np.ndarray) -> None:
    for height, width in ((37, 53), (9, 64), (1, 5)):
        image = np.random.default_rng(0).random((height, width, 3), np.float32)
        rim = len(kernel) // 2
        mirrored = np.pad(image.astype(np.float64), ((rim, rim), (rim, rim), (0, 0)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(mirrored, kernel.shape, axis=(0, 1))
        np.testing.assert_allclose(filter2d(image, kernel), np.einsum("hwckl,kl->hwc", windows, kernel), atol=2e-6)


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
def test_resizing_equals_torch_for_odd_sizes_and_in_large_pictures(mode: Any) -> None:
    cases: list[tuple[int, int, dict[str, Any]]] = [
        (37, 53, {"size_px": (9, 13)}),
        (301, 511, {"factor": 0.6511}),
        (255, 129, {"factor": 1.4317}),
        (12, 500, {"size_px": (17, 333)}),
        (1, 7, {"size_px": (3, 1)}),
    ]
    for height, width, to in cases:
        image = np.random.default_rng(0).random((height, width, 3), np.float32)
        aligned = None if mode == "area" else False
        arguments = {"size": to.get("size_px"), "scale_factor": to.get("factor"), "align_corners": aligned}
        expected = hwc(torch.nn.functional.interpolate(chw(image)[None], mode=mode, **arguments))
        np.testing.assert_allclose(resize(image, mode, **to), expected, atol=2e-6)


def test_jpeg_of_odd_sizes_rings_at_the_border_as_the_simulated_one() -> None:
    # The encoder's own filling would leave the last column out of the ringing.
    image = np.full((33, 50, 3), 0.7, np.float32)
    real, simulated = real_jpeg(image, 40.0), simulated_jpeg(image, 40.0)
    for compressed in (real, simulated):
        assert np.abs(compressed[:, :32] - 0.7)[:16].max() < 0.005
        assert np.abs(compressed[:, -1] - 0.7).max() > 0.02
    np.testing.assert_allclose(real, simulated, atol=0.06)


@pytest.mark.parametrize("side_px", [4, 8, 20])
def test_the_smallest_pictures_degrade_too(side_px: int) -> None:
    for i in range(40):
        for recipe in RECIPES.values():
            lq = degrade(photograph(side_px, 4), recipe, key=str(i), seed=0)
            assert lq.shape == (side_px // 4, 1, 3)


@pytest.mark.parametrize(
    ("picture", "recipe", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), PASD, "uint8 RGB"),
        (np.zeros((8, 8), np.uint8), PASD, "uint8 RGB"),
        (np.zeros((8, 8, 4), np.uint8), PASD, "uint8 RGB"),
        ([[0]], PASD, "list"),
        (np.zeros((8, 10, 3), np.uint8), PASD, "8x10 px; both sides must be multiples of 4"),
        (np.zeros((0, 8, 3), np.uint8), PASD, "0x8 px"),
        (np.zeros((8, 8, 3), np.uint8), "pazd", "did you mean 'pasd'"),
    ],
)
def test_a_wrong_picture_or_recipe_is_refused_with_what_to_change(picture: Any, recipe: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        degrade(picture, recipe, key="k", seed=0)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(InputError, match="seed -1"):
        degrade(photograph(), PASD, key="k", seed=-1)

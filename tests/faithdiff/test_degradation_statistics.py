"""Ours is the reference process in distribution: every drawn parameter, every noise, and the PSNR of the result.

The reference is benchmarks/plain_degradation.py, which shares no code and no numbers with `faithdiff.degradation`.
Seeds are fixed, so a test never fails by chance; each says how often it would for another seed, and what it sees.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from faithdiff.degradation import (
    RECIPES,
    BlurStep,
    JpegStep,
    NoiseStep,
    ResizeStep,
    Step,
    apply_steps,
    draw_parameters,
)
from faithdiff.degradation.noise import gaussian_noise, poisson_noise

NUM_DRAWS = 4000
FALSE_ALARMS = 1e-3
"""Of all comparisons of one recipe together (Bonferroni)."""
TWO_ORDERS = ("pasd", "level_III")


@pytest.fixture(scope="module")
def plain() -> Iterator[ModuleType]:
    path = Path(__file__).parents[2] / "benchmarks" / "plain_degradation.py"
    spec = importlib.util.spec_from_file_location("plain_degradation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def only_draws(plain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The plain process with its draws and without its arithmetic."""
    for name in ("filter2d", "interpolate", "simulated_jpeg"):
        monkeypatch.setattr(plain, name, lambda image, *args, **kwargs: image)
    for name in ("gaussian_noise", "poisson_noise"):
        monkeypatch.setattr(plain, name, lambda image, *args: 0.0)
    for name in ("shaped_kernel", "sinc_kernel", "padded"):
        monkeypatch.setattr(plain, name, lambda *args: None)
    return plain


def plain_values(plain: ModuleType, recipe: str) -> list[dict[str, Any]]:
    plain.seed_everything(1)
    hq, runs = np.zeros((4, 4, 3), np.uint8), []
    for _ in range(NUM_DRAWS):
        drawn = plain.Drawn()
        plain.plain_degrade(hq, recipe, drawn)
        runs.append(drawn.values)
    return runs


def blur_values(step: BlurStep, name: str) -> dict[str, Any]:
    shape = step.shape.replace("generalized", "gen")
    values: dict[str, Any] = {name + "blur": True, name + "size": step.size_px, name + "shape": shape}
    if shape == "sinc":
        return {**values, name + "cutoff": step.cutoff_rad}
    values[name + "sigma_x"] = step.sigma_x_px
    if shape.endswith("aniso"):
        values |= {name + "sigma_y": step.sigma_y_px, name + "theta": step.theta_rad}
    if not shape.startswith(("iso", "aniso")):
        values[name + "beta_" + shape.split("_")[0]] = step.beta
    return values


def order_values(steps: list[Step], name: str) -> dict[str, Any]:
    """Takes one order's blur, resize and noise from the front of `steps`, under the names of the plain process."""
    values: dict[str, Any] = {name + "blur": False}
    if isinstance(steps[0], BlurStep):
        values |= blur_values(steps.pop(0), name)  # type: ignore[arg-type]
    resize, noise = steps.pop(0), steps.pop(0)
    assert isinstance(resize, ResizeStep)
    assert isinstance(noise, NoiseStep)
    values |= {name + "factor": resize.factor, name + "mode": resize.mode}
    return {**values, name + "noise": noise.kind, name + "gray": noise.gray, name + noise.kind: noise.strength}


def our_values(recipe: str, key: str) -> dict[str, Any]:
    steps = list(draw_parameters(RECIPES[recipe], key=key, seed=0))
    values = order_values(steps, "1_")
    jpeg = steps.pop(0)
    assert isinstance(jpeg, JpegStep)
    values["1_quality"] = jpeg.quality
    if recipe in TWO_ORDERS:
        values |= order_values(steps, "2_")
        values |= {"jpeg_last": isinstance(steps[-1], JpegStep), "final_sinc": len(steps) == 3}
    for step in steps:
        if isinstance(step, JpegStep):
            values["2_quality"] = step.quality
        elif isinstance(step, BlurStep):
            values |= {"final_size": step.size_px, "final_cutoff": step.cutoff_rad}
        else:
            assert isinstance(step, ResizeStep)
            values["final_mode"] = step.mode
    return values


def gathered(runs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Values by parameter; a resize factor apart by its direction, because keeping the size is an atom at 1."""
    values: dict[str, list[Any]] = defaultdict(list)
    for run in runs:
        for name, value in run.items():
            values[name].append(value)
            if name.endswith("factor"):
                direction = "keep" if value == 1 else "up" if value > 1 else "down"
                values[name + "_direction"].append(direction)
                values[f"{name}_{direction}"].append(value)
    return {name: column for name, column in values.items() if not name.endswith(("factor", "factor_keep"))}


def p_value(ours: list[Any], theirs: list[Any]) -> float:
    """Kolmogorov-Smirnov for numbers, chi-square for choices."""
    if isinstance(ours[0], float):
        return float(stats.ks_2samp(ours, theirs, method="asymp").pvalue)
    options = sorted(set(ours) | set(theirs))
    counts = [[Counter(column)[option] for option in options] for column in (ours, theirs)]
    return float(stats.chi2_contingency(counts).pvalue) if len(options) > 1 else 1.0


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_parameter_is_drawn_as_the_reference_draws_it(only_draws: ModuleType, recipe: str) -> None:
    # With 4,000 draws a side this sees a shift of 5 % of a range (KS), and 10 % against 12 % of a choice.
    ours = gathered([our_values(recipe, f"k{index}") for index in range(NUM_DRAWS)])
    theirs = gathered(plain_values(only_draws, recipe))
    assert set(ours) == set(theirs)
    assert len(ours) >= (31 if recipe in TWO_ORDERS else 15)
    odd = {name: p for name in ours if (p := p_value(ours[name], theirs[name])) < FALSE_ALARMS / len(ours)}
    assert odd == {}


def test_the_comparison_sees_a_range_that_is_off_by_a_tenth(only_draws: ModuleType) -> None:
    only_draws.SETTINGS["pasd"].first.sigma, kept = (0.2, 3.3), only_draws.SETTINGS["pasd"].first.sigma
    theirs = gathered(plain_values(only_draws, "pasd"))
    only_draws.SETTINGS["pasd"].first.sigma = kept
    ours = gathered([our_values("pasd", f"k{index}") for index in range(NUM_DRAWS)])
    assert p_value(ours["1_sigma_x"], theirs["1_sigma_x"]) < FALSE_ALARMS / len(ours)


def test_draws_of_neighbouring_keys_and_variants_do_not_follow_each_other() -> None:
    # |r| of 2,000 independent pairs exceeds 0.09 in 6 of 100,000 cases.
    def sigma(key: int, variant: int) -> float:
        blur = draw_parameters(RECIPES["level_II"], key=f"k{key}", seed=0, variant=variant)[0]
        assert isinstance(blur, BlurStep)
        return blur.sigma_x_px

    first, second = (np.array([sigma(key, variant) for key in range(2000)]) for variant in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.09
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.09


def test_gaussian_noise_is_normal() -> None:
    # 393,216 values: KS sees a difference of 0.004 of the distribution; false alarms 0.1 %.
    field = gaussian_noise((512, 256, 3), 255.0, gray=False, rng=np.random.default_rng(0))
    assert stats.kstest(field.ravel(), "norm").pvalue > FALSE_ALARMS
    assert field.std() == pytest.approx(1.0, abs=0.006)
    assert stats.kurtosis(field, axis=None) == pytest.approx(0.0, abs=0.03)
    assert abs(np.corrcoef(field[..., 0].ravel(), field[..., 1].ravel())[0, 1]) < 0.01


@pytest.mark.parametrize("num_values", [2, 5, 256])
def test_poisson_noise_has_the_exact_frequencies_of_photon_counts(num_values: int) -> None:
    # Chi-square per level over 19,200 values; false alarms 0.1 % for all levels together.
    levels = np.linspace(0, 255, num_values).round().astype(np.uint8)
    chosen = levels[:: max(1, num_values // 4)][:5]
    rows = np.concatenate([np.repeat(chosen, 32), levels])
    image = np.broadcast_to((rows / np.float32(255.0))[:, None, None], (len(rows), 200, 3)).astype(np.float32)
    noise = poisson_noise(image, 1.0, gray=False, rng=np.random.default_rng(num_values))
    photons = 2.0 ** np.ceil(np.log2(num_values))
    counts = np.rint((noise + image) * photons)
    np.testing.assert_allclose(counts / photons - image, noise, atol=1e-6)
    for level in chosen:
        assert count_p_value(counts[rows == level].ravel(), level / 255.0 * photons) > FALSE_ALARMS / len(chosen)


def count_p_value(counts: np.ndarray, mean: float) -> float:
    """Chi-square against Poisson, with the tails gathered into cells that expect five or more."""
    if mean == 0:
        return float(not counts.any())
    edges = np.unique(stats.poisson.ppf(np.linspace(0.001, 0.999, 40), mean))
    expected = np.diff(np.concatenate(([0.0], stats.poisson.cdf(edges, mean), [1.0]))) * len(counts)
    seen = np.bincount(np.searchsorted(edges, counts), minlength=len(edges) + 1)
    kept = expected >= 5
    tail = [[column[~kept].sum()] for column in (seen, expected)] if expected[~kept].sum() >= 5 else [[], []]
    seen, expected = (np.concatenate((column[kept], rest)) for column, rest in zip((seen, expected), tail, strict=True))
    return float(stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue)


def picture(index: int) -> np.ndarray:
    """A picture of 64 px: disks of several colours over a gradient, with grain; uint8 RGB."""
    rng = np.random.default_rng([5, index])
    y, x = np.mgrid[0:64, 0:64]
    image = rng.uniform(40, 215, 3) + (x[..., None] - 32) * rng.uniform(-0.9, 0.9, 3)
    for _ in range(20):
        top, left, radius = rng.uniform((0, 0, 2), (64, 64, 12))
        image[np.hypot(y - top, x - left) < radius] = rng.uniform(0, 255, 3)
    return np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


def psnr_db(lq: np.ndarray, hq: np.ndarray) -> float:
    """Against hq averaged to the same size."""
    small = hq.reshape(hq.shape[0] // 4, 4, hq.shape[1] // 4, 4, 3).mean(axis=(1, 3))
    return float(10 * np.log10(255.0**2 / np.square(lq - small).mean()))


@pytest.mark.parametrize("recipe", ["pasd", "level_II"])
def test_results_are_as_far_from_hq_as_those_of_the_reference(plain: ModuleType, recipe: str) -> None:
    # 300 pictures a side: KS sees 0.16 of the distribution; the means differ by more than 4 standard errors, about
    # 1 dB, in 6 of 100,000 cases.
    pictures = [picture(index) for index in range(300)]
    plain.seed_everything(2)
    with torch.inference_mode():
        theirs = np.array([psnr_db(plain.plain_degrade(hq, recipe), hq) for hq in pictures])
    drawn = [draw_parameters(RECIPES[recipe], key=str(index), seed=0) for index in range(len(pictures))]
    ours = np.array([psnr_db(apply_steps(hq, steps), hq) for hq, steps in zip(pictures, drawn, strict=True)])
    assert stats.ks_2samp(ours, theirs).pvalue > FALSE_ALARMS
    standard_error = np.sqrt((ours.var() + theirs.var()) / len(pictures))
    assert abs(ours.mean() - theirs.mean()) < 4 * standard_error


@pytest.mark.parametrize(
    ("recipe", "most_db"), [("pasd", 0.06), ("level_I", 0.3), ("level_II", 0.1), ("level_III", 0.06)]
)
def test_real_jpeg_costs_hardly_more_than_the_simulated_one(recipe: str, most_db: float) -> None:
    # The same draws with both: what is left is the file's 8-bit luma and chroma, which weak degradation shows most.
    pictures = [picture(index) for index in range(120)]
    drawn = [draw_parameters(RECIPES[recipe], key=str(index), seed=0) for index in range(len(pictures))]
    differences = [
        psnr_db(apply_steps(hq, steps), hq) - psnr_db(apply_steps(hq, steps, simulate_jpeg=True), hq)
        for hq, steps in zip(pictures, drawn, strict=True)
    ]
    assert abs(np.mean(differences)) < most_db

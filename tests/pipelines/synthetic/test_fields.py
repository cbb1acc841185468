"""Noise has the spectrum that was asked for and repeats without a seam."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.synthetic.fields import grid, light, noise, relief, sample, step, wrapped


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
def test_the_amplitude_of_noise_falls_as_its_exponent_says(exponent: float) -> None:
    field = noise(np.random.default_rng(0), exponent, size_px=256)
    power = np.abs(np.fft.fft2(field)) ** 2
    frequency = np.hypot(np.fft.fftfreq(256, 1 / 256)[:, None], np.fft.fftfreq(256, 1 / 256))
    rings = np.arange(4, 100)
    mean = [power[np.abs(frequency - ring) < 0.5].mean() for ring in rings]
    slope = np.polyfit(np.log(rings), np.log(mean), 1)[0]
    assert slope == pytest.approx(-2 * exponent, abs=0.1)
    assert (field.mean(), field.std()) == pytest.approx((0, 1), abs=1e-5)


def test_stretched_noise_changes_least_along_its_angle() -> None:
    field = noise(np.random.default_rng(0), 1.0, angle=0.0, stretch=10, size_px=128)
    assert np.abs(np.diff(field, axis=1)).mean() < 0.5 * np.abs(np.diff(field, axis=0)).mean()


def test_a_tile_is_sampled_without_a_seam() -> None:
    tile = noise(np.random.default_rng(0), 1.5, size_px=64)
    u, v = grid(100, 200)
    there = sample(tile, u - 30, v - 70)
    np.testing.assert_allclose(there, np.pad(tile, ((70, 130), (30, 200)), mode="wrap")[:100, :200], atol=1e-5)
    values = np.array([-700.5, -1.0, 0.0, 63.5, 64.0, 5000.25], np.float32)
    np.testing.assert_allclose(wrapped(values, 64), np.mod(values, 64))


def test_light_relief_and_steps_stay_within_their_ranges() -> None:
    rng = np.random.default_rng(0)
    factors = np.stack([light(rng, 40, 60) for _ in range(20)])
    assert factors.min() > 0.6
    assert factors.max() < 1.3
    shade = relief(noise(rng, 0.5, size_px=64) * 9, 1.0, 2.0)
    assert (shade.min(), shade.max()) == pytest.approx((0.55, 1.45), abs=1e-3)
    edge = step(0.5, np.linspace(0, 1, 11, dtype=np.float32), 0.4)
    assert (edge[0], edge[5], edge[-1]) == pytest.approx((0, 0.5, 1))

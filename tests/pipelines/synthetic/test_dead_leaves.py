"""Dead leaves have the statistics of photographs: radii of density r^-3, a power spectrum of about 1 / f^2."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pipelines.synthetic.dead_leaves import dead_leaves, draw_radii, fall, paint_labels, unit_outlines


def test_radii_have_a_density_of_r_to_the_minus_3() -> None:
    radii = draw_radii(np.random.default_rng(0), 200_000, 2.0, 100.0)
    assert radii.min() >= 2
    assert radii.max() <= 100
    edges = np.geomspace(2, 20, 9)
    density = np.histogram(radii, edges)[0] / np.diff(edges)
    slope = np.polyfit(np.log((edges[1:] + edges[:-1]) / 2), np.log(density), 1)[0]
    assert slope == pytest.approx(-3, abs=0.1)


def test_every_outline_has_the_area_of_its_disc() -> None:
    for outline in unit_outlines(np.random.default_rng(0)):
        assert cv2.contourArea(outline.astype(np.float32)) == pytest.approx(np.pi, rel=1e-3)


def test_leaves_cover_the_picture_to_its_borders() -> None:
    rng = np.random.default_rng(1)
    labels = paint_labels(rng, fall(rng, 256, 320, [0, 2, 5]), 256, 320)
    assert labels.shape == (256, 320)
    assert np.mean(labels == 0) < 0.02
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    assert len(np.unique(border)) > 30


def test_the_power_spectrum_falls_about_as_that_of_photographs() -> None:
    """Photographs: -2 with a spread of some tenths (Field 1987; van der Schaaf and van Hateren 1996: -1.88 +- 0.43)."""
    slopes = [spectral_slope(dead_leaves(np.random.default_rng([0, i]), 256, 256).pixels) for i in range(8)]
    assert -2.6 < np.mean(slopes) < -1.7
    assert min(slopes) > -3.0
    assert max(slopes) < -1.5


def spectral_slope(pixels: np.ndarray) -> float:
    """The exponent of frequency that fits the power between 4 and 64 cycles per picture."""
    size = len(pixels)
    window = np.hanning(size)
    gray = pixels.mean(axis=-1)
    power = np.abs(np.fft.fft2((gray - gray.mean()) * window * window[:, None])) ** 2
    frequency = np.hypot(np.fft.fftfreq(size, 1 / size)[:, None], np.fft.fftfreq(size, 1 / size))
    rings = np.arange(4, 65)
    mean = [power[np.abs(frequency - ring) < 0.5].mean() for ring in rings]
    return float(np.polyfit(np.log(rings), np.log(mean), 1)[0])


@pytest.mark.parametrize("size", [(64, 64), (96, 200)])
def test_pictures_of_any_size_are_sharp_and_say_what_they_show(size: tuple[int, int]) -> None:
    picture = dead_leaves(np.random.default_rng(3), *size)
    assert picture.pixels.shape == (*size, 3)
    assert picture.pixels.dtype == np.uint8
    assert picture.pixels.std() > 15
    assert picture.caption.startswith("Overlapping ")
    assert picture.lines == ()

"""Means that say what they are means of, and paired bootstrap intervals.

In : scores by picture, None where a score is missing.
Out: means with counts; differences and win rates of two methods over the pictures that both have.

Every interval is the percentile interval of a bootstrap over pictures (Efron 1979). The draws depend on (seed, number
of pictures) alone: the same scores always give the same interval, in whatever order they come, and two methods over
the same pictures are drawn alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 4000
SEED = 0
_MOST_DRAWS_AT_ONCE = 4_000_000

Scores = Mapping[str, float | None]
"""Score by picture; None is a missing score and never a number."""


@dataclass(frozen=True)
class Interval:
    """From `low` to `high`."""

    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """The mean of `num_scored` pictures. `num_missing` more have no score and are not in it.

    `mean` is None without any score, `interval` with fewer than two: one picture says nothing about the spread.
    """

    mean: float | None
    interval: Interval | None
    num_scored: int
    num_missing: int


@dataclass(frozen=True)
class Difference:
    """One method minus another over the `num_pairs` pictures that both have a score of.

    `wins` and `losses` count the pictures on which the first is better or worse; the rest are ties. `num_unpaired`
    pictures have a score of one method or none.
    """

    mean: float | None
    interval: Interval | None
    num_pairs: int
    num_unpaired: int
    wins: int
    losses: int

    @property
    def ties(self) -> int:
        return self.num_pairs - self.wins - self.losses

    @property
    def win_rate(self) -> float | None:
        """Share of pairs won, a tie counting half; None without pairs."""
        return (self.wins + self.ties / 2) / self.num_pairs if self.num_pairs else None


def summarize(scores: Scores, *, seed: int = SEED, num_resamples: int = NUM_RESAMPLES) -> Summary:
    """Mean and interval of the scores that are there, with the number of those that are not."""
    values = np.array([score for _, score in _present(scores)], dtype=np.float64)
    return Summary(
        mean=_mean(values),
        interval=bootstrap_interval(values, seed=seed, num_resamples=num_resamples),
        num_scored=len(values),
        num_missing=len(scores) - len(values),
    )


def compare(
    scores: Scores,
    others: Scores,
    *,
    higher_is_better: bool,
    seed: int = SEED,
    num_resamples: int = NUM_RESAMPLES,
) -> Difference:
    """The paired difference `scores - others`, picture by picture."""
    first, second = dict(_present(scores)), dict(_present(others))
    pairs = sorted(first.keys() & second.keys())
    differences = np.array([first[picture] - second[picture] for picture in pairs], dtype=np.float64)
    better = differences if higher_is_better else -differences
    return Difference(
        mean=_mean(differences),
        interval=bootstrap_interval(differences, seed=seed, num_resamples=num_resamples),
        num_pairs=len(pairs),
        num_unpaired=len(scores.keys() | others.keys()) - len(pairs),
        wins=int((better > 0).sum()),
        losses=int((better < 0).sum()),
    )


def bootstrap_interval(
    values: np.ndarray, *, seed: int = SEED, num_resamples: int = NUM_RESAMPLES, confidence: float = CONFIDENCE
) -> Interval | None:
    """Percentile interval of the mean of `values` [N] over resampled pictures; None for fewer than two."""
    if len(values) < 2:
        return None
    if not 0 < confidence < 1 or num_resamples < 1:
        raise ValueError(
            f"statistics: confidence is {confidence}, num_resamples {num_resamples}; "
            "give a confidence between 0 and 1 and at least one resample"
        )
    means = np.concatenate([values[drawn].mean(axis=1) for drawn in _draws(len(values), num_resamples, seed)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _draws(num_pictures: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Picture numbers [R, N] in parts that fit in memory. Their sizes follow from the number of pictures alone."""
    rng = np.random.default_rng([seed, num_pictures])
    rows = max(1, _MOST_DRAWS_AT_ONCE // num_pictures)
    for start in range(0, num_resamples, rows):
        yield rng.integers(0, num_pictures, (min(rows, num_resamples - start), num_pictures))


def _present(scores: Scores) -> list[tuple[str, float]]:
    """Pictures with their scores, in the order of their names: sums do not depend on the order of the rows."""
    found = [(picture, float(score)) for picture, score in sorted(scores.items()) if score is not None]
    strange = [picture for picture, score in found if not math.isfinite(score)]
    if strange:
        raise ValueError(
            f"statistics: the score of {strange[0]} is not finite; a score that cannot be had is None, with a reason"
        )
    return found


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None

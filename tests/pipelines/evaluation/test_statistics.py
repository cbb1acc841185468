import numpy as np
import pytest
from scipy import stats

from pipelines.evaluation.statistics import Interval, bootstrap_interval, compare, summarize

RNG = np.random.default_rng(5)
OURS = {f"{i:03d}": float(v) for i, v in enumerate(RNG.normal(25, 2, 60))}
THEIRS = {name: score - 0.3 + float(RNG.normal(0, 0.5)) for name, score in OURS.items()}


def test_a_mean_says_how_many_pictures_it_is_of_and_how_many_are_missing():
    summary = summarize({"a": 1.0, "b": 3.0, "c": None})
    assert (summary.mean, summary.num_scored, summary.num_missing) == (2.0, 2, 1)


def test_no_score_gives_no_mean_and_one_score_no_interval():
    assert summarize({"a": None}).mean is None
    assert summarize({}).num_missing == 0
    one = summarize({"a": 2.0, "b": None})
    assert (one.mean, one.interval) == (2.0, None)


def test_the_interval_agrees_with_scipys_percentile_bootstrap():
    values = np.array(list(OURS.values()))
    ours = bootstrap_interval(values, num_resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    spread = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.03 * spread
    assert abs(ours.high - theirs.high) < 0.03 * spread


def test_intervals_cover_the_true_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = [
        interval.low <= 0 <= interval.high
        for interval in (bootstrap_interval(rng.normal(0, 1, 50), num_resamples=500) for _ in range(400))
    ]
    assert 0.91 <= np.mean(covered) <= 0.98


def test_the_same_scores_in_another_order_give_the_same_bits():
    shuffled = dict(reversed(OURS.items()))
    assert summarize(shuffled) == summarize(OURS)
    assert compare(shuffled, THEIRS, higher_is_better=True) == compare(OURS, THEIRS, higher_is_better=True)


def test_another_seed_draws_other_pictures():
    assert summarize(OURS, seed=1).interval != summarize(OURS).interval


def test_differences_are_paired_picture_by_picture():
    """The methods differ by 0.3 with noise 0.5; the pictures differ by 2, which pairing takes out."""
    difference = compare(OURS, THEIRS, higher_is_better=True)
    paired = difference.interval.high - difference.interval.low
    single = summarize(OURS).interval
    assert difference.mean == pytest.approx(np.mean([OURS[n] - THEIRS[n] for n in OURS]))
    assert difference.interval.low > 0
    assert paired < (single.high - single.low) / 3


def test_wins_follow_the_direction_of_the_metric_and_a_tie_counts_half():
    scores, others = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}, {"a": 0.0, "b": 2.0, "c": 5.0, "d": 0.0}
    higher = compare(scores, others, higher_is_better=True)
    assert (higher.wins, higher.losses, higher.ties, higher.win_rate) == (2, 1, 1, 0.625)
    lower = compare(scores, others, higher_is_better=False)
    assert (lower.wins, lower.losses, lower.win_rate) == (1, 2, 0.375)


def test_pictures_that_only_one_method_has_are_counted_and_left_out():
    difference = compare({"a": 1.0, "b": 2.0, "c": None}, {"a": 0.0, "c": 9.0, "d": 9.0}, higher_is_better=True)
    assert (difference.mean, difference.num_pairs, difference.num_unpaired) == (1.0, 1, 3)
    nothing = compare({"a": None}, {"a": 1.0}, higher_is_better=True)
    assert (nothing.mean, nothing.win_rate, nothing.num_unpaired) == (None, None, 1)


def test_equal_scores_have_an_interval_of_no_width():
    assert bootstrap_interval(np.full(10, 3.0)) == Interval(3.0, 3.0)


def test_large_sets_are_drawn_in_parts_that_fit_in_memory():
    interval = bootstrap_interval(np.linspace(0, 1, 70_000), num_resamples=100)
    assert 0.49 < interval.low < 0.5 < interval.high < 0.51


def test_a_score_that_is_not_finite_is_refused_by_name():
    with pytest.raises(ValueError, match="score of b is not finite"):
        summarize({"a": 1.0, "b": float("nan")})


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="confidence is 1"):
        bootstrap_interval(np.arange(4.0), confidence=1)

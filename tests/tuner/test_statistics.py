"""Intervals that hold what they say, and verdicts that know a tie."""

from __future__ import annotations

import random

import pytest

from tuner.statistics import Interval, median_interval, noise_floor, paired_ratio, verdict


def interval(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, 0.95, 10)


def test_an_interval_covers_the_true_median_as_often_as_it_says() -> None:
    chance = random.Random(1)
    hits = 0
    for _ in range(600):
        found = median_interval([chance.lognormvariate(0.0, 0.5) for _ in range(15)])
        assert found.coverage >= 0.95
        hits += found.low <= 1.0 <= found.high  # the median of a log-normal with mean 0 is 1
    assert hits / 600 >= 0.93


def test_few_samples_admit_how_little_they_cover() -> None:
    found = median_interval([3.0, 1.0, 2.0])
    assert (found.low, found.median, found.high) == (1.0, 2.0, 3.0)
    assert found.coverage == pytest.approx(0.75)


def test_an_outlier_does_not_widen_a_well_sampled_interval() -> None:
    assert median_interval([1.0] * 20 + [100.0]).high == 1.0


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        median_interval([])


def test_a_ratio_is_taken_in_pairs_so_that_drift_cancels() -> None:
    drift = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0]
    ratio = paired_ratio([2.0 * d for d in drift], drift)
    assert ratio.low == ratio.high == pytest.approx(2.0)
    with pytest.raises(ValueError, match="rounds"):
        paired_ratio([1.0], [1.0, 2.0])


def test_the_noise_floor_is_what_a_thing_differs_from_itself() -> None:
    assert noise_floor([1.0] * 6, [1.0] * 6) == 0.0
    assert noise_floor([1.0, 1.1] * 3, [1.0] * 6) == pytest.approx(0.1)


def test_two_rounds_are_no_verdict() -> None:
    assert verdict(median_interval([5.0, 5.0]), 0.0) == "tie"
    assert verdict(median_interval([5.0, 5.0, 5.0]), 0.0) == "faster"


@pytest.mark.parametrize(
    ("speedup", "noise", "expected"),
    [
        (interval(1.2, 1.4), 0.05, "faster"),
        (interval(1.02, 1.04), 0.05, "tie"),
        (interval(0.9, 1.1), 0.0, "tie"),
        (interval(0.5, 0.6), 0.05, "dense is better"),
        (interval(0.96, 0.98), 0.05, "tie"),
        (interval(2.0, 3.0), 5.0, "tie"),
    ],
)
def test_no_difference_within_the_noise_counts(speedup: Interval, noise: float, expected: str) -> None:
    assert verdict(speedup, noise) == expected

"""Medians, their intervals, and verdicts between two things timed side by side.

No distribution is assumed: run times are skewed and have outliers, so intervals come from order statistics
(the number of samples below the true median is binomial) and ratios are taken round by round, in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

FEWEST = 3
"""Rounds below which no verdict but a tie is given."""

Verdict = Literal["faster", "tie", "dense is better"]


@dataclass(frozen=True)
class Interval:
    """A median with the interval that holds the true median.

    Attributes:
        median: the sample median.
        low: lower end.
        high: upper end.
        coverage: probability that such an interval holds the true median, at most what was asked for where
            the samples are too few for it.
        samples: how many there were.
    """

    median: float
    low: float
    high: float
    coverage: float
    samples: int

    @property
    def relative_width(self) -> float:
        return (self.high - self.low) / self.median if self.median > 0 else math.inf

    def as_dict(self, unit: str = "") -> dict[str, Any]:
        """Plain numbers for a record, six significant digits, with the unit in the names."""
        suffix = f"_{unit}" if unit else ""
        return {
            f"median{suffix}": significant(self.median),
            f"low{suffix}": significant(self.low),
            f"high{suffix}": significant(self.high),
            "coverage": significant(self.coverage, 3),
            "samples": self.samples,
        }


def significant(value: float, digits: int = 6) -> float:
    """`value` rounded to `digits` significant digits, so that records stay readable."""
    return float(f"{value:.{digits}g}")


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> Interval:
    """The narrowest symmetric order-statistics interval of at least `confidence`, else the whole range.

    Six samples are the fewest for which the range itself reaches 95 %. Raises ValueError without samples.
    """
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    ordered, count = sorted(samples), len(samples)
    cut, coverage = 0, _coverage(count, 0)
    while cut + 1 < count // 2 and _coverage(count, cut + 1) >= confidence:
        cut += 1
        coverage = _coverage(count, cut)
    return Interval(median(ordered), ordered[cut], ordered[count - 1 - cut], coverage, count)


def _coverage(count: int, cut: int) -> float:
    """Probability that the true median lies between the order statistics `cut` from either end."""
    tail = sum(math.comb(count, below) for below in range(cut + 1)) / 2**count
    return max(0.0, 1.0 - 2.0 * tail)


def paired_ratio(
    numerator: Sequence[float], denominator: Sequence[float], confidence: float = 0.95
) -> Interval:
    """Interval of numerator / denominator, taken round by round: drift common to a round cancels.

    Raises ValueError where the two have not the same number of rounds.
    """
    if len(numerator) != len(denominator):
        raise ValueError(f"rounds: expected as many of both, got {len(numerator)} and {len(denominator)}")
    return median_interval([a / b for a, b in zip(numerator, denominator, strict=True)], confidence)


def noise_floor(first: Sequence[float], second: Sequence[float]) -> float:
    """The difference that the same thing timed twice shows against itself: a fraction, 0.02 for 2 %."""
    ratio = paired_ratio(first, second)
    return max(abs(ratio.low - 1.0), abs(ratio.high - 1.0))


def verdict(speedup: Interval, noise: float) -> Verdict:
    """What a speedup over dense says: no difference within the noise floor counts, and a tie is an answer."""
    if speedup.samples < FEWEST:
        return "tie"
    if speedup.low > 1.0 + noise:
        return "faster"
    if speedup.high < 1.0 / (1.0 + noise):
        return "dense is better"
    return "tie"

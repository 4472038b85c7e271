"""The finals: the best of a search re-measured side by side, for a verdict that can be published.

A search takes many samples of many candidates, and the luckiest looks fastest: "more candidates are more
lottery tickets". So the finalists, the default and the dense baseline are timed again round by round, the
leader twice: its difference from itself is the noise floor, below which nothing counts as a difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tuner.baselines import CROSSED, Baseline
from tuner.measure import Timer, Work, interleave, sm_clock_of
from tuner.problem import Case, KernelWork, make_case
from tuner.space import Candidate
from tuner.statistics import (
    Interval,
    Verdict,
    median_interval,
    noise_floor,
    paired_ratio,
    significant,
    verdict,
)

DENSE, AGAIN = "dense", "again"
TARGET_WIDTH = 0.01
MAX_ROUNDS = 60
"""So that most gains of 2 % are told from noise: on an H200 at most 25 rounds, to 2 %, left the noise floor
of FLUX's MLP at 2.4 and 1.5 % (2560 and 3584 neurons kept), these at 1.0 and 1.3 %."""


@dataclass(frozen=True)
class Finals:
    """The outcome of the finals.

    Attributes:
        winner: key of the winning candidate.
        times: key → interval in ms; `DENSE` is the baseline.
        speedup: dense over winner.
        noise: what the leader differs from itself, as a fraction.
        verdict: of the winner against dense.
        over_default: default over winner, None where the default could not be timed.
        runner_up: key of the second, None if there was one finalist only.
        over_runner_up: runner-up over winner.
        stopped_by: the rule that ended the rounds.
        clocks: key → median SM clock in MHz while it was sampled, None where the timer does not watch it.
    """

    winner: str
    times: dict[str, Interval]
    speedup: Interval
    noise: float
    verdict: Verdict
    over_default: Interval | None
    runner_up: str | None
    over_runner_up: Interval | None
    stopped_by: str
    clocks: dict[str, float | None] = field(default_factory=dict)


def run_finals(
    case: Case,
    finalists: list[Candidate],
    dense: Baseline,
    timer: Timer,
    max_seconds: float,
    warm_up_s: float = 0.0,
) -> Finals:
    """Time the finalists (leader first, the default among them if it runs), the leader again, and dense."""
    works: dict[str, Work] = {DENSE: dense}
    works |= {
        candidate.key: KernelWork(case, candidate.kernel, candidate.settings) for candidate in finalists
    }
    works[AGAIN] = KernelWork(case, finalists[0].kernel, finalists[0].settings)
    samples, stopped_by = interleave(
        works,
        timer,
        max_rounds=MAX_ROUNDS,
        max_seconds=max_seconds,
        target_width=TARGET_WIDTH,
        warm_up_s=warm_up_s,
    )
    defaults = [candidate.key for candidate in finalists if candidate.is_default]
    clocks = {key: sm_clock_of(timer, work, len(samples[key])) for key, work in works.items()}
    return replace(judge(samples, finalists[0].key, defaults, stopped_by), clocks=clocks)


def judge(
    samples: Mapping[str, list[float]], leader: str, defaults: list[str], stopped_by: str = ""
) -> Finals:
    """The winner from samples taken round by round.

    A default that is not slower than the fastest by more than the noise floor stays: tuned settings are for
    what they gain.
    """
    noise = noise_floor(samples[AGAIN], samples[leader])
    keys = [key for key in samples if key not in (DENSE, AGAIN)]
    ranking = sorted(keys, key=lambda key: median_interval(samples[key]).median)
    default = next((key for key in ranking if key in defaults), None)
    if default is not None and default != ranking[0]:
        gain = paired_ratio(samples[default], samples[ranking[0]])
        if gain.low <= 1.0 + noise:
            ranking.remove(default)
            ranking.insert(0, default)
    winner = ranking[0]
    runner_up = ranking[1] if len(ranking) > 1 else None
    speedup = paired_ratio(samples[DENSE], samples[winner])
    return Finals(
        winner=winner,
        times={key: median_interval(samples[key]) for key in (DENSE, *keys)},
        speedup=speedup,
        noise=noise,
        verdict=verdict(speedup, noise),
        over_default=paired_ratio(samples[default], samples[winner]) if default else None,
        runner_up=runner_up,
        over_runner_up=paired_ratio(samples[runner_up], samples[winner]) if runner_up else None,
        stopped_by=stopped_by,
    )


@dataclass(frozen=True)
class Crossover:
    """Where dense starts to win: time ≈ fixed + slope · density through two measured densities.

    Attributes:
        density: the crossover, from 0 (dense always wins) to 1 (never).
        points: density → time of the sparse operation over that of dense, each taken side by side.
    """

    density: float
    points: dict[float, float]

    def as_dict(self) -> dict[str, Any]:
        """As evidence."""
        return {
            "method": "sparse over dense time = a + b * density through the measured points, met with 1",
            "points": {f"{density:.4g}": significant(ratio, 4) for density, ratio in self.points.items()},
        }


def find_crossover(
    winner: Candidate,
    case: Case,
    dense: Baseline,
    speedup: float,
    seed: int,
    timer: Timer,
    max_seconds: float,
) -> Crossover | None:
    """Measure the winner at one more density, near where dense should overtake it, and dense beside it.

    None for an operation that does not grow with density. `speedup` is that of the finals, at the density of
    the case. A handful of rounds will do: only the ratio counts, and the crossover is a rough one.
    """
    problem = case.problem
    if problem.operation not in CROSSED:
        return None
    density = second_density(problem.density, speedup)
    denser = make_case(replace(problem, density=density), case.device, seed)
    works: dict[str, Work] = {DENSE: dense, "sparse": KernelWork(denser, winner.kernel, winner.settings)}
    samples, _ = interleave(works, timer, min_rounds=3, max_rounds=8, max_seconds=max_seconds)
    points = {problem.density: 1 / speedup, density: paired_ratio(samples["sparse"], samples[DENSE]).median}
    return Crossover(crossing(points), points)


def second_density(density: float, speedup: float) -> float:
    """Where dense would win if time were proportional to density; well away from the first point."""
    if density > 0.7:
        return density / 2
    return min(1.0, max(2 * density, density * speedup))


def crossing(points: Mapping[float, float]) -> float:
    """Where the line through two points (density → sparse over dense) meets 1, within [0, 1]."""
    (d1, r1), (d2, r2) = sorted(points.items())
    slope = (r2 - r1) / (d2 - d1)
    if slope <= 0:  # no growth with density: the sparse one wins everywhere or nowhere
        return 1.0 if min(r1, r2) <= 1.0 else 0.0
    return round(min(1.0, max(0.0, d1 + (1.0 - r1) / slope)), 4)

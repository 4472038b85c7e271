"""The evidence that a profile entry carries: how its numbers came about, in plain values."""

from __future__ import annotations

import datetime
import json
from typing import Any

from tuner.baselines import CROSSED, Baseline
from tuner.bench import Bench
from tuner.finals import DENSE, Crossover, Finals
from tuner.problem import Case
from tuner.search import Progress
from tuner.sources import kernel_hash
from tuner.space import Candidate
from tuner.statistics import significant
from tuner.verify import Check


def evidence(
    bench: Bench,
    case: Case,
    winner: Candidate,
    finals: Finals,
    dense: Baseline,
    progress: Progress,
    check: Check,
    crossover: Crossover | None,
) -> dict[str, Any]:
    """Everything that design and reader ask of an entry: medians, spread, baseline, verdict, correctness,
    how."""
    return {
        "verdict": finals.verdict,
        "time": finals.times[finals.winner].as_dict("ms"),
        "dense_baseline": {"name": dense.name, **finals.times[DENSE].as_dict("ms")},
        "speedup": finals.speedup.as_dict(),
        "noise_floor": significant(finals.noise, 3),
        "ideal": _ideal(bench, case, finals.times[finals.winner].median),
        "over_default": finals.over_default.as_dict() if finals.over_default else None,
        "runner_up": _runner_up(finals),
        "correctness": {
            "error": significant(check.error, 3),
            "budget": significant(check.budget, 3),
            "where": check.where,
            "against": "float64 reference, fresh inputs of two seeds",
        },
        "crossover": crossover.as_dict() if crossover else None,
        "timing": {
            "timer": bench.timer.name,
            "inputs": "normal random values, columns scattered",
            "finals": "interleaved rounds, order rotated and reversed",
            "finals_stopped_by": finals.stopped_by,
            "search_policy": bench.policy.as_dict(),
            **_clocks(finals),
        },
        "search": search_evidence(progress),
        "toolchain": dict(bench.toolchain),
        "kernel_source": kernel_hash(winner.kernel),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def search_evidence(progress: Progress) -> dict[str, Any]:
    """How many candidates were tried, with which outcome, and why not more."""
    return {
        "statuses": progress.statuses(),
        "stopped_by": progress.stopped_by,
        "build_s": significant(progress.build_s(), 4),
    }


def _ideal(bench: Bench, case: Case, winner_ms: float) -> dict[str, Any]:
    """The roofline at the measured ceilings; and what density alone would give, for what computes less."""
    problem, ideal_ms = case.problem, bench.ideal_ms(case.problem, case.options)
    return {
        "ideal_ms": significant(ideal_ms, 4),
        "share": significant(ideal_ms / winner_ms, 3),
        "peak_tflops": significant(bench.ceilings.peak_tflops[problem.dtype], 4),
        "bandwidth_gbs": significant(bench.ceilings.bandwidth_gbs, 4),
        "speedup_by_density": significant(1 / problem.density, 4) if problem.operation in CROSSED else None,
    }


def _clocks(finals: Finals) -> dict[str, Any]:
    """SM clocks in MHz during the finals, where the timer watched them."""
    clocks = {"winner": finals.clocks.get(finals.winner), "dense_baseline": finals.clocks.get(DENSE)}
    known = {name: round(mhz) for name, mhz in clocks.items() if mhz}
    return {"sm_clock_mhz": known} if known else {}


def _runner_up(finals: Finals) -> dict[str, Any] | None:
    if finals.runner_up is None or finals.over_runner_up is None:
        return None
    backend, settings = finals.runner_up.split(" ", 1)
    return {
        "backend": backend,
        "settings": json.loads(settings),
        "time": finals.times[finals.runner_up].as_dict("ms"),
        "slower_by": finals.over_runner_up.as_dict(),
    }

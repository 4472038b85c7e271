"""What bars say of clocks: long kernels timed by themselves, too, and speedups at one clock."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

import pytest

from chipmunk_kernels.problem import Problem
from suites.benchmarks.bars import tasks
from suites.benchmarks.bars.report import Report, speedup_alone, speedup_in_cycles
from suites.benchmarks.bars.tasks import ALONE, LONG_MS, time_alone
from tests.benchmarks.cases import attention, timed
from tuner.hardware import Ceilings
from tuner.measure import CudaTimer
from tuner.statistics import median_interval
from tuner.workload import LabelledProblem


class WarmingTimer(CudaTimer):
    """Samples of 20 ms at 1500 MHz until the clock has settled, after ten of them: then of 30 ms at 1600."""

    def __init__(self) -> None:
        self.name, self.clocks = "scripted", []  # type: list[float]

    def sample(self, work: Any) -> float:
        settled = len(self.clocks) >= 10
        self.clocks.append(1600.0 if settled else 1500.0)
        if not settled:
            time.sleep(0.02)
        return 30.0 if settled else 20.0

    def sm_clock_of(self, work: Any, samples: int) -> float | None:
        return median(self.clocks[-samples:])


class ConstantTimer(CudaTimer):
    """Every sample takes as long, at the same clock or without one."""

    def __init__(self, ms: float, mhz: float | None) -> None:
        self.name, self._ms, self._always = "scripted", ms, mhz

    def sample(self, work: Any) -> float:
        return self._ms

    def sm_clock_of(self, work: Any, samples: int) -> float | None:
        return self._always


class Work:
    def reset(self) -> None: ...

    def call(self) -> None: ...


@pytest.mark.parametrize(
    ("ms", "clock_mhz", "wanted"),
    [(4 * LONG_MS, 1500.0, True), (LONG_MS / 2, 1500.0, False), (4 * LONG_MS, None, False)],
)
def test_only_long_kernels_with_a_clock_are_timed_by_themselves(
    ms: float, clock_mhz: float | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = LabelledProblem("means", Problem("group_mean", 300, 8, 8, dtype="float32", group_size=64))
    monkeypatch.setattr(tasks, "_timer", lambda device: ConstantTimer(ms, clock_mhz))
    tasks._subject.cache_clear()
    try:
        row = tasks.measure(tasks.Task(item, "torch", "cpu", max_seconds=0.05))
    finally:
        tasks._subject.cache_clear()
    assert (row.status, row.clock_mhz, row.dense_clock_mhz) == ("ok", clock_mhz, clock_mhz)
    assert (row.alone is not None, row.alone_clock_mhz is not None) == (wanted, wanted)


def test_a_kernel_is_timed_by_itself_after_its_clock_has_settled() -> None:
    timer = WarmingTimer()
    alone, mhz = time_alone(Work(), timer)
    assert (alone.median, mhz) == (30.0, 1600.0)
    assert len(timer.clocks) > 10 and alone.samples >= ALONE.min_samples


def test_speedups_by_itself_and_at_one_clock() -> None:
    row = timed(attention("a"), "triton", 25.0)
    assert (speedup_alone(row), speedup_in_cycles(row)) == (None, None)
    assert row.dense is not None and row.speedup is not None
    row = replace(
        row, clock_mhz=1500.0, dense_clock_mhz=1450.0, alone=median_interval([20.0]), alone_clock_mhz=1650.0
    )
    assert speedup_alone(row) == pytest.approx(row.dense.median / 20.0)
    assert speedup_in_cycles(row) == pytest.approx(row.speedup.median * 1450 / 1500)
    report = Report([row.item], {}, Ceilings(4000.0, {"float32": 50.0, "bfloat16": 700.0}), "cuda")
    line = report.add(row)
    assert "1500, 1450" in line and "20 ms at 1650 MHz" in line
    plain = report.as_dict()["rows"][0]
    assert plain["alone"]["sm_clock_mhz"] == 1650.0
    assert plain["sm_clock_mhz"] == 1500.0


def test_rows_without_clocks_have_none_in_the_report() -> None:
    row = timed(attention("a"), "triton", 25.0)
    report = Report([row.item], {}, Ceilings(4000.0, {"float32": 50.0, "bfloat16": 700.0}), "cuda")
    assert "MHz" not in report.add(row)
    plain = report.as_dict()["rows"][0]
    assert plain["alone"] is None and plain["speedup_in_cycles"] is None

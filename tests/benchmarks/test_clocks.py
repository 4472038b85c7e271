"""What bars say of clocks: long kernels timed by themselves, too, and speedups at one clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from suites.benchmarks.bars.report import Report, speedup_alone, speedup_in_cycles
from suites.benchmarks.bars.tasks import ALONE, LONG_MS, time_alone
from tests.benchmarks.cases import attention, timed
from tuner.hardware import Ceilings
from tuner.measure import CudaTimer
from tuner.statistics import median_interval


class ScriptedTimer(CudaTimer):
    """Samples of 20 ms at this clock, of a second work of 30 ms and 100 MHz more; or no clock at all."""

    def __init__(self, mhz: float | None) -> None:
        self.name, self._mhz, self.sampled = "scripted", mhz, []  # type: list[Any]

    def sample(self, work: Any) -> float:
        self.sampled.append(work)
        return 20.0 if work is self.sampled[0] else 30.0

    def sm_clock_of(self, work: Any) -> float | None:
        return self._mhz and (self._mhz if work is self.sampled[0] else self._mhz + 100.0)


class Work:
    def reset(self) -> None: ...

    def call(self) -> None: ...


def test_a_long_kernel_is_timed_by_itself_and_a_short_one_is_not() -> None:
    timer, warm_up, work = ScriptedTimer(1500.0), Work(), Work()
    assert time_alone(warm_up, work, timer, LONG_MS / 2) == (None, None)
    assert not timer.sampled
    alone, mhz = time_alone(warm_up, work, timer, 4 * LONG_MS)
    assert alone is not None
    assert (alone.median, mhz) == (30.0, 1600.0)
    assert timer.sampled.index(work) > 1  # after the clock has settled
    assert alone.samples >= ALONE.min_samples


def test_nothing_is_timed_by_itself_where_no_clock_is_watched() -> None:
    timer = ScriptedTimer(None)
    assert time_alone(Work(), Work(), timer, 4 * LONG_MS) == (None, None)
    assert len(timer.sampled) == 1


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

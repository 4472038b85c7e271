"""What `suites.benchmarks.bars` makes of its rows: bars, limits, tables, JSON."""

from __future__ import annotations

import json

import pytest

from chipmunk_kernels.problem import Problem
from suites.benchmarks.bars.tasks import DENSE, Row
from tests.benchmarks.cases import attention, exactly, report, timed
from tuner.workload import Bar, LabelledProblem


def test_a_bar_is_for_its_backend_or_for_the_best() -> None:
    named = attention("a", Bar("speedup", 5.0, "triton"), Bar("speedup", 5.0))
    rows = [timed(named, "triton", 2.5), timed(named, "cupy_hopper", 1.25), timed(named, "torch", 50.0)]
    for_triton, for_the_best = report([named], rows).verdicts()
    assert (for_triton.reached, for_triton.by, for_triton.met) == (4.0, "triton", False)
    assert (for_the_best.reached, for_the_best.by, for_the_best.met) == (8.0, "cupy_hopper", True)


def test_a_bar_on_time_takes_the_shortest_against_the_named_baseline() -> None:
    layer = attention("layer")
    own = attention("own", Bar("time_of_dense", 1.22))
    other = attention("other", Bar("time_of_dense", 0.03, dense="layer"))
    rows = [
        timed(own, "triton", 12.0),
        timed(own, "cupy_hopper", 15.0),
        timed(other, "triton", 0.3, dense_ms=9.0),
        Row(layer, DENSE, dense=exactly(12.0), dense_name="dense"),
    ]
    first, second = report([own, other], rows).verdicts()
    assert (first.reached, first.by, first.met) == (pytest.approx(1.2), "triton", True)
    assert second.reached == pytest.approx(0.3 / 12.0) and second.met
    (unknown,) = report([other], rows[:-1]).verdicts()
    assert unknown.reached is None and not unknown.met


def test_a_share_of_the_copy_is_of_one_that_moves_as_much() -> None:
    problem = Problem("gather_columns", rows=128, columns=1000, width=100, density=0.1)
    item = LabelledProblem("g", problem, bars=(Bar("share_of_copy", 0.8),))
    # 100 columns read, 100 written, of 200 bytes each, and 100 indices of 4: 40400 bytes, at 100 GB/s
    # by the large copy, at 50 by one of that size.
    ms, copied = 40400 / 40e6, {"copy": exactly(40400 / 50e6), "share_of_copy": exactly(0.8)}
    made = report([item], [timed(item, "cupy", ms, **copied)])
    (verdict,) = made.verdicts()
    assert verdict.reached == pytest.approx(0.8) and verdict.met
    assert "80 %, 40 %" in made.text() and "same size, large" in made.text()
    (row,) = made.as_dict()["rows"]
    assert row["share_of_same_size_copy"]["median"] == pytest.approx(0.8)
    assert row["same_size_copy"]["median_ms"] == pytest.approx(40400 / 50e6, rel=1e-3)
    assert row["share_of_large_copy"] == pytest.approx(0.4)
    (slow,) = report([item], [timed(item, "cupy", ms, share_of_copy=exactly(0.79))]).verdicts()
    assert slow.reached == pytest.approx(0.79) and not slow.met


def test_a_bar_may_be_reached_on_another_problem() -> None:
    item = attention("by 128", Bar("speedup", 5.0, also=("by 192",)))
    other, stranger = attention("by 192", group_size=192), attention("stranger")
    rows = [timed(item, "triton", 2.5), timed(other, "cupy_hopper", 1.25), timed(stranger, "triton", 1.1)]
    made = report([item, other, stranger], rows)
    (verdict,) = made.verdicts()
    assert (verdict.reached, verdict.by, verdict.problem) == (8.0, "cupy_hopper", "by 192") and verdict.met
    assert "by 192" in verdict.asked and made.text().count("by 192") == 3
    (own,) = report([item, other], rows[:1]).verdicts()
    assert (own.reached, own.by, own.problem, own.met) == (4.0, "triton", "by 128", False)


def test_nothing_faster_than_the_roofline_meets_a_bar() -> None:
    item = attention("a", Bar("speedup", 5.0))
    floor_ms = 4 * 1000 * 100 * 100 / 1e12 * 1e3  # at 1 TF/s
    made = report([item], [timed(item, "triton", floor_ms / 2)])
    (verdict,) = made.verdicts()
    assert not verdict.met and verdict.reached is None
    assert "impossible" in made.text()
    assert made.floor_share(made.rows[0]) == pytest.approx(2.0)


def test_limits_bind_the_worst_kernel_of_each_backend() -> None:
    item, other = attention("a"), attention("b")
    rows = [
        timed(item, "triton", 1.0, extra_mib=3.0, launch_us=80.0),
        timed(other, "cupy_hopper", 1.0, extra_mib=2.0, launch_us=8.0),
        timed(item, "cupy_hopper", 1.0, extra_mib=65.0, launch_us=9.0),
        timed(item, "cupy", 1.0, extra_mib=1.0, launch_us=16.0),
        timed(item, "torch", 1.0, extra_mib=900.0, launch_us=900.0),
    ]
    found = report([item, other], rows, extra_mib=64.0, launch_us=15.0).verdicts()
    assert [(each.asked, each.by, each.reached, each.met) for each in found] == [
        ("extra_mib at most 64", "triton", 3.0, True),
        ("extra_mib at most 64", "cupy", 1.0, True),
        ("extra_mib at most 64", "cupy_hopper", 65.0, False),
        ("launch_us at most 15", "cupy", 16.0, False),
        ("launch_us at most 15", "cupy_hopper", 9.0, True),
    ]
    assert {each.problem for each in found} == {"a"}


def test_a_launch_of_torchs_own_shows_how_fast_the_host_was() -> None:
    item = attention("a")
    rows = [
        timed(item, "cupy", 1.0, launch_us=12.0, torch_launch_us=4.04),
        timed(item, "triton", 1.0, launch_us=80.0, torch_launch_us=8.1),
        timed(item, "torch", 1.0),
    ]
    made = report([item], rows)
    assert "a launch of torch's own add: 4.0 to 8.1 us beside these rows" in made.text()
    assert [row["torch_launch_us"] for row in made.as_dict()["rows"]] == [4.04, 8.1, None]
    assert "own add" not in report([item], rows[2:]).text()


def test_every_reason_is_told_once() -> None:
    items = [attention("a", Bar("speedup", 2.0)), attention("b")]
    made = report([], [])
    lines = [made.add(Row(item, "cupy", "missing", "no cupy here")) for item in items]
    assert lines == ["a | cupy: missing: no cupy here", ""]
    made.add(Row(items[0], "triton", "crashed", "SIGSEGV"))
    made.add(timed(items[1], "torch", 1.0, dense_failed={"FlexAttention": "no compiler"}))
    text = made.text()
    assert "cupy: no cupy here (2 problems)" in text and "triton: SIGSEGV (a)" in text
    assert "FlexAttention left out of the baselines: no compiler (b)" in text
    assert "crashed" in text  # a row of its own in the table
    made.items = items
    (verdict,) = made.verdicts()
    assert not verdict.met and "triton: SIGSEGV" in verdict.by
    document = json.loads(json.dumps(made.as_dict()))
    assert [row["status"] for row in document["rows"]] == ["missing", "missing", "crashed", "ok"]

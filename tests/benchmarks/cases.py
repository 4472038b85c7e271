"""Problems and rows as `suites.benchmarks.bars` makes them, with times that a test chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from chipmunk_kernels.problem import Problem
from suites.benchmarks.bars.report import Report
from suites.benchmarks.bars.tasks import Row
from tuner.hardware import Ceilings
from tuner.statistics import Interval
from tuner.verify import Check
from tuner.workload import Bar, LabelledProblem

RIGHT = Check(0.0, 1.0, "everywhere")


def attention(label: str, *bars: Bar, **fields: Any) -> LabelledProblem:
    shape = {"rows": 1000, "columns": 1000, "width": 100, "density": 0.1, **fields}
    return LabelledProblem(label, Problem("sparse_attention", **shape), bars=bars)


def exactly(value: float) -> Interval:
    return Interval(value, value, value, 0.95, 6)


def timed(item: LabelledProblem, backend: str, ms: float, dense_ms: float = 10.0, **fields: Any) -> Row:
    row = Row(item, backend, time=exactly(ms), dense=exactly(dense_ms), dense_name="dense", check=RIGHT)
    return dataclasses.replace(row, speedup=exactly(dense_ms / ms), **fields)


def report(items: Sequence[LabelledProblem], rows: Sequence[Row], **limits: float) -> Report:
    made = Report(items, limits, Ceilings(100.0, {"bfloat16": 1.0, "float32": 1.0}), "cuda")
    for row in rows:
        made.add(row)
    return made

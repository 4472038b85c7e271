"""Choosing columns by score, beside torch.topk."""

from __future__ import annotations

from typing import Any

import pytest

from suites.benchmarks.bench import CLOCK, Bench, Choice

OPERATIONS = ("topk_columns",)
pytestmark = pytest.mark.benchmark(timer=CLOCK.seconds)


def test_baseline(benchmark: Any, bench: Bench) -> None:
    bench.time_baseline(benchmark)


def test_select(benchmark: Any, bench: Bench, choice: Choice) -> None:
    bench.time_operation(benchmark, choice)

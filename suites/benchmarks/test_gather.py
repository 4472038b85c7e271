"""Packing selected columns and writing them back, each beside PyTorch's gather and scatter."""

from __future__ import annotations

from typing import Any

import pytest

from suites.benchmarks.bench import CLOCK, Bench, Choice

OPERATIONS = ("gather_columns", "scatter_columns")
pytestmark = pytest.mark.benchmark(timer=CLOCK.seconds)


def test_baseline(benchmark: Any, bench: Bench) -> None:
    bench.time_baseline(benchmark)


def test_gather(benchmark: Any, bench: Bench, choice: Choice) -> None:
    bench.time_operation(benchmark, choice)

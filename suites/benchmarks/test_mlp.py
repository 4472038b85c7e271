"""The column-sparse MLP and its change estimate, each beside the dense PyTorch computation."""

from __future__ import annotations

from typing import Any

import pytest

from suites.benchmarks.bench import CLOCK, Bench, Choice

OPERATIONS = ("sparse_mlp", "group_mean")
pytestmark = pytest.mark.benchmark(timer=CLOCK.seconds)


def test_baseline(benchmark: Any, bench: Bench) -> None:
    bench.time_baseline(benchmark)


def test_mlp(benchmark: Any, bench: Bench, choice: Choice) -> None:
    bench.time_operation(benchmark, choice)

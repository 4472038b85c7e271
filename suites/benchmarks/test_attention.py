"""Attention: dense, with column mass, and column-sparse, each beside PyTorch's dense attention."""

from __future__ import annotations

from typing import Any

import pytest

from suites.benchmarks.bench import CLOCK, Bench, Choice

OPERATIONS = ("dense_attention", "colsum_attention", "sparse_attention")
pytestmark = pytest.mark.benchmark(timer=CLOCK.seconds)


def test_baseline(benchmark: Any, bench: Bench) -> None:
    bench.time_baseline(benchmark)


def test_attention(benchmark: Any, bench: Bench, choice: Choice) -> None:
    bench.time_operation(benchmark, choice)

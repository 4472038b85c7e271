"""The speeds that the CPU backend promises, against PyTorch in the same run.

Dense and sparse run in turn, and their quickest runs are compared: what else the machine does only ever
adds time. First by the clock on two threads. Where other processes hold the cores, the threads of a
product wait for each other and the many small products of the sparse side suffer most; so a bar that is
missed is measured again as the processor time of one thread, which that leaves alone. A real regression
misses both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from chipmunk_kernels import ColumnSet, sparse_attention, sparse_mlp
from chipmunk_kernels.backends.torch.products import product_dtype
from tests.factories import attention_inputs, mlp_inputs, randn, scattered_columns

ROUNDS = 3

WITHOUT_16_BIT_PRODUCTS = product_dtype(torch.bfloat16, "cpu") == torch.float32
"""Bars are lower there (9.1 and 3.6 to 4.2 times were measured on two AVX2 cores, by groups of 192): dense
attention is nearly at the peak of float32 products already."""

pytestmark = [
    pytest.mark.alone,
    pytest.mark.slow,
    pytest.mark.skipif(
        not WITHOUT_16_BIT_PRODUCTS
        and (not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()),
        reason="the bars are for CPUs with AVX-512 bfloat16 products but no AMX, or without 16-bit products",
    ),
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def speedup(threads: int, clock: Callable[[], float], *calls: Callable[[], object]) -> float:
    """Best time of the first call over that of the second."""
    torch.set_num_threads(threads)
    calls[1]()
    best = [math.inf, math.inf]
    for _ in range(ROUNDS):
        for i, call in enumerate(calls):
            start = clock()
            call()
            best[i] = min(best[i], clock() - start)
    return best[0] / best[1]


def assert_at_least(bar: float, dense: Callable[[], object], sparse: Callable[[], object]) -> None:
    by_clock = speedup(2, time.perf_counter, dense, sparse)
    if by_clock < bar:
        of_one_thread = speedup(1, time.thread_time, dense, sparse)
        assert of_one_thread >= bar, (
            f"expected {bar} times the dense speed, got {by_clock:.2f} by the clock on two threads and "
            f"{of_one_thread:.2f} in processor time on one"
        )


@pytest.mark.parametrize(
    ("density", "bar"),
    [(0.07, 7.0), (0.165, 3.0)] if WITHOUT_16_BIT_PRODUCTS else [(0.07, 8.0), (0.165, 4.0)],
)
@pytest.mark.parametrize("ragged", [False, True])
def test_sparse_attention(density: float, bar: float, ragged: bool) -> None:
    """N 4352, 8 heads, D 128, bfloat16, base added, against `F.scaled_dot_product_attention`."""
    size = 192 if WITHOUT_16_BIT_PRODUCTS else 128
    q, k, v = attention_inputs(1, 8, 4352, 4352, 128, dtype=torch.bfloat16, strided=True)
    base = randn(*q.shape, dtype=torch.bfloat16, seed=3)
    columns = scattered_columns(1, 8, 4352, 4352, size, density, uniform=True)
    if ragged:
        # Half the groups keep a fifth less and half a fifth more: the same work, unevenly spread.
        columns = scattered_columns(1, 8, 4352, 4352, size, density * 1.2, uniform=True)
        fewer = torch.arange(columns.groups, dtype=torch.int32) % 2 == 0
        counts = torch.where(fewer, columns.counts * 2 // 3, columns.counts)
        columns = ColumnSet(columns.indices, counts, size)
    assert columns.density(4352) == pytest.approx(density, rel=0.01)
    assert_at_least(
        bar,
        lambda: F.scaled_dot_product_attention(q, k, v),
        lambda: sparse_attention(q, k, v, columns, base=base, backend="torch"),
    )


def test_sparse_mlp() -> None:
    """1024 tokens, 3072 → 12288 → 3072, 30 % of the neurons kept, against the same MLP dense."""
    # Without 16-bit products PyTorch takes minutes for the dense one in bfloat16.
    dtype, bar = (torch.float32, 1.8) if WITHOUT_16_BIT_PRODUCTS else (torch.bfloat16, 2.2)
    m = mlp_inputs(1, 1024, 3072, 12288, 3072, 128, 0.3, uniform=True, dtype=dtype)
    w2 = m.w2_by_neuron.t().contiguous()

    def dense() -> torch.Tensor:
        return F.linear(F.gelu(F.linear(m.x, m.w1, m.b1), approximate="tanh"), w2)

    caches = (m.activation_cache, m.output_cache)
    assert_at_least(
        bar,
        dense,
        lambda: sparse_mlp(m.x, m.w1, m.b1, m.w2_by_neuron, m.columns, *caches, backend="torch"),
    )

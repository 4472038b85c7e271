"""The speeds that the CPU backend promises, against PyTorch in the same run.

A bar that is missed is measured again: on a busy machine one measurement says little, and a real regression
misses every time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from chipmunk_kernels import ColumnSet, sparse_attention, sparse_mlp
from tests.factories import attention_inputs, mlp_inputs, randn, scattered_columns

ATTEMPTS, REPEATS = 4, 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        reason="this CPU has no bfloat16 instructions; the bars are for one that has",
    ),
]


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """The bars hold for two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def speedup(dense: Callable[[], object], sparse: Callable[[], object]) -> float:
    """Median time of `dense` over that of `sparse`, the two interleaved."""
    times: dict[Callable[[], object], list[float]] = {dense: [], sparse: []}
    sparse()
    for _ in range(REPEATS):
        for call, record in times.items():
            start = time.perf_counter()
            call()
            record.append(time.perf_counter() - start)
    return statistics.median(times[dense]) / statistics.median(times[sparse])


def assert_at_least(bar: float, dense: Callable[[], object], sparse: Callable[[], object]) -> None:
    seen: list[float] = []
    while len(seen) < ATTEMPTS:
        seen.append(speedup(dense, sparse))
        if seen[-1] >= bar:
            return
    pytest.fail(f"expected {bar} times the dense speed, got {', '.join(f'{x:.2f}' for x in seen)}")


@pytest.mark.parametrize(("density", "bar"), [(0.07, 8.0), (0.165, 4.0)])
@pytest.mark.parametrize("ragged", [False, True])
def test_sparse_attention(density: float, bar: float, ragged: bool) -> None:
    """N 4352, 8 heads, D 128, bfloat16, base added, against `F.scaled_dot_product_attention`."""
    q, k, v = attention_inputs(1, 8, 4352, 4352, 128, dtype=torch.bfloat16, strided=True)
    base = randn(*q.shape, dtype=torch.bfloat16, seed=3)
    columns = scattered_columns(1, 8, 4352, 4352, 128, density, uniform=True)
    if ragged:
        # Half the groups keep a fifth less and half a fifth more: the same work, unevenly spread.
        columns = scattered_columns(1, 8, 4352, 4352, 128, density * 1.2, uniform=True)
        fewer = torch.arange(columns.groups, dtype=torch.int32) % 2 == 0
        counts = torch.where(fewer, columns.counts * 2 // 3, columns.counts)
        columns = ColumnSet(columns.indices, counts, 128)
    assert columns.density(4352) == pytest.approx(density, rel=0.01)
    assert_at_least(
        bar,
        lambda: F.scaled_dot_product_attention(q, k, v),
        lambda: sparse_attention(q, k, v, columns, base=base, backend="torch"),
    )


def test_sparse_mlp() -> None:
    """1024 tokens, 3072 → 12288 → 3072, 30 % of the neurons kept, against the same MLP dense."""
    m = mlp_inputs(1, 1024, 3072, 12288, 3072, 128, 0.3, uniform=True, dtype=torch.bfloat16)
    w2 = m.w2_by_neuron.t().contiguous()

    def dense() -> torch.Tensor:
        return F.linear(F.gelu(F.linear(m.x, m.w1, m.b1), approximate="tanh"), w2)

    caches = (m.activation_cache, m.output_cache)
    assert_at_least(
        2.2,
        dense,
        lambda: sparse_mlp(m.x, m.w1, m.b1, m.w2_by_neuron, m.columns, *caches, backend="torch"),
    )

"""What a call allocates besides its results stays within bounds, however long the sequence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chipmunk_kernels import ColumnSet, colsum_attention, dense_attention, sparse_attention, topk_columns
from chipmunk_kernels.backends.torch import attention
from tests.factories import attention_inputs, scattered_columns

ROOT = Path(__file__).resolve().parents[2]

PEAK = """
import resource, torch
torch.set_num_threads(1)
from chipmunk_kernels import ColumnSet, colsum_attention, dense_attention, sparse_attention, topk_columns
n, d, rows = 120_000, 16, 256
q = torch.randn(1, 1, rows, d).bfloat16()
k, v = torch.randn(1, 1, n, d).bfloat16(), torch.randn(1, 1, n, d).bfloat16()
scores = torch.rand(1, 1, 300, n)
full = ColumnSet.full(1, 1, rows, n, 128)
lse = torch.zeros(1, 1, rows)
sparse_attention(q, k[:, :, :200], v[:, :, :200], ColumnSet.full(1, 1, rows, 200, 128))  # libraries loaded
calls = {
    "dense": lambda: dense_attention(q, k, v),
    "colsum": lambda: colsum_attention(q, k, v, lse, 128),
    "sparse": lambda: sparse_attention(q, k, v, full),
    "topk": lambda: topk_columns(scores, 2000, group_size=128, random=100),
}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, call in calls.items():
    call()
    print(name, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_a_long_sequence_stays_within_half_a_gibibyte() -> None:
    """At N = 120 000, where one group's logits alone take 60 MB in float32, and a head's 58 GB.

    The width costs time only, minutes where a CPU has no bfloat16 products.
    """
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    grown = {name: int(mib) for name, mib in (line.split() for line in done.stdout.splitlines())}
    assert len(grown) == 4 and max(grown.values()) <= 512, f"peak memory in MiB, beyond the inputs: {grown}"


def largest_allocation(call: object) -> int:
    """Bytes of the largest block that PyTorch's CPU allocator handed out during the call."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()  # type: ignore[operator]
    return max(event.cpu_memory_usage for event in profile.events())


def test_strided_inputs_are_not_copied() -> None:
    """No allocation is as large as one of the inputs; the results are smaller by construction."""
    batch, heads, columns = 2, 8, 4000
    q, k, v = attention_inputs(batch, heads, 64, columns, 64, dtype=torch.bfloat16, strided=True)
    assert not k.is_contiguous()
    chosen = scattered_columns(batch, heads, 64, columns, 64, 0.05, uniform=True)
    lse = torch.zeros(batch, heads, 64)
    for call in (
        lambda: sparse_attention(q, k, v, chosen, backend="torch"),
        lambda: dense_attention(q, k, v, backend="torch", settings=attention.DenseSettings(scratch_mib=2)),
        lambda: colsum_attention(
            q, k, v, lse, 64, backend="torch", settings=attention.ColsumSettings(scratch_mib=2)
        ),
    ):
        assert largest_allocation(call) < k.nbytes


def test_column_lists_take_the_kept_slots_only() -> None:
    columns = topk_columns(torch.rand(1, 2, 3, 5000), 100, group_size=64, keep=[(0, 20)])
    assert isinstance(columns, ColumnSet) and columns.nbytes == 4 * 2 * 3 * (120 + 1)

"""The Triton attention kernels on a real GPU: real tiles, real shapes, streams, graphs and devices.

Their twins without a GPU are the interpreter tests beside this file (logic) and tests/compile_only (code).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import chipmunk_kernels as ck
from chipmunk_kernels.backends.triton.colsum_attention import ColsumAttentionSettings, colsum_attention
from chipmunk_kernels.backends.triton.dense_attention import DenseAttentionSettings, dense_attention
from chipmunk_kernels.backends.triton.sparse_attention import SparseAttentionSettings, sparse_attention
from chipmunk_kernels.columns import ColumnSet
from suites.benchmarks.bars.costs import launch_cost
from tests.factories import attention_inputs, randn, scattered_columns
from tests.triton_attention.cases import check_sparse, fused_qkv, run
from tests.triton_attention.test_dense import check_colsum, check_dense

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
HALVES = (torch.float16, torch.bfloat16)
FEW_WARPS = SparseAttentionSettings(num_warps=4, num_stages=3, max_registers=0)
WIDE = SparseAttentionSettings(block_n=128, num_stages=3, max_registers=0, peel_tail=True, overlap=True)
"""All of a Hopper multiprocessor's shared memory for one program; the fastest for videos on an H200."""

Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def rounded_lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Normalisers a little off, as an earlier step's are."""
    return (q.float() @ k.float().transpose(-1, -2) * scale).logsumexp(-1) + 0.25


def calls(q: Tensor, group_size: int = 128) -> dict[str, Call]:
    """Each operation through its public operator, as a function of q, k and v alone."""
    batch, heads, rows, _ = q.shape
    columns = scattered_columns(batch, heads, rows, rows, group_size, 0.165, device=q.device)
    base = randn(*q.shape, dtype=q.dtype, device=q.device, seed=3)
    prev = randn(*q.shape[:3], device=q.device, seed=4) + 8.0

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out = ck.sparse_attention(q, k, v, columns, base=base, return_lse=True, backend="triton")
        assert isinstance(out, tuple)
        return out

    return {
        "dense": lambda q, k, v: ck.dense_attention(q, k, v, backend="triton"),
        "colsum": lambda q, k, v: ck.colsum_attention(q, k, v, prev, group_size, backend="triton"),
        "sparse": sparse,
    }


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("group_size", [64, 128, 192, 256])
def test_sparse_over_sizes(group_size: int, width: int, dtype: torch.dtype) -> None:
    """Every ragged size and batch in the default settings, transposed views included."""
    for rows, (batch, strided) in itertools.product((1, 63, 64, 191, 193), ((1, False), (3, True))):
        q, k, v = attention_inputs(
            batch, 2, rows, rows + 90, width, dtype=dtype, device=CUDA, strided=strided, seed=rows
        )
        columns = scattered_columns(batch, 2, rows, rows + 90, group_size, device=CUDA, seed=rows)
        base = randn(batch, 2, rows, width, dtype=dtype, device=CUDA, seed=7)
        got = run(sparse_attention, q, k, v, columns, base, -1, 0.1, SparseAttentionSettings())
        check_sparse(got, q, k, v, columns, base, -1, 0.1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_dense_over_sizes(width: int, dtype: torch.dtype) -> None:
    for rows, batch in itertools.product((1, 63, 64, 191, 193), (1, 3)):
        q, k, v = attention_inputs(batch, 2, rows, width=width, dtype=dtype, device=CUDA, seed=rows)
        length = torch.tensor([rows, 0, rows // 2][:batch], dtype=torch.int32, device=CUDA)
        for key_length in (None, length):
            got = run(dense_attention, q, k, v, key_length, 0.1, DenseAttentionSettings())
            check_dense(got, q, k, v, key_length, 0.1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("group_size", [64, 128, 192, 256])
def test_colsum_over_sizes(group_size: int, width: int, dtype: torch.dtype) -> None:
    for rows, batch in itertools.product((1, 63, 64, 191, 193, 300), (1, 3)):
        q, k, v = attention_inputs(batch, 2, rows, rows + 9, width, dtype=dtype, device=CUDA, seed=rows)
        prev = rounded_lse(q, k, 0.1)
        got = run(colsum_attention, q, k, v, prev, group_size, None, 0.1, ColsumAttentionSettings())
        check_colsum(got, q, k, v, prev, group_size, None, 0.1)


@pytest.mark.parametrize(
    "settings", [SparseAttentionSettings(), FEW_WARPS, WIDE], ids=["default", "4 warps", "wide"]
)
@pytest.mark.parametrize("rows", [4352, 4480])
@pytest.mark.parametrize("group_size", [128, 192])
def test_flux_sized(group_size: int, rows: int, settings: SparseAttentionSettings) -> None:
    """Two heads of a FLUX layer, at its density, with an empty and a full group among the others."""
    q, k, v = attention_inputs(1, 2, rows, width=128, dtype=torch.bfloat16, device=CUDA, strided=True)
    columns = scattered_columns(1, 2, rows, rows, group_size, 0.165, device=CUDA)
    base = randn(1, 2, rows, 128, dtype=torch.bfloat16, device=CUDA, seed=7)
    got = run(sparse_attention, q, k, v, columns, base, 1, 128**-0.5, settings)
    check_sparse(got, q, k, v, columns, base, 1, 128**-0.5)
    prev = rounded_lse(q, k, 128**-0.5)
    for summing in (ColsumAttentionSettings(), ColsumAttentionSettings(mass_keys=128, mass_warps=8)):
        got_mass = run(colsum_attention, q, k, v, prev, group_size, None, 128**-0.5, summing)
        check_colsum(got_mass, q, k, v, prev, group_size, None, 128**-0.5)


SETTINGS = [
    SparseAttentionSettings(block_m, block_n, warps, stages, registers, peel, overlap)
    for block_m, block_n, warps, stages, registers, peel, overlap in (
        (256, 64, 8, 3, 0, True, False),
        (256, 32, 8, 4, 0, False, True),
        (128, 64, 8, 3, 128, True, False),
        (128, 64, 4, 2, 0, False, False),
        (128, 128, 8, 3, 0, True, True),
        (128, 128, 8, 2, 0, False, True),
        (64, 64, 4, 5, 0, True, True),
        (64, 32, 4, 3, 128, False, False),
        (64, 128, 4, 2, 0, True, False),
    )
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.as_dict().values())))
def test_sparse_settings(settings: SparseAttentionSettings) -> None:
    """Corners of the search space compute the same thing."""
    q, k, v = attention_inputs(1, 2, 700, width=128, dtype=torch.bfloat16, device=CUDA)
    columns = scattered_columns(1, 2, 700, 700, 192, device=CUDA)
    got = run(sparse_attention, q, k, v, columns, None, 1, 0.1, settings)
    check_sparse(got, q, k, v, columns, None, 1, 0.1)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "in order"])
@pytest.mark.parametrize("operation", ["dense", "colsum"])
def test_both_orders(operation: str, overlap: bool) -> None:
    """Products in order and one tile late compute the same thing, over one tile of columns and over many."""
    for columns in (40, 64, 65, 700):
        q, k, v = attention_inputs(1, 2, 300, columns, 128, dtype=torch.bfloat16, device=CUDA, seed=columns)
        if operation == "dense":
            dense = DenseAttentionSettings(overlap=overlap)
            check_dense(run(dense_attention, q, k, v, None, 0.1, dense), q, k, v, None, 0.1)
        else:
            prev, summing = rounded_lse(q, k, 0.1), ColsumAttentionSettings(overlap=overlap)
            got = run(colsum_attention, q, k, v, prev, 192, None, 0.1, summing)
            check_colsum(got, q, k, v, prev, 192, None, 0.1)


@pytest.mark.parametrize("count", [0, 1, 37, 64, 65, 321])
def test_any_count(count: int) -> None:
    q, k, v = attention_inputs(1, 1, 128, 321, 128, dtype=torch.bfloat16, device=CUDA)
    kept = torch.randperm(321)[:count].tolist()
    columns = ColumnSet.from_lists([[[kept]]], 128, CUDA)
    got = run(sparse_attention, q, k, v, columns, None, 1, 0.1, SparseAttentionSettings())
    check_sparse(got, q, k, v, columns, None, 1, 0.1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_large_logits_stay_finite(dtype: torch.dtype) -> None:
    """Logits to ±200, against normalisers of the same size."""
    q, k, v = attention_inputs(1, 2, 300, width=128, dtype=dtype, device=CUDA)
    scale = 200.0 / float((q.float() @ k.float().transpose(-1, -2)).abs().max())
    columns = scattered_columns(1, 2, 300, 300, 128, device=CUDA)
    check_dense(run(dense_attention, q, k, v, None, scale, DenseAttentionSettings()), q, k, v, None, scale)
    prev = rounded_lse(q, k, scale)
    got = run(colsum_attention, q, k, v, prev, 128, None, scale, ColsumAttentionSettings())
    check_colsum(got, q, k, v, prev, 128, None, scale)
    sparse = run(sparse_attention, q, k, v, columns, None, 1, scale, SparseAttentionSettings())
    assert bool(sparse[0].isfinite().all())
    check_sparse(sparse, q, k, v, columns, None, 1, scale)


def test_slices_of_a_fused_projection() -> None:
    q, k, v = fused_qkv(2, 3, 333, 128, torch.bfloat16)
    columns = scattered_columns(2, 3, 333, 333, 128, device=CUDA)
    out, lse = run(sparse_attention, q, k, v, columns, None, 1, 0.1, SparseAttentionSettings())
    check_sparse((out, lse), q, k, v, columns, None, 1, 0.1)
    check_dense(run(dense_attention, q, k, v, None, 0.1, DenseAttentionSettings()), q, k, v, None, 0.1)


@pytest.mark.parametrize("name", ["dense", "colsum", "sparse"])
def test_same_bits_every_time(name: str) -> None:
    q, k, v = attention_inputs(1, 4, 4352, width=128, dtype=torch.bfloat16, device=CUDA)
    call = calls(q, 192)[name]
    first = call(q, k, v)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, call(q, k, v), strict=True))


@pytest.mark.parametrize("name", ["dense", "colsum", "sparse"])
def test_runs_on_the_current_stream(name: str) -> None:
    """The queries become valid late, on a side stream: a kernel on any other stream would read NaN."""
    q, k, v = attention_inputs(1, 2, 700, width=128, dtype=torch.bfloat16, device=CUDA)
    call = calls(q)[name]
    expected = call(q, k, v)
    late = torch.full_like(q, torch.nan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(q)
        got = call(late, k, v)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["dense", "colsum", "sparse"])
def test_graph_replay_equals_eager(name: str) -> None:
    """Captured once, replayed on new inputs in the same memory: the bits of an eager call."""
    q, k, v = attention_inputs(1, 2, 700, width=128, dtype=torch.bfloat16, device=CUDA)
    call = calls(q)[name]
    call(q, k, v)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(q, k, v)
    for seed in (1, 2):
        fresh = attention_inputs(1, 2, 700, width=128, dtype=torch.bfloat16, device=CUDA, seed=seed)
        for target, values in zip((q, k, v), fresh, strict=True):
            target.copy_(values)
        for output in captured:
            output.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, call(*fresh), strict=True))


def test_never_waits_for_the_device() -> None:
    """With a key length on the device, and an empty group: nothing is read back to the host."""
    q, k, v = attention_inputs(2, 2, 300, width=128, dtype=torch.bfloat16, device=CUDA)
    lengths = torch.tensor([300, 17], dtype=torch.int32, device=CUDA)
    operators = calls(q)
    ck.dense_attention(q, k, v, key_length=lengths, backend="triton")
    for call in operators.values():
        call(q, k, v)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ck.dense_attention(q, k, v, key_length=lengths, backend="triton")
        for call in operators.values():
            call(q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["dense", "colsum", "sparse"])
def test_runs_where_its_inputs_are(name: str) -> None:
    """Inputs on the second device, the first one current."""
    q, k, v = attention_inputs(1, 2, 300, width=128, dtype=torch.bfloat16, device="cuda:1")
    got = calls(q)[name](q, k, v)
    here = [x.to("cuda:0") for x in (q, k, v)]
    expected = calls(here[0])[name](*here)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True))


def test_launch_costs_little() -> None:
    """Python spends well under a millisecond on a call (about 50 µs): a 57-layer step makes hundreds."""
    q, k, v = attention_inputs(1, 1, 128, width=64, dtype=torch.bfloat16, device=CUDA)
    columns = scattered_columns(1, 1, 128, 128, 128, uniform=True, device=CUDA)
    settings = SparseAttentionSettings()
    sparse_attention(q, k, v, columns, None, 1, 0.1, settings)
    cost = launch_cost(lambda: sparse_attention(q, k, v, columns, None, 1, 0.1, settings), q.device)
    assert cost.us < 500, cost

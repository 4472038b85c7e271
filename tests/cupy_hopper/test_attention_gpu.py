"""The Hopper column-sparse attention kernel on a GPU; test_attention.py has its twins without one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import chipmunk_kernels as ck
from chipmunk_kernels import registry
from chipmunk_kernels.backends.cupy_hopper.sparse_attention import SparseAttentionSettings, sparse_attention
from chipmunk_kernels.columns import ColumnSet
from suites.benchmarks.bars.costs import launch_cost
from tests.factories import attention_inputs, randn, scattered_columns
from tests.triton_attention.cases import check_sparse, fused_qkv, run
from tests.triton_mlp.cases import on_side_stream

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda:0")
BF16 = torch.bfloat16
HALVES = (torch.float16, torch.bfloat16)
SETTINGS = (
    SparseAttentionSettings(),
    SparseAttentionSettings(3, 80, 3, ping_pong=True),
    SparseAttentionSettings(3, 128, 2, overlap=False),
    SparseAttentionSettings(2, 176, 2, ping_pong=True),
    SparseAttentionSettings(2, 128, 3),
    SparseAttentionSettings(1, 64, 2, blocks=2),
)


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    pytest.importorskip("cupy")
    reason = registry.unavailable("cupy_hopper", GPU)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("group_size", [64, 128, 192, 256])
def test_over_sizes(group_size: int, width: int, dtype: torch.dtype) -> None:
    """Every ragged size and batch in the default settings, transposed views included."""
    for rows, batch in itertools.product((1, 63, 64, 191, 193), (1, 2, 3)):
        q, k, v = attention_inputs(
            batch, 2, rows, rows + 90, width, dtype=dtype, device=GPU, strided=batch > 1, seed=rows
        )
        columns = scattered_columns(batch, 2, rows, rows + 90, group_size, device=GPU, seed=rows)
        base = randn(batch, 2, rows, width, dtype=dtype, device=GPU, seed=7) if batch > 1 else None
        got = run(sparse_attention, q, k, v, columns, base, -1, 0.1, SparseAttentionSettings())
        check_sparse(got, q, k, v, columns, base, -1, 0.1)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.as_dict().values())))
@pytest.mark.parametrize("rows", [4352, 4480])
def test_flux_sized(rows: int, settings: SparseAttentionSettings) -> None:
    """Two heads of a FLUX layer, at its density, with an empty and a full group among the others."""
    group_size = 192 if settings.consumers != 2 else 128
    q, k, v = attention_inputs(1, 2, rows, width=128, dtype=BF16, device=GPU, strided=True)
    columns = scattered_columns(1, 2, rows, rows, group_size, 0.165, device=GPU)
    base = randn(1, 2, rows, 128, dtype=BF16, device=GPU, seed=7)
    got = run(sparse_attention, q, k, v, columns, base, 1, 128**-0.5, settings)
    check_sparse(got, q, k, v, columns, base, 1, 128**-0.5)


@pytest.mark.parametrize("count", [0, 1, 79, 80, 81, 161, 321])
def test_any_count(count: int) -> None:
    q, k, v = attention_inputs(1, 1, 192, 321, 128, dtype=BF16, device=GPU)
    columns = ColumnSet.from_lists([[[torch.randperm(321)[:count].tolist()]]], 192, GPU)
    got = run(sparse_attention, q, k, v, columns, None, 1, 0.1, SparseAttentionSettings())
    check_sparse(got, q, k, v, columns, None, 1, 0.1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_large_logits_stay_finite(dtype: torch.dtype) -> None:
    q, k, v = attention_inputs(1, 2, 300, 900, width=128, dtype=dtype, device=GPU)
    scale = 200.0 / float((q.float() @ k.float().transpose(-1, -2)).abs().max())
    columns = scattered_columns(1, 2, 300, 900, 128, device=GPU)
    for settings in SETTINGS:
        got = run(sparse_attention, q, k, v, columns, None, 1, scale, settings)
        assert bool(got[0].isfinite().all())
        check_sparse(got, q, k, v, columns, None, 1, scale)


def test_slices_of_a_fused_projection() -> None:
    q, k, v = (x.to(GPU) for x in fused_qkv(2, 3, 333, 128, BF16))
    columns = scattered_columns(2, 3, 333, 333, 192, device=GPU)
    got = run(sparse_attention, q, k, v, columns, None, 1, 0.1, SparseAttentionSettings())
    check_sparse(got, q, k, v, columns, None, 1, 0.1)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.as_dict().values())))
def test_same_bits_every_time(settings: SparseAttentionSettings) -> None:
    """Many tiles a block, so that a missing barrier would have thousands of chances to show."""
    group_size = 192 if settings.consumers != 2 else 128
    q, k, v = attention_inputs(1, 24, 4352, width=128, dtype=BF16, device=GPU)
    columns = scattered_columns(1, 24, 4352, 4352, group_size, 0.1, device=GPU)
    first = sparse_attention(q, k, v, columns, q, 1, 0.1, settings)
    for _ in range(10):
        again = sparse_attention(q, k, v, columns, q, 1, 0.1, settings)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def calls() -> tuple[Tensor, Tensor, Tensor, ColumnSet]:
    q, k, v = attention_inputs(1, 2, 700, width=128, dtype=BF16, device=GPU)
    return q, k, v, scattered_columns(1, 2, 700, 700, 192, device=GPU)


def test_runs_on_the_current_stream() -> None:
    """The queries become valid late, on a side stream: a launch on any other stream would read NaN."""
    q, k, v, columns = calls()
    expected = sparse_attention(q, k, v, columns, None, 1, 0.1, SparseAttentionSettings())
    late = torch.full_like(q, torch.nan)
    got: list[Tensor] = []

    def fill_then_attend() -> None:
        late.copy_(q)
        got.extend(sparse_attention(late, k, v, columns, None, 1, 0.1, SparseAttentionSettings()))

    on_side_stream(fill_then_attend)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_graph_replay_equals_eager() -> None:
    """Captured once, replayed on new inputs in the same memory: the bits of an eager call."""
    q, k, v, columns = calls()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = ck.sparse_attention(q, k, v, columns, return_lse=True, backend="cupy_hopper")
        assert isinstance(out, tuple)
        return out

    attend(q, k, v)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(q, k, v)
    for seed in (1, 2):
        fresh = attention_inputs(1, 2, 700, width=128, dtype=BF16, device=GPU, seed=seed)
        for target, values in zip((q, k, v), fresh, strict=True):
            target.copy_(values)
        for output in captured:
            output.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, attend(*fresh), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_its_inputs_are() -> None:
    q, k, v, columns = calls()
    expected = sparse_attention(q, k, v, columns, None, 1, 0.1, SparseAttentionSettings())
    q, k, v = (x.to("cuda:1") for x in (q, k, v))
    columns = columns.to("cuda:1")
    got = sparse_attention(q, k, v, columns, None, 1, 0.1, SparseAttentionSettings())
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True))


def test_launch_costs_little() -> None:
    """Host time of a call, kernel left running: of the order of a launch, not of a compilation."""
    q, k, v = attention_inputs(1, 1, 192, width=128, dtype=BF16, device=GPU)
    columns = scattered_columns(1, 1, 192, 192, 192, uniform=True, device=GPU)
    settings = SparseAttentionSettings()
    sparse_attention(q, k, v, columns, q, 1, 0.1, settings)
    cost = launch_cost(lambda: sparse_attention(q, k, v, columns, q, 1, 0.1, settings), q.device)
    assert cost.us < 100, cost

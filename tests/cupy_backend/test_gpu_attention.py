"""The portable CuPy attention on a GPU: real tiles and sizes, repeats, streams, graphs, devices, cost."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from chipmunk_kernels import registry
from chipmunk_kernels.backends.cupy.sparse_attention import SparseAttentionSettings, sparse_attention
from chipmunk_kernels.columns import ColumnSet
from suites.benchmarks.bars.costs import launch_cost
from tests.factories import attention_inputs, randn, scattered_columns
from tests.triton_attention.cases import check_sparse, fused_qkv, run
from tests.triton_mlp.cases import HALVES, on_side_stream, replay

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda:0")
DEFAULT = SparseAttentionSettings()


@pytest.fixture(autouse=True)
def _needs_cupy() -> None:
    pytest.importorskip("cupy")
    assert registry.unavailable("cupy", GPU) is None


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("group_size", [64, 192])
def test_over_sizes(group_size: int, width: int, dtype: torch.dtype) -> None:
    for rows, (batch, strided) in itertools.product((1, 63, 64, 191, 193), ((1, False), (3, True))):
        q, k, v = attention_inputs(
            batch, 2, rows, rows + 90, width, dtype=dtype, device=GPU, strided=strided, seed=rows
        )
        columns = scattered_columns(batch, 2, rows, rows + 90, group_size, device=GPU, seed=rows)
        base = randn(batch, 2, rows, width, dtype=dtype, device=GPU, seed=7)
        got = run(sparse_attention, q, k, v, columns, base, -1, 0.1, DEFAULT)
        check_sparse(got, q, k, v, columns, base, -1, 0.1)


@pytest.mark.parametrize("rows", [4352, 4480])
@pytest.mark.parametrize("group_size", [128, 192])
def test_flux_sized(group_size: int, rows: int) -> None:
    """Two heads of a FLUX layer, at its density, with an empty and a full group among the others."""
    q, k, v = attention_inputs(1, 2, rows, width=128, dtype=torch.bfloat16, device=GPU, strided=True)
    columns = scattered_columns(1, 2, rows, rows, group_size, 0.165, device=GPU)
    base = randn(1, 2, rows, 128, dtype=torch.bfloat16, device=GPU, seed=7)
    got = run(sparse_attention, q, k, v, columns, base, 1, 128**-0.5, DEFAULT)
    check_sparse(got, q, k, v, columns, base, 1, 128**-0.5)


@pytest.mark.parametrize(
    "settings",
    [
        SparseAttentionSettings(192, 64, 32, 2, 1),
        SparseAttentionSettings(64, 32, 32, 4, 1),
        SparseAttentionSettings(64, 64, 16, 3, 3),
        SparseAttentionSettings(192, 64, 16, 2, 1),
    ],
    ids=lambda settings: "-".join(map(str, settings.as_dict().values())),
)
def test_any_settings(settings: SparseAttentionSettings) -> None:
    q, k, v = attention_inputs(1, 2, 700, width=128, dtype=torch.bfloat16, device=GPU)
    columns = scattered_columns(1, 2, 700, 700, 192, device=GPU)
    got = run(sparse_attention, q, k, v, columns, None, 1, 0.1, settings)
    check_sparse(got, q, k, v, columns, None, 1, 0.1)


@pytest.mark.parametrize("count", [0, 1, 37, 64, 65, 321])
def test_any_count(count: int) -> None:
    q, k, v = attention_inputs(1, 1, 128, 321, 128, dtype=torch.bfloat16, device=GPU)
    columns = ColumnSet.from_lists([[[torch.randperm(321)[:count].tolist()]]], 128, GPU)
    got = run(sparse_attention, q, k, v, columns, None, 1, 0.1, DEFAULT)
    check_sparse(got, q, k, v, columns, None, 1, 0.1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_large_logits_stay_finite(dtype: torch.dtype) -> None:
    """Logits to ±200."""
    q, k, v = attention_inputs(1, 2, 300, width=128, dtype=dtype, device=GPU)
    scale = 200.0 / float((q.float() @ k.float().transpose(-1, -2)).abs().max())
    columns = scattered_columns(1, 2, 300, 300, 128, device=GPU)
    got = run(sparse_attention, q, k, v, columns, None, 1, scale, DEFAULT)
    assert bool(got[0].isfinite().all())
    check_sparse(got, q, k, v, columns, None, 1, scale)


def test_slices_of_a_fused_projection() -> None:
    q, k, v = fused_qkv(2, 3, 333, 128, torch.bfloat16)
    columns = scattered_columns(2, 3, 333, 333, 128, device=GPU)
    got = run(sparse_attention, q, k, v, columns, None, 1, 0.1, DEFAULT)
    check_sparse(got, q, k, v, columns, None, 1, 0.1)


def test_same_bits_every_time() -> None:
    """Also from a graph, and on a side stream where the queries become valid late."""
    q, k, v = attention_inputs(1, 4, 4352, width=128, dtype=torch.bfloat16, device=GPU)
    columns = scattered_columns(1, 4, 4352, 4352, 192, 0.165, device=GPU)
    base = randn(*q.shape, dtype=q.dtype, device=GPU, seed=3)
    late = q.clone()

    def call() -> tuple[Tensor, Tensor]:
        return sparse_attention(late, k, v, columns, base, 1, 128**-0.5, DEFAULT)

    first = call()
    results = [call() for _ in range(3)]
    replay(lambda: results.append(call()))
    late.fill_(float("nan"))

    def fill_then_call() -> None:
        late.copy_(q)
        results.append(call())

    on_side_stream(fill_then_call)
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


def test_a_launch_costs_little() -> None:
    """Host time of a call, of the order of a launch."""
    q, k, v = attention_inputs(1, 1, 128, width=64, dtype=torch.bfloat16, device=GPU)
    columns = scattered_columns(1, 1, 128, 128, 128, uniform=True, device=GPU)
    sparse_attention(q, k, v, columns, None, 1, 0.1, DEFAULT)
    cost = launch_cost(lambda: sparse_attention(q, k, v, columns, None, 1, 0.1, DEFAULT), q.device)
    assert cost.us < 100, cost


def test_the_second_gpu_while_the_first_is_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = attention_inputs(1, 2, 300, width=128, dtype=torch.bfloat16, device="cuda:1")
    columns = scattered_columns(1, 2, 300, 300, 128, device="cuda:1")
    assert torch.cuda.current_device() == 0
    got = run(sparse_attention, q, k, v, columns, None, 1, 0.1, DEFAULT)
    check_sparse(got, q, k, v, columns, None, 1, 0.1)
    assert torch.cuda.current_device() == 0

"""Hopper's column-sparse attention kernels on a GPU.

Without one, tests/cupy_hopper/test_attention.py emulates the one and tests/triton_hopper/test_compiled.py
compiles the other.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import chipmunk_kernels as ck
from chipmunk_kernels import registry
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings
from suites.benchmarks.bars.costs import launch_cost
from tests.factories import attention_inputs, randn, scattered_columns
from tests.triton_attention.cases import check_sparse, fused_qkv, run
from tests.triton_mlp.cases import on_side_stream

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda:0")
BF16 = torch.bfloat16
HALVES = (torch.float16, torch.bfloat16)
BACKENDS = ("cupy_hopper", "triton_hopper")
# (backend, settings in the place of its defaults, rows of a group)
TRIED: list[tuple[str, dict[str, int | bool], int]] = [
    ("cupy_hopper", {}, 192),
    ("cupy_hopper", {"consumers": 3, "stages": 3, "ping_pong": True}, 192),
    ("cupy_hopper", {"consumers": 3, "block_columns": 128, "stages": 2, "overlap": False}, 192),
    ("cupy_hopper", {"consumers": 2, "block_columns": 176, "stages": 2, "ping_pong": True}, 128),
    ("cupy_hopper", {"consumers": 2, "block_columns": 128, "stages": 3}, 128),
    ("cupy_hopper", {"consumers": 1, "block_columns": 64, "stages": 2, "blocks": 2}, 192),
    ("triton_hopper", {}, 192),
    ("triton_hopper", {}, 128),
    ("triton_hopper", {}, 64),
    ("triton_hopper", {"num_stages": 5}, 192),
    ("triton_hopper", {"block_n": 128, "num_stages": 2}, 128),
    ("triton_hopper", {"block_n": 128, "num_stages": 2}, 64),
    ("triton_hopper", {"block_n": 32, "num_stages": 2}, 256),
]


def kernel_of(backend: str) -> Kernel:
    """The backend's kernel; skips where it cannot run."""
    reason = registry.unavailable(backend, GPU)
    if reason is not None:
        pytest.skip(reason)
    return registry.kernel("sparse_attention", backend)


@pytest.fixture(params=BACKENDS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return kernel_of(request.param)


@pytest.fixture(params=TRIED, ids=lambda case: "-".join(map(str, (case[0], *case[1].values(), case[2]))))
def tried(request: pytest.FixtureRequest) -> tuple[Kernel, LaunchSettings, int]:
    """A kernel, settings, and the rows of a group that suit them."""
    backend, changes, group_size = request.param
    kernel = kernel_of(backend)
    return kernel, kernel.settings.from_mapping(changes), group_size


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("group_size", [64, 128, 192, 256])
def test_over_sizes(kernel: Kernel, group_size: int, width: int, dtype: torch.dtype) -> None:
    """Every ragged size and batch in the default settings, transposed views included."""
    for rows, batch in itertools.product((1, 63, 64, 191, 193), (1, 2, 3)):
        q, k, v = attention_inputs(
            batch, 2, rows, rows + 90, width, dtype=dtype, device=GPU, strided=batch > 1, seed=rows
        )
        columns = scattered_columns(batch, 2, rows, rows + 90, group_size, device=GPU, seed=rows)
        base = randn(batch, 2, rows, width, dtype=dtype, device=GPU, seed=7) if batch > 1 else None
        got = run(kernel.run, q, k, v, columns, base, -1, 0.1, kernel.settings())
        check_sparse(got, q, k, v, columns, base, -1, 0.1)


@pytest.mark.parametrize("rows", [4352, 4480])
def test_flux_sized(rows: int, tried: tuple[Kernel, LaunchSettings, int]) -> None:
    """Two heads of a FLUX layer, at its density, with an empty and a full group among the others."""
    kernel, settings, group_size = tried
    q, k, v = attention_inputs(1, 2, rows, width=128, dtype=BF16, device=GPU, strided=True)
    columns = scattered_columns(1, 2, rows, rows, group_size, 0.165, device=GPU)
    base = randn(1, 2, rows, 128, dtype=BF16, device=GPU, seed=7)
    got = run(kernel.run, q, k, v, columns, base, 1, 128**-0.5, settings)
    check_sparse(got, q, k, v, columns, base, 1, 128**-0.5)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 79, 80, 81, 161, 321])
def test_any_count(kernel: Kernel, count: int) -> None:
    q, k, v = attention_inputs(1, 1, 192, 321, 128, dtype=BF16, device=GPU)
    columns = ColumnSet.from_lists([[[torch.randperm(321)[:count].tolist()]]], 192, GPU)
    got = run(kernel.run, q, k, v, columns, None, 1, 0.1, kernel.settings())
    check_sparse(got, q, k, v, columns, None, 1, 0.1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_large_logits_stay_finite(dtype: torch.dtype, tried: tuple[Kernel, LaunchSettings, int]) -> None:
    kernel, settings, group_size = tried
    q, k, v = attention_inputs(1, 2, 300, 900, width=128, dtype=dtype, device=GPU)
    scale = 200.0 / float((q.float() @ k.float().transpose(-1, -2)).abs().max())
    columns = scattered_columns(1, 2, 300, 900, group_size, device=GPU)
    got = run(kernel.run, q, k, v, columns, None, 1, scale, settings)
    assert bool(got[0].isfinite().all())
    check_sparse(got, q, k, v, columns, None, 1, scale)


@pytest.mark.parametrize("scale", [-0.1, 0.0])
def test_any_scale(kernel: Kernel, scale: float) -> None:
    q, k, v = attention_inputs(1, 2, 300, 900, width=128, dtype=BF16, device=GPU)
    columns = scattered_columns(1, 2, 300, 900, 128, device=GPU)
    got = run(kernel.run, q, k, v, columns, None, 1, scale, kernel.settings())
    check_sparse(got, q, k, v, columns, None, 1, scale)


def test_slices_of_a_fused_projection(kernel: Kernel) -> None:
    q, k, v = (x.to(GPU) for x in fused_qkv(2, 3, 333, 128, BF16))
    columns = scattered_columns(2, 3, 333, 333, 192, device=GPU)
    got = run(kernel.run, q, k, v, columns, None, 1, 0.1, kernel.settings())
    check_sparse(got, q, k, v, columns, None, 1, 0.1)


def test_rows_that_begin_anywhere(kernel: Kernel) -> None:
    """Strides and addresses that no 16-byte copy can take: the same values as of tidy tensors."""
    wide = [randn(1, 2, 300, 136, dtype=BF16, device=GPU, seed=seed) for seed in range(4)]
    q, k, v, base = (x[..., 1:129] for x in wide)
    columns = scattered_columns(1, 2, 300, 300, 128, device=GPU)
    got = run(kernel.run, q, k, v, columns, base, -1, 0.1, kernel.settings())
    check_sparse(got, q, k, v, columns, base, -1, 0.1)
    again = kernel.run(
        q.contiguous(), k.contiguous(), v.contiguous(), columns, base.contiguous(), -1, 0.1, kernel.settings()
    )
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_same_bits_every_time(tried: tuple[Kernel, LaunchSettings, int]) -> None:
    """Many tiles a block, so that a missing barrier would have thousands of chances to show."""
    kernel, settings, group_size = tried
    q, k, v = attention_inputs(1, 24, 4352, width=128, dtype=BF16, device=GPU)
    columns = scattered_columns(1, 24, 4352, 4352, group_size, 0.1, device=GPU)
    first = kernel.run(q, k, v, columns, q, 1, 0.1, settings)
    for _ in range(10):
        again = kernel.run(q, k, v, columns, q, 1, 0.1, settings)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def calls() -> tuple[Tensor, Tensor, Tensor, ColumnSet]:
    q, k, v = attention_inputs(1, 2, 700, width=128, dtype=BF16, device=GPU)
    return q, k, v, scattered_columns(1, 2, 700, 700, 192, device=GPU)


def test_runs_on_the_current_stream(kernel: Kernel) -> None:
    """The queries become valid late, on a side stream: a launch on any other stream would read NaN."""
    q, k, v, columns = calls()
    expected = kernel.run(q, k, v, columns, None, 1, 0.1, kernel.settings())
    late = torch.full_like(q, torch.nan)
    got: list[Tensor] = []

    def fill_then_attend() -> None:
        late.copy_(q)
        got.extend(kernel.run(late, k, v, columns, None, 1, 0.1, kernel.settings()))

    on_side_stream(fill_then_attend)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_graph_replay_equals_eager(kernel: Kernel) -> None:
    """Captured once, replayed on new inputs in the same memory: the bits of an eager call."""
    q, k, v, columns = calls()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = ck.sparse_attention(q, k, v, columns, return_lse=True, backend=kernel.backend)
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
def test_runs_where_its_inputs_are(kernel: Kernel) -> None:
    q, k, v, columns = calls()
    expected = kernel.run(q, k, v, columns, None, 1, 0.1, kernel.settings())
    q, k, v = (x.to("cuda:1") for x in (q, k, v))
    columns = columns.to("cuda:1")
    got = kernel.run(q, k, v, columns, None, 1, 0.1, kernel.settings())
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True))


def test_launch_costs_little(kernel: Kernel) -> None:
    """Host time of a call, kernel left running: of the order of a launch, not of a compilation."""
    q, k, v = attention_inputs(1, 1, 192, width=128, dtype=BF16, device=GPU)
    columns = scattered_columns(1, 1, 192, 192, 192, uniform=True, device=GPU)
    settings = kernel.settings()
    kernel.run(q, k, v, columns, q, 1, 0.1, settings)
    cost = launch_cost(lambda: kernel.run(q, k, v, columns, q, 1, 0.1, settings), q.device)
    assert cost.us < 100, cost

"""sparse_attention.cu and its host code, run warp by warp on the host, against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from chipmunk_kernels.backends.cupy import sparse_attention as ours
from chipmunk_kernels.backends.cupy.sparse_attention import SparseAttentionSettings, sparse_attention
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.problem import Problem
from tests.cupy_backend.warps import Warps
from tests.factories import attention_inputs, randn, scattered_columns
from tests.triton_attention.cases import check_sparse, run

SMALL = SparseAttentionSettings(block_m=64, block_n=32, warp_rows=16, stages=2)
DEEP = SparseAttentionSettings(block_m=96, block_n=32, warp_rows=32, stages=4)
GPU_LIMITS = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}


@pytest.fixture(autouse=True)
def _on_the_host(host: Warps, monkeypatch: pytest.MonkeyPatch) -> None:
    host.eager = host.backwards = False
    ours._plan.cache_clear()
    ours._kernel.cache_clear()
    monkeypatch.setattr(ours, "load", host.load)
    monkeypatch.setattr(ours, "prepared", host.prepared)
    host.watch(monkeypatch)


def compare(
    batch: int,
    rows: int,
    keys: int,
    width: int,
    group_size: int,
    dtype: torch.dtype,
    settings: SparseAttentionSettings,
    *,
    strided: bool = False,
    sign: int = 1,
) -> None:
    q, k, v = attention_inputs(batch, 2, rows, keys, width, dtype=dtype, strided=strided)
    columns = scattered_columns(batch, 2, rows, keys, group_size)
    base = randn(*q.shape, dtype=dtype, seed=7)
    got = run(sparse_attention, q, k, v, columns, base, sign, 0.1, settings)
    check_sparse(got, q, k, v, columns, base, sign, 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_matches_the_reference(width: int, dtype: torch.dtype) -> None:
    """Ragged groups and counts, one group empty and one full, transposed views, the default tile."""
    compare(1, 193, 210, width, 128, dtype, SparseAttentionSettings(), strided=True, sign=-1)


@pytest.mark.parametrize("settings", [SMALL, DEEP], ids=["small", "deep"])
@pytest.mark.parametrize("backwards", [False, True], ids=["first warp ahead", "last warp ahead"])
@pytest.mark.parametrize("eager", [False, True], ids=["late copies", "early copies"])
def test_any_order_of_warps_and_copies(
    eager: bool, backwards: bool, settings: SparseAttentionSettings, host: Warps
) -> None:
    """Nothing is read before its copy has landed, nor overwritten while a slower warp still reads it."""
    host.eager, host.backwards = eager, backwards
    compare(1, 193, 460, 128, 192, torch.bfloat16, settings)


@pytest.mark.parametrize("rows", [1, 63, 64])
def test_few_rows(rows: int) -> None:
    compare(3, rows, 91, 64, 64, torch.bfloat16, SMALL, strided=True)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 65])
def test_any_count(count: int) -> None:
    q, k, v = attention_inputs(1, 1, 64, 65, 64, dtype=torch.bfloat16)
    columns = ColumnSet.from_lists([[[torch.randperm(65)[:count].tolist()]]], 64)
    got = run(sparse_attention, q, k, v, columns, None, 1, 0.1, SMALL)
    check_sparse(got, q, k, v, columns, None, 1, 0.1)


@pytest.mark.parametrize("scale", [200.0, -200.0])
def test_large_logits(scale: float) -> None:
    """Logits to ±200, whose reference rises again and again; a negative scale turns them over."""
    q, k, v = attention_inputs(1, 1, 64, 150, 64, dtype=torch.float16)
    scale /= float((q.float() @ k.float().transpose(-1, -2)).abs().max())
    columns = scattered_columns(1, 1, 64, 150, 64, 0.7, uniform=True)
    got = run(sparse_attention, q, k, v, columns, None, 1, scale, SMALL)
    assert bool(got[0].isfinite().all())
    check_sparse(got, q, k, v, columns, None, 1, scale)


def test_rows_that_no_vector_is_aligned_to() -> None:
    """Slices that begin in the middle of a vector are copied first."""
    q, k, v = (randn(1, 1, 70, 67, dtype=torch.bfloat16, seed=i)[..., 3:] for i in range(3))
    columns = scattered_columns(1, 1, 70, 70, 64)
    got = run(sparse_attention, q, k, v, columns, q, 1, 0.1, SMALL)
    check_sparse(got, q, k, v, columns, q, 1, 0.1)


def test_no_bank_conflicts(host: Warps) -> None:
    before = host.conflicts
    compare(1, 64, 70, 128, 64, torch.bfloat16, SMALL)
    compare(1, 64, 70, 64, 64, torch.bfloat16, SMALL)
    assert host.conflicts == before


@pytest.mark.parametrize(
    ("line", "eager"),
    [
        ("        wait_for_copies<STAGES - 2>();\n        __syncthreads();\n", False),
        ("        wait_for_copies<STAGES - 2>();\n        __syncthreads();\n", True),
        ("    wait_for_copies<0>();\n    __syncthreads();\n    fetch_own_rows", False),
    ],
    ids=["a tile used too early", "a tile overwritten", "a list used too early"],
)
def test_a_missing_barrier_is_noticed(
    line: str, eager: bool, host: Warps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's warps would see the races that the tests above rule out."""
    remedy = line.replace("__syncthreads();\n", "\n") if eager else line.replace("wait_for_copies", "// ")
    code = host.text(ours.source(torch.bfloat16, 128, 64, SMALL))
    assert line in code
    host.eager = eager
    monkeypatch.setattr(host, "text", lambda source: code.replace(line, remedy))
    monkeypatch.setattr(host, "libraries", {})
    with pytest.raises(AssertionError):
        compare(1, 64, 460, 128, 64, torch.bfloat16, SMALL)


def test_blocks_share_a_group_evenly() -> None:
    assert ours.block_rows(128, 192) == 96
    assert ours.block_rows(192, 192) == 192
    assert ours.block_rows(128, 128) == 128
    assert ours.block_rows(128, 7) == 64
    assert ours.block_rows(64, 160) == 64


def test_the_default_fits_every_gpu() -> None:
    problem = Problem("sparse_attention", rows=4352, columns=4352, width=128, heads=24, density=0.165)
    default = SparseAttentionSettings()
    for limit in GPU_LIMITS.values():
        assert default.misfit(problem, limit) is None
    deep = dataclasses.replace(default, stages=4)
    assert "shared memory" in str(deep.misfit(problem, GPU_LIMITS["sm_89"]))
    assert "shared memory" not in str(deep.misfit(problem, GPU_LIMITS["sm_90"]))
    assert "registers" in str(dataclasses.replace(default, block_n=128).misfit(problem))
    assert "registers" in str(dataclasses.replace(default, blocks=3).misfit(problem))
    narrow = dataclasses.replace(problem, group_size=64)
    assert "64 rows" in str(default.misfit(narrow))


def test_what_the_kernel_takes() -> None:
    (kernel,) = ours.KERNELS
    assert kernel.unsupported(torch.bfloat16, 128) is None
    assert "float32" in str(kernel.unsupported(torch.float32, 128))
    assert "got 96" in str(kernel.unsupported(torch.float16, 96))


def test_calls_that_differ_take_turns() -> None:
    """Plans of one kernel: other addresses, with a base and without, other scales, signs and strides."""
    columns = scattered_columns(1, 2, 70, 90, 64)
    for strided in (False, True, False):
        for seed in (1, 2):
            q, k, v = attention_inputs(1, 2, 70, 90, 64, dtype=torch.bfloat16, strided=strided, seed=seed)
            for base, sign, scale in ((None, 1, 0.1), (q, -1, 0.1), (None, -1, 0.2), (k[:, :, :70], 1, 0.2)):
                got = run(sparse_attention, q, k, v, columns, base, sign, scale, SMALL)
                check_sparse(got, q, k, v, columns, base, sign, scale)
    assert ours._plan.cache_info().misses == 8


def test_copies_keep_the_order_of_the_queries() -> None:
    q, k, v = (randn(1, 70, 2, 70, dtype=torch.bfloat16, seed=i).transpose(1, 2)[..., 3:67] for i in range(3))
    columns = scattered_columns(1, 2, 70, 70, 64)
    got = run(sparse_attention, q, k, v, columns, None, 1, 0.1, SMALL)
    check_sparse(got, q, k, v, columns, None, 1, 0.1)
    assert got[0].stride() == (8960, 64, 128, 1)

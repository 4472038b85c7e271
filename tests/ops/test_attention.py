"""The attention operations against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from chipmunk_kernels import ColumnSet, colsum_attention, dense_attention, sparse_attention
from chipmunk_kernels.backends.torch import attention as torch_attention
from chipmunk_kernels.columns import group_count
from reference import attention as reference
from tests.factories import assert_within_budget, attention_inputs, randn, scattered_columns

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Supported = Callable[[str, torch.dtype, int], None]


def doubled(*tensors: Tensor) -> list[Tensor]:
    return [x.double() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 63, 64, 191, 193])
@pytest.mark.parametrize("width", [64, 128])
def test_dense_gives_the_softmax_and_its_normaliser(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, backend: str, supported: Supported
) -> None:
    supported("dense_attention", dtype, width)
    q, k, v = attention_inputs(3, 2, rows, 193, width, dtype=dtype, device=device, strided=True, seed=rows)
    out, lse = dense_attention(q, k, v, backend=backend)
    truth, peer = reference.dense_attention(*doubled(q, k, v)), reference.dense_attention(q, k, v)
    assert lse.dtype == torch.float32
    assert_within_budget(out, truth[0], peer[0])
    assert_within_budget(lse, truth[1], peer[1], "lse")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "group_size"), [(1, 64), (63, 64), (64, 64), (191, 64), (193, 192)])
@pytest.mark.parametrize("width", [64, 128])
def test_colsum_gives_dense_attention_and_the_mass_of_each_column(
    rows: int,
    group_size: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    supported: Supported,
) -> None:
    supported("colsum_attention", dtype, width)
    q, k, v = attention_inputs(2, 2, rows, 193, width, dtype=dtype, device=device, strided=True, seed=rows)
    lse_prev = randn(2, 2, rows, device=device, seed=9) + 5.0
    found = colsum_attention(q, k, v, lse_prev, group_size, backend=backend)
    truth = reference.colsum_attention(*doubled(q, k, v), lse_prev, group_size)
    peer = reference.colsum_attention(q, k, v, lse_prev, group_size)
    for name, ours, right, other in zip(("out", "lse", "column_mass"), found, truth, peer, strict=True):
        assert_within_budget(ours, right, other, name)
    assert found[2].shape == (2, 2, group_count(rows, group_size), 193)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "group_size"), [(1, 64), (63, 64), (64, 64), (191, 64), (193, 192)])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("uniform", [True, False])
def test_sparse_attends_to_the_kept_columns_only(
    rows: int,
    group_size: int,
    width: int,
    uniform: bool,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    supported: Supported,
) -> None:
    supported("sparse_attention", dtype, width)
    q, k, v = attention_inputs(2, 2, rows, 193, width, dtype=dtype, device=device, strided=True, seed=rows)
    columns = scattered_columns(2, 2, rows, 193, group_size, uniform=uniform, device=device, seed=rows)
    base = randn(*q.shape, dtype=dtype, device=device, seed=7)
    chosen = (columns.indices, columns.counts, group_size)
    for below, sign in ((None, 1), (None, -1), (base, 1), (base, -1)):
        found = sparse_attention(q, k, v, columns, base=below, sign=sign, return_lse=True, backend=backend)
        double_below = None if below is None else below.double()
        truth = reference.sparse_attention(*doubled(q, k, v), *chosen, double_below, sign)
        peer = reference.sparse_attention(q, k, v, *chosen, below, sign)
        assert_within_budget(found[0], truth[0], peer[0], f"out with sign {sign}")
        assert_within_budget(found[1], truth[1], peer[1], "lse")


def test_empty_groups_give_the_base_or_zeros(device: torch.device, backend: str) -> None:
    q, k, v = attention_inputs(1, 1, 100, 100, dtype=torch.float16, device=device)
    columns = ColumnSet.from_lists([[[[], [3, 50]]]], group_size=64, device=device)
    base = randn(*q.shape, dtype=torch.float16, device=device, seed=1)
    out, lse = sparse_attention(q, k, v, columns, base=base, sign=-1, return_lse=True, backend=backend)
    assert torch.equal(out[:, :, :64], base[:, :, :64])
    assert not torch.equal(out[:, :, 64:], base[:, :, 64:])
    assert bool((lse[:, :, :64] == float("-inf")).all()) and bool(lse[:, :, 64:].isfinite().all())
    out = sparse_attention(q, k, v, columns, backend=backend)
    assert isinstance(out, Tensor) and not bool(out[:, :, :64].any())


def test_a_capacity_of_zero_keeps_nothing(device: torch.device, backend: str) -> None:
    q, k, v = attention_inputs(1, 1, 100, 100, dtype=torch.float16, device=device)
    columns = ColumnSet.from_lists([[[[], []]]], group_size=64, device=device)
    out, lse = sparse_attention(q, k, v, columns, return_lse=True, backend=backend)
    assert not bool(out.any()) and bool((lse == float("-inf")).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_kept_is_dense_and_leaves_nothing_cached(
    dtype: torch.dtype, device: torch.device, backend: str, supported: Supported
) -> None:
    supported("sparse_attention", dtype, 128)
    q, k, v = attention_inputs(1, 2, 193, 193, 128, dtype=dtype, device=device)
    columns = ColumnSet.full(1, 2, 193, 193, 64, device)
    dense, dense_lse = dense_attention(q, k, v, backend=backend)
    sparse, sparse_lse = sparse_attention(q, k, v, columns, return_lse=True, backend=backend)
    truth, peer = reference.dense_attention(*doubled(q, k, v)), reference.dense_attention(q, k, v)
    assert_within_budget(sparse, truth[0], peer[0])
    assert_within_budget(sparse_lse, dense_lse.double(), dense_lse, "lse", dtype)
    rest = sparse_attention(q, k, v, columns, base=dense, sign=-1, backend=backend)
    # No more is left than how far the dense output was rounded.
    assert_within_budget(dense.double() - rest.double(), truth[0], peer[0], "cached rest")


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_stay_finite_and_right(
    dtype: torch.dtype, device: torch.device, backend: str, supported: Supported
) -> None:
    """Logits reach ±200; the mass is taken against the same pass's normaliser, as on a second full step."""
    supported("colsum_attention", dtype, 64)
    q, k, v = attention_inputs(1, 2, 96, 150, dtype=dtype, device=device)
    q = q * (200 / float((q.double() @ k.double().transpose(2, 3)).abs().max()) * 8)
    lse_prev = reference.dense_attention(*doubled(q, k, v))[1].float()
    found = colsum_attention(q, k, v, lse_prev, 64, backend=backend)
    truth = reference.colsum_attention(*doubled(q, k, v), lse_prev, 64)
    peer = reference.colsum_attention(q, k, v, lse_prev, 64)
    logits = q.double() @ k.double().transpose(2, 3) / 8
    assert 190 < float(logits.abs().max()) < 210
    for name, ours, right, other in zip(("out", "lse", "column_mass"), found, truth, peer, strict=True):
        assert bool(ours.isfinite().all()), name
        assert_within_budget(ours, right, other, name)
    sparse, lse = sparse_attention(
        q,
        k,
        v,
        scattered_columns(1, 2, 96, 150, device=device, uniform=True),
        return_lse=True,
        backend=backend,
    )
    assert bool(sparse.isfinite().all() and lse.isfinite().all())


def test_mass_stays_finite_when_the_normaliser_moved_far(device: torch.device, backend: str) -> None:
    q, k, v = attention_inputs(1, 1, 64, 64, dtype=torch.float16, device=device)
    for moved in (-60.0, 60.0, 500.0):
        mass = colsum_attention(q, k, v, torch.full((1, 1, 64), moved, device=device), 64, backend=backend)[2]
        assert bool(mass.isfinite().all()) and bool((mass >= 0).all())


def test_the_mass_of_all_columns_is_the_number_of_queries(device: torch.device, backend: str) -> None:
    """Taken against its own normaliser, each query's weights sum to one."""
    q, k, v = attention_inputs(1, 2, 193, 100, dtype=torch.float16, device=device)
    lse = dense_attention(q, k, v, backend=backend)[1]
    mass = colsum_attention(q, k, v, lse, 64, backend=backend)[2]
    expected = torch.tensor([64.0, 64.0, 64.0, 1.0], device=device).expand(1, 2, 4)
    torch.testing.assert_close(mass.sum(-1), expected, rtol=1e-3, atol=0)


def test_the_mass_does_not_depend_on_the_run(device: torch.device, backend: str) -> None:
    q, k, v = attention_inputs(1, 2, 193, 193, dtype=torch.bfloat16, device=device)
    lse_prev = torch.zeros(1, 2, 193, device=device) + 5
    first = colsum_attention(q, k, v, lse_prev, 64, backend=backend)[2]
    assert all(
        torch.equal(first, colsum_attention(q, k, v, lse_prev, 64, backend=backend)[2]) for _ in range(3)
    )


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("length", [0, 1, 100, 193])
def test_keys_past_the_key_length_take_no_part(
    length: int, as_tensor: bool, device: torch.device, backend: str
) -> None:
    q, k, v = attention_inputs(2, 2, 65, 193, dtype=torch.float16, device=device, strided=True)
    k[:, :, length:], v[:, :, length:] = 30.0, float("nan") if not as_tensor else 30.0
    lengths = torch.tensor([length, 77], dtype=torch.int32, device=device) if as_tensor else length
    lse_prev = torch.full((2, 2, 65), 5.0, device=device)
    found = colsum_attention(q, k, v, lse_prev, 64, key_length=lengths, backend=backend)
    clean = doubled(q, k, v.nan_to_num(30.0))
    truth = reference.colsum_attention(*clean, lse_prev, 64, lengths)
    peer = reference.colsum_attention(q, k, v.nan_to_num(30.0), lse_prev, 64, lengths)
    for name, ours, right, other in zip(("out", "lse", "column_mass"), found, truth, peer, strict=True):
        assert_within_budget(ours, right, other, name, torch.float16)
    dense = dense_attention(q, k, v, key_length=lengths, backend=backend)
    assert_within_budget(dense[0], truth[0], peer[0])
    assert not bool(found[2][0, ..., length:].any())


@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_the_scale_is_honoured(scale: float, device: torch.device, backend: str) -> None:
    q, k, v = attention_inputs(1, 1, 65, 65, dtype=torch.float16, device=device)
    truth, peer = (
        reference.dense_attention(*doubled(q, k, v), scale=scale),
        reference.dense_attention(q, k, v, scale=scale),
    )
    assert_within_budget(dense_attention(q, k, v, scale=scale, backend=backend)[0], truth[0], peer[0])
    full = ColumnSet.full(1, 1, 65, 65, 64, device)
    sparse = sparse_attention(q, k, v, full, scale=scale, backend=backend)
    assert isinstance(sparse, Tensor)
    assert_within_budget(sparse, truth[0], peer[0])


def test_outputs_lie_in_memory_as_the_queries_do(device: torch.device, backend: str) -> None:
    """So that a model's `transpose(1, 2).flatten(2)` on the way out is a view."""
    columns = scattered_columns(2, 2, 65, 65, device=device)
    for strided in (False, True):
        q, k, v = attention_inputs(2, 2, 65, 65, dtype=torch.float16, device=device, strided=strided)
        fused = torch.cat([q.transpose(1, 2), k.transpose(1, 2)], dim=-1).transpose(1, 2)[..., :64]
        for queries in (q, fused):
            dense = dense_attention(queries, k, v, backend=backend)[0]
            sparse = sparse_attention(queries, k, v, columns, backend=backend)
            assert isinstance(sparse, Tensor)
            expected = q.stride() if queries is q else (65 * 128, 64, 128, 1)
            assert dense.stride() == sparse.stride() == expected


@pytest.mark.parametrize("scratch_mib", [1, 4])
def test_blocks_of_any_size_give_the_same_answer(scratch_mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch so small that a group is split by rows, and its columns into parts that are merged."""
    q, k, v = attention_inputs(1, 2, 300, 2500, dtype=torch.bfloat16)
    columns = scattered_columns(1, 2, 300, 2500, 128, 0.6)
    lse_prev = torch.full((1, 2, 300), 8.0)
    chosen = (columns.indices, columns.counts, 128)
    monkeypatch.setattr(torch_attention, "MOST_SCRATCH_BYTES", 1 << 20)
    base = randn(1, 2, 300, 64, dtype=torch.bfloat16, seed=5)
    mass = torch_attention.colsum_attention(
        q, k, v, lse_prev, 128, None, 0.125, torch_attention.ColsumSettings(scratch_mib)
    )[2]
    sparse, lse = torch_attention.sparse_attention(
        q, k, v, columns, base, -1, 0.125, torch_attention.SparseSettings(scratch_mib)
    )
    truth = reference.sparse_attention(*doubled(q, k, v), *chosen, base.double(), -1)
    peer = reference.sparse_attention(q, k, v, *chosen, base, -1)
    assert_within_budget(sparse, truth[0], peer[0])
    assert_within_budget(lse, truth[1], peer[1], "lse")
    true_mass = reference.colsum_attention(*doubled(q, k, v), lse_prev, 128)[2]
    assert_within_budget(mass, true_mass, reference.colsum_attention(q, k, v, lse_prev, 128)[2], "mass")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_kernel_agrees_with_the_blocks(dtype: torch.dtype, device: torch.device) -> None:
    """Which is what `DenseSettings.fused` chooses between on a CPU; on a GPU the fused one is taken."""
    q, k, v = attention_inputs(2, 2, 100, 150, dtype=dtype, device=device, strided=True)
    settings = torch_attention.DenseSettings(fused=True)
    out, lse = dense_attention(q, k, v, key_length=140, backend="torch", settings=settings)
    truth = reference.dense_attention(*doubled(q, k, v), 140)
    peer = reference.dense_attention(q, k, v, 140)
    assert_within_budget(out, truth[0], peer[0])
    assert_within_budget(lse, truth[1], peer[1], "lse")

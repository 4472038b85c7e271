"""The column-sparse attention kernel against the reference, in the interpreter or on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from chipmunk_kernels.backends.triton.sparse_attention import SparseAttentionSettings, sparse_attention
from chipmunk_kernels.columns import ColumnSet
from tests.factories import attention_inputs, randn, scattered_columns
from tests.triton_attention.cases import DEVICE, DTYPES, EXACT, check_sparse, fused_qkv, run

SMALL = SparseAttentionSettings(block_m=64, block_n=32, num_warps=4)
ONE_LOOP = replace(SMALL, peel_tail=False)
IN_ORDER = replace(SMALL, overlap=False)
ONE_LOOP_IN_ORDER = replace(ONE_LOOP, overlap=False)
EVERY = pytest.mark.parametrize(
    "settings",
    [SMALL, ONE_LOOP, IN_ORDER, ONE_LOOP_IN_ORDER],
    ids=["peeled", "one loop", "peeled, in order", "one loop, in order"],
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY
@pytest.mark.parametrize(
    ("rows", "group_size", "width"),
    [(193, 64, 64), (130, 128, 128), (193, 192, 64), (259, 256, 32), (60, 48, 32), (35, 16, 16), (1, 64, 64)],
)
def test_matches_the_reference(
    rows: int, group_size: int, width: int, settings: SparseAttentionSettings, dtype: torch.dtype
) -> None:
    """Ragged groups, groups of no whole number of tiles, scattered columns with an empty and a full group."""
    q, k, v = attention_inputs(2, 1, rows, 71, width, dtype=dtype, device=DEVICE, strided=True, seed=rows)
    columns = scattered_columns(2, 1, rows, 71, group_size, device=DEVICE, seed=rows)
    base = randn(2, 1, rows, width, dtype=dtype, device=DEVICE, seed=7)
    got = run(sparse_attention, q, k, v, columns, base, -1, 0.2, settings)
    check_sparse(got, q, k, v, columns, base, -1, 0.2)


@EVERY
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 64, 65])
def test_any_count(count: int, settings: SparseAttentionSettings) -> None:
    """Counts around a tile's edge, without a base: an empty group gives zeros and −∞."""
    q, k, v = attention_inputs(1, 1, 32, 65, 32, dtype=EXACT, device=DEVICE)
    kept = torch.randperm(65)[:count].tolist()
    columns = ColumnSet.from_lists([[[kept]]], 32, DEVICE)
    out, lse = run(sparse_attention, q, k, v, columns, None, 1, 0.3, settings)
    check_sparse((out, lse), q, k, v, columns, None, 1, 0.3)
    if count == 0:
        assert bool((out == 0).all()) and bool((lse == -torch.inf).all())


@EVERY
def test_reads_kept_columns_only(settings: SparseAttentionSettings) -> None:
    """NaN in every column that no group keeps, which padding slots still point at, stays out."""
    q, k, v = attention_inputs(1, 2, 64, 90, 32, dtype=EXACT, device=DEVICE)
    indices = torch.arange(1, 81, 2, dtype=torch.int32, device=DEVICE).expand(1, 2, 2, 40).clone()
    counts = torch.tensor([[[35, 3], [0, 32]]], dtype=torch.int32, device=DEVICE)
    indices[..., 35:] = 0
    k[:, :, 0::2], v[:, :, 0::2] = torch.nan, torch.nan
    columns = ColumnSet(indices, counts, 32)
    got = run(sparse_attention, q, k, v, columns, None, 1, 0.3, settings)
    check_sparse(got, q, k.nan_to_num(), v.nan_to_num(), columns, None, 1, 0.3)


def test_slices_of_a_fused_projection() -> None:
    q, k, v = fused_qkv(2, 3, 50, 32, EXACT)
    columns = scattered_columns(2, 3, 50, 50, 32, device=DEVICE)
    base = fused_qkv(2, 3, 50, 32, EXACT, seed=5)[1]
    out, lse = run(sparse_attention, q, k, v, columns, base, 1, 0.3, SMALL)
    check_sparse((out, lse), q, k, v, columns, base, 1, 0.3)
    assert out.transpose(1, 2).is_contiguous(), "the output lies in memory as the queries do"


def test_keys_and_values_of_different_row_strides() -> None:
    q, k, v = attention_inputs(1, 2, 40, 60, 32, dtype=EXACT, device=DEVICE)
    wide = torch.zeros(1, 2, 60, 48, dtype=EXACT, device=DEVICE)
    wide[..., :32] = v
    columns = scattered_columns(1, 2, 40, 60, 32, device=DEVICE)
    got = run(sparse_attention, q, k, wide[..., :32], columns, None, 1, 0.3, SMALL)
    check_sparse(got, q, k, v, columns, None, 1, 0.3)


@pytest.mark.parametrize("scale", [-0.4, 0.0, 40.0])
def test_any_scale(scale: float) -> None:
    """Negative, zero (a plain mean), and logits of several hundred that must stay finite."""
    q, k, v = attention_inputs(1, 2, 40, 70, 32, dtype=EXACT, device=DEVICE)
    columns = scattered_columns(1, 2, 40, 70, 32, device=DEVICE)
    got = run(sparse_attention, q, k, v, columns, None, 1, scale, SMALL)
    check_sparse(got, q, k, v, columns, None, 1, scale)


def test_very_negative_logits_keep_their_weight() -> None:
    """Every logit near −200: slots past the end of a list must not pull the maximum up to zero."""
    q, k, v = attention_inputs(1, 1, 32, 40, 32, dtype=EXACT, device=DEVICE)
    q, k = q.abs() + 0.5, -k.abs() - 0.5
    columns = ColumnSet.from_lists([[[list(range(3, 38))]]], 32, DEVICE)
    scale = -200.0 / float((q.float() @ k.float().transpose(-1, -2)).mean())
    got = run(sparse_attention, q, k, v, columns, None, 1, scale, SMALL)
    assert float(got[1].max()) < -50
    check_sparse(got, q, k, v, columns, None, 1, scale)


def test_base_of_another_dtype_is_added_in_float32() -> None:
    q, k, v = attention_inputs(1, 1, 32, 40, 32, dtype=torch.float16, device=DEVICE)
    columns = scattered_columns(1, 1, 32, 40, 32, uniform=True, device=DEVICE)
    base = randn(1, 1, 32, 32, device=DEVICE, seed=3)
    out, _ = run(sparse_attention, q, k, v, columns, base, 1, 0.3, SMALL)
    assert out.dtype == torch.float16
    check_sparse((out,), q, k, v, columns, base, 1, 0.3)


def test_same_bits_every_time() -> None:
    q, k, v = attention_inputs(1, 2, 70, 80, 32, dtype=EXACT, device=DEVICE)
    columns = scattered_columns(1, 2, 70, 80, 32, device=DEVICE)
    first = run(sparse_attention, q, k, v, columns, None, 1, 0.3, SMALL)
    again = run(sparse_attention, q, k, v, columns, None, 1, 0.3, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_rows_and_no_columns() -> None:
    """A group over an empty key sequence, and no query at all."""
    q, k, v = attention_inputs(1, 2, 20, 0, 32, dtype=EXACT, device=DEVICE)
    nothing = ColumnSet.from_lists([[[[], []], [[], []]]], 16, DEVICE)
    base = randn(1, 2, 20, 32, dtype=EXACT, device=DEVICE)
    out, lse = run(sparse_attention, q, k, v, nothing, base, 1, 0.3, SMALL)
    assert torch.equal(out, base) and bool((lse == -torch.inf).all())
    none = ColumnSet.from_lists([[[], []]], 16, DEVICE)
    out, lse = run(sparse_attention, q[:, :, :0], k, v, none, None, 1, 0.3, SMALL)
    assert out.shape == (1, 2, 0, 32) and lse.shape == (1, 2, 0)


def test_offsets_beyond_32_bits() -> None:
    """A head further than 2³¹ elements from the first (the memory between is never touched)."""
    far = 2**31 + 64
    memory = torch.empty(far + 3 * 40 * 32, dtype=torch.float16, device=DEVICE)
    q, k, v = attention_inputs(1, 2, 40, 40, 32, dtype=torch.float16, device=DEVICE)
    shape, stride = (1, 2, 40, 32), (0, far, 32, 1)
    far_q, far_k, far_v = (memory.as_strided(shape, stride, i * 40 * 32) for i in range(3))
    far_q.copy_(q)
    far_k.copy_(k)
    far_v.copy_(v)
    columns = scattered_columns(1, 2, 40, 40, 32, device=DEVICE)
    got = sparse_attention(far_q, far_k, far_v, columns, None, 1, 0.3, SMALL)
    check_sparse(got, q, k, v, columns, None, 1, 0.3)

"""The dense and the column-sum attention kernels against the reference, in the interpreter or on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from chipmunk_kernels.backends.triton.colsum_attention import (
    ColsumAttentionSettings,
    colsum_attention,
    keys_per_program,
    query_tiles,
)
from chipmunk_kernels.backends.triton.dense_attention import DenseAttentionSettings, dense_attention
from chipmunk_kernels.backends.triton.sparse_attention import SparseAttentionSettings, sparse_attention
from chipmunk_kernels.columns import ColumnSet
from reference import attention as truth
from tests.factories import attention_inputs, max_error, randn
from tests.triton_attention.cases import DEVICE, DTYPES, EXACT, check, fused_qkv, run

DENSE = DenseAttentionSettings(block_m=64, block_n=32, num_warps=4)
COLSUM = ColsumAttentionSettings(block_m=64, block_n=32, num_warps=4)
OVERLAPS = pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "in order"])


Length = int | Tensor | None


def check_dense(
    got: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, length: Length, scale: float
) -> None:
    exact = truth.dense_attention(q.double(), k.double(), v.double(), length, scale)
    check(got, exact, truth.dense_attention(q, k, v, length, scale), q.dtype)


def check_colsum(
    got: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prev: Tensor,
    group_size: int,
    length: Length,
    scale: float,
) -> None:
    q64, k64, v64, prev64 = q.double(), k.double(), v.double(), prev.double()
    exact = truth.colsum_attention(q64, k64, v64, prev64, group_size, length, scale)
    check(got, exact, truth.colsum_attention(q, k, v, prev, group_size, length, scale), q.dtype)


def previous_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Normalisers of slightly different queries, as the full step before would leave them."""
    drift = 1 + 0.1 * randn(*q.shape, device=DEVICE, seed=11)
    return truth.dense_attention(q.float() * drift, k.float(), v.float(), None, scale)[1]


LENGTHS: dict[str, Length] = {
    "all": None,
    "70": 70,
    "1": 1,
    "0": 0,
    "int32": torch.tensor([64, 0], dtype=torch.int32),
    "int64": torch.tensor([33, 71], dtype=torch.int64),
    "expanded": torch.tensor([50], dtype=torch.int32).expand(2),
}


def key_length(name: str) -> Length:
    length = LENGTHS[name]
    return length.to(DEVICE) if isinstance(length, Tensor) else length


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(193, 64), (65, 128), (1, 16)])
@pytest.mark.parametrize("length", ["all", "int32"])
@OVERLAPS
def test_dense_matches_the_reference(
    overlap: bool, rows: int, width: int, length: str, dtype: torch.dtype
) -> None:
    q, k, v = attention_inputs(2, 1, rows, 71, width, dtype=dtype, device=DEVICE, strided=True, seed=rows)
    n = key_length(length)
    settings = replace(DENSE, overlap=overlap)
    check_dense(run(dense_attention, q, k, v, n, 0.2, settings), q, k, v, n, 0.2)


@pytest.mark.parametrize("length", LENGTHS)
def test_key_length(length: str) -> None:
    """Integers and device tensors, zero included: keys past the length (NaN here) are not read."""
    q, k, v = attention_inputs(2, 1, 40, 71, 32, dtype=EXACT, device=DEVICE)
    n = key_length(length)
    prev = previous_lse(q, k, v, 0.2)
    limits = torch.as_tensor(71 if n is None else n, device=DEVICE).expand(2)
    beyond = torch.arange(71, device=DEVICE) >= limits[:, None]
    poison = beyond[:, None, :, None]
    bad_k, bad_v = k.masked_fill(poison, torch.nan), v.masked_fill(poison, torch.nan)
    check_dense(run(dense_attention, q, bad_k, bad_v, n, 0.2, DENSE), q, k, v, n, 0.2)
    got = run(colsum_attention, q, bad_k, bad_v, prev, 32, n, 0.2, COLSUM)
    check_colsum(got, q, k, v, prev, 32, n, 0.2)
    assert bool((got[2].masked_select(beyond[:, None, None].expand_as(got[2])) == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "group_size", "width"),
    [(193, 64, 64), (130, 128, 128), (193, 192, 64), (257, 256, 32), (60, 48, 32), (35, 16, 16), (1, 64, 64)],
)
@OVERLAPS
def test_colsum_matches_the_reference(
    overlap: bool, rows: int, group_size: int, width: int, dtype: torch.dtype
) -> None:
    """Groups of one row tile, of several, and of no whole number of them."""
    q, k, v = attention_inputs(2, 1, rows, 71, width, dtype=dtype, device=DEVICE, strided=True, seed=rows)
    prev = previous_lse(q, k, v, 0.2)
    settings = replace(COLSUM, overlap=overlap)
    got = run(colsum_attention, q, k, v, prev, group_size, None, 0.2, settings)
    check_colsum(got, q, k, v, prev, group_size, None, 0.2)


@pytest.mark.parametrize("length", [None, 1500, 1024])
def test_columns_of_several_programs(length: int | None) -> None:
    """Enough columns that a group's are shared out, and a length that ends within or between the shares."""
    assert keys_per_program(2500, 1, COLSUM.mass_keys) < 1024
    q, k, v = attention_inputs(1, 1, 40, 2500, 16, dtype=EXACT, device=DEVICE)
    prev = previous_lse(q, k, v, 0.2)
    got = run(colsum_attention, q, k, v, prev, 64, length, 0.2, COLSUM)
    check_colsum(got, q, k, v, prev, 64, length, 0.2)


@pytest.mark.parametrize("columns", [1, 64, 65, 4352, 118656])
@pytest.mark.parametrize("programs", [1, 816, 15000])
@pytest.mark.parametrize("block_n", [64, 128])
def test_programs_cover_the_columns_in_whole_tiles(columns: int, programs: int, block_n: int) -> None:
    chunk = keys_per_program(columns, programs, block_n)
    assert chunk % block_n == 0 and 0 < chunk <= 8192 + block_n
    assert (-(-columns // chunk) - 1) * chunk < columns


def test_query_tiles_cover_their_rows() -> None:
    assert [query_tiles(rows) for rows in (1, 64, 100, 128, 129, 192, 256, 300)] == [
        (16, 0), (64, 0), (128, 0), (128, 0), (128, 16), (128, 64), (128, 128), (128, 128),
    ]  # fmt: skip


@pytest.mark.parametrize("length", [None, 45])
def test_mass_against_its_own_normaliser_sums_to_the_rows(length: int | None) -> None:
    q, k, v = attention_inputs(1, 2, 100, 71, 32, dtype=EXACT, device=DEVICE)
    lse = dense_attention(q, k, v, length, 0.2, DENSE)[1]
    mass = colsum_attention(q, k, v, lse, 48, length, 0.2, COLSUM)[2]
    rows = torch.tensor([48.0, 48.0, 4.0], device=DEVICE).expand(1, 2, 3)
    torch.testing.assert_close(mass.sum(-1), rows, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [-0.4, 0.0, 40.0])
def test_any_scale(scale: float) -> None:
    q, k, v = attention_inputs(1, 2, 40, 70, 32, dtype=EXACT, device=DEVICE)
    check_dense(run(dense_attention, q, k, v, None, scale, DENSE), q, k, v, None, scale)
    prev = truth.dense_attention(q.float(), k.float(), v.float(), None, scale)[1] - 3.0
    got = run(colsum_attention, q, k, v, prev, 32, None, scale, COLSUM)
    check_colsum(got, q, k, v, prev, 32, None, scale)


def test_mass_saturates_where_it_would_overflow() -> None:
    """Logits 400 above the previous normaliser: the true mass is past float32, ours stays finite."""
    q, k, v = attention_inputs(1, 1, 16, 40, 32, dtype=EXACT, device=DEVICE)
    lse = dense_attention(q, k, v, None, 1.0, DENSE)[1]
    mass = run(colsum_attention, q, k, v, lse - 400.0, 16, None, 1.0, COLSUM)[2]
    calm = colsum_attention(q, k, v, lse, 16, None, 1.0, COLSUM)[2]
    assert bool(torch.isfinite(mass).all())
    assert float(mass.max()) > 1e33
    assert bool((run(colsum_attention, q, k, v, lse + 400.0, 16, None, 1.0, COLSUM)[2] == 0).all())
    assert bool(torch.isfinite(calm).all())


def test_slices_of_a_fused_projection() -> None:
    q, k, v = fused_qkv(2, 3, 50, 32, EXACT)
    out, lse = run(dense_attention, q, k, v, None, 0.3, DENSE)
    check_dense((out, lse), q, k, v, None, 0.3)
    assert out.transpose(1, 2).is_contiguous(), "the output lies in memory as the queries do"
    prev = previous_lse(q, k, v, 0.3)
    got = run(colsum_attention, q, k, v, prev, 32, None, 0.3, COLSUM)
    check_colsum(got, q, k, v, prev, 32, None, 0.3)


def test_full_columns_equal_dense_and_colsum() -> None:
    """The three kernels agree on the dense problem, and repeat themselves bit for bit."""
    q, k, v = attention_inputs(1, 2, 70, 90, 64, dtype=EXACT, device=DEVICE)
    dense = dense_attention(q, k, v, None, 0.2, DENSE)
    full = ColumnSet.full(1, 2, 70, 90, 64, DEVICE)
    sparse = sparse_attention(q, k, v, full, None, 1, 0.2, SparseAttentionSettings(64, 32, 4))
    colsum = colsum_attention(q, k, v, dense[1], 64, None, 0.2, COLSUM)
    for other in (sparse, colsum[:2]):
        assert max_error(other[0], dense[0]) < 4e-3 and max_error(other[1], dense[1]) < 1e-4
    again = colsum_attention(q, k, v, dense[1], 64, None, 0.2, COLSUM)
    assert all(torch.equal(a, b) for a, b in zip(colsum, again, strict=True))


def test_empty_sequences() -> None:
    q, k, v = attention_inputs(1, 2, 20, 0, 32, dtype=EXACT, device=DEVICE)
    out, lse = run(dense_attention, q, k, v, None, 0.3, DENSE)
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())
    out, lse, mass = run(colsum_attention, q, k, v, lse, 16, None, 0.3, COLSUM)
    assert bool((out == 0).all()) and mass.shape == (1, 2, 2, 0)
    out, lse = run(dense_attention, q[:, :, :0], k, v, None, 0.3, DENSE)
    assert out.shape == (1, 2, 0, 32)

"""Gathering and scattering columns: exact moves, so exact comparisons."""

from __future__ import annotations

import pytest
import torch

from chipmunk_kernels import ColumnSet, gather_columns, scatter_columns
from reference import gather as reference
from tests.factories import poisoned, randn, scattered_columns

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_gather_takes_the_same_table_for_every_group(
    strided: bool, dtype: torch.dtype, device: torch.device, backend: str
) -> None:
    x = randn(3, 2, 90, 64, dtype=dtype, device=device)
    if strided:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    columns = scattered_columns(3, 2, 150, 90, 64, device=device)
    packed = gather_columns(x, columns, backend=backend)
    assert packed.is_contiguous()
    assert torch.equal(packed, reference.gather_columns(x, columns.indices, columns.counts, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 63, 64, 191])
def test_gather_per_group_takes_the_rows_a_group_owns(
    rows: int, dtype: torch.dtype, device: torch.device, backend: str
) -> None:
    x = randn(2, 2, 90, rows, dtype=dtype, device=device)
    columns = scattered_columns(2, 2, rows, 90, 64, device=device)
    packed = gather_columns(x, columns, per_group=True, backend=backend)
    assert torch.equal(packed, reference.gather_columns(x, columns.indices, columns.counts, 64, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("rows", [1, 63, 64, 191])
def test_scatter_writes_kept_entries_and_nothing_else(
    rows: int, accumulate: bool, dtype: torch.dtype, device: torch.device, backend: str
) -> None:
    columns = scattered_columns(2, 2, rows, 90, 64, device=device, seed=rows)
    # Padding slots and rows past the last hold NaN, which must not reach the output.
    packed = randn(*columns.indices.shape, 64, dtype=dtype, device=device)
    packed = packed.masked_fill(~columns.kept().unsqueeze(-1), float("nan"))
    packed[:, :, -1, :, rows - 64 * (columns.groups - 1) :] = float("nan")
    out = randn(2, 2, 90, rows, dtype=dtype, device=device, seed=1)
    expected = reference.scatter_columns(packed, columns.indices, columns.counts, 64, out, accumulate)
    returned = scatter_columns(packed, columns, out, accumulate=accumulate, backend=backend)
    assert returned is out
    assert torch.equal(out, expected)


def test_scatter_undoes_a_gather(device: torch.device, backend: str) -> None:
    x = randn(1, 2, 90, 130, device=device)
    columns = scattered_columns(1, 2, 130, 90, 64, device=device)
    out = poisoned(1, 2, 90, 130, device=device)
    scatter_columns(gather_columns(x, columns, per_group=True), columns, out, backend=backend)
    owner = torch.arange(130, device=device) // 64
    kept = columns.to_mask(90)[:, :, owner].transpose(2, 3)
    assert torch.equal(out[kept], x[kept])
    assert bool(out[~kept].isnan().all())


def test_an_empty_set_moves_nothing(device: torch.device, backend: str) -> None:
    columns = ColumnSet.from_lists([[[[], []]]], group_size=64, device=device)
    x = randn(1, 1, 20, 100, device=device)
    assert gather_columns(x, columns, per_group=True, backend=backend).shape == (1, 1, 2, 0, 64)
    out = x.clone()
    packed = torch.empty(1, 1, 2, 0, 64, device=device)
    assert torch.equal(scatter_columns(packed, columns, out, backend=backend), x)

"""Gather, scatter and group mean against the reference: moving data is exact."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from chipmunk_kernels.backends.triton.gather import (
    GatherSettings,
    GroupMeanSettings,
    gather_columns,
    group_mean,
    scatter_columns,
)
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.problem import Problem
from reference import gather as truth
from reference.group_mean import group_mean as true_mean
from tests.factories import assert_within_budget, poisoned, randn, scattered_columns
from tests.triton_mlp.cases import DEVICE, DTYPES, poisoned_memory

SETTINGS = GatherSettings(block_columns=16, num_warps=2)
MEAN = GroupMeanSettings(block_width=64, block_rows=8, num_warps=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 72, 128, 300])
def test_rows_of_a_table(width: int, dtype: torch.dtype) -> None:
    """Keys and values: a transposed view, so strided in every dimension but the last."""
    x = randn(2, 90, 3, width, dtype=dtype, device=DEVICE).transpose(1, 2)
    columns = scattered_columns(2, 3, 130, 90, 64, device=DEVICE)
    with poisoned_memory():
        packed = gather_columns(x, columns, False, SETTINGS)
    expected = truth.gather_columns(x, columns.indices, columns.counts, columns.group_size)
    torch.testing.assert_close(packed, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("across", [0, 1])
@pytest.mark.parametrize(("rows", "group_size"), [(193, 64), (128, 128), (50, 192), (24, 7)])
def test_each_group_takes_and_returns_its_own_rows(
    rows: int, group_size: int, across: int, dtype: torch.dtype
) -> None:
    settings = dataclasses.replace(SETTINGS, across=across)
    x = randn(2, 40, 2, rows, dtype=dtype, device=DEVICE).transpose(1, 2)
    columns = scattered_columns(2, 2, rows, 40, group_size, device=DEVICE)
    lists = (columns.indices, columns.counts, group_size)
    with poisoned_memory():
        packed = gather_columns(x, columns, True, settings)
    torch.testing.assert_close(packed, truth.gather_columns(x, *lists, True), rtol=0, atol=0)
    # Padding slots and rows past the last must not be read.
    packed[~columns.kept()] = float("nan")
    packed[:, :, -1, :, rows - (columns.groups - 1) * group_size :] = float("nan")
    for accumulate in (False, True):
        out = randn(2, 40, 2, rows, dtype=dtype, device=DEVICE, seed=9).transpose(1, 2)
        expected = truth.scatter_columns(packed, *lists, out, accumulate)
        scatter_columns(packed, columns, out, accumulate, settings)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_a_packed_block_may_be_strided() -> None:
    columns = scattered_columns(1, 2, 40, 30, 16, device=DEVICE)
    wide = randn(*columns.indices.shape, 32, device=DEVICE)
    packed, out = wide[..., :16], randn(1, 2, 30, 40, device=DEVICE)
    expected = truth.scatter_columns(packed, columns.indices, columns.counts, 16, out)
    scatter_columns(packed, columns, out, False, SETTINGS)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_groups_that_keep_nothing() -> None:
    empty = ColumnSet.from_lists([[[[], []]]], 8, DEVICE)
    assert gather_columns(randn(1, 1, 5, 12, device=DEVICE), empty, False, SETTINGS).shape == (1, 1, 2, 0, 12)
    roomy = ColumnSet(torch.full((1, 1, 2, 3), 4, dtype=torch.int32, device=DEVICE), empty.counts, 8)
    with poisoned_memory():
        assert not gather_columns(randn(1, 1, 5, 12, device=DEVICE), roomy, True, SETTINGS).any()
    out = randn(1, 1, 5, 12, device=DEVICE)
    before = out.clone()
    scatter_columns(poisoned(1, 1, 2, 3, 8, device=DEVICE), roomy, out, True, SETTINGS)
    assert torch.equal(out, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "group_size"), [(193, 64), (64, 64), (5, 192), (30, 1)])
def test_group_mean(rows: int, group_size: int, dtype: torch.dtype) -> None:
    x = randn(2, rows, 2, 70, dtype=dtype, device=DEVICE)[:, :, 1]
    with poisoned_memory():
        mean = group_mean(x, group_size, MEAN)
    assert mean.dtype == dtype
    assert_within_budget(mean, true_mean(x.double(), group_size), true_mean(x, group_size))


def test_settings_say_what_does_not_fit() -> None:
    problem = Problem("gather_columns", rows=128, columns=100, width=64, density=0.2)
    assert GatherSettings(block_columns=32).misfit(problem) is None
    assert "20 kept" in str(GatherSettings(block_columns=64).misfit(problem))
    assert "64 features" in str(GroupMeanSettings(block_width=512).misfit(problem))

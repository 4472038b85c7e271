"""gather.cu and its host code, run as C++ on the host, against the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy import gather
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.problem import Problem
from reference import gather as truth
from tests.cupy_backend.emulate import COMPILER, Emulator
from tests.factories import randn, scattered_columns
from tests.triton_mlp.cases import poisoned_memory

SETTINGS = gather.GatherSettings(block_columns=8, threads=64, in_flight=2)


@pytest.fixture(scope="module")
def emulator(compiled: Path) -> Emulator:
    if COMPILER is None:
        pytest.skip("no C++ compiler on PATH")
    return Emulator(compiled)


@pytest.fixture(autouse=True)
def _on_the_host(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "load", emulator.load)
    monkeypatch.setattr(gather, "launch", emulator.launch)


def packed_and_back(x: Tensor, columns: ColumnSet, adds: bool) -> None:
    """Gather each group's own rows, then scatter them into another table, against the reference."""
    lists = (columns.indices, columns.counts, columns.group_size)
    with poisoned_memory():
        packed = gather.gather_columns(x, columns, True, SETTINGS)
    torch.testing.assert_close(packed, truth.gather_columns(x, *lists, True), rtol=0, atol=0)
    packed[~columns.kept()] = float("nan")
    rows = x.shape[3]
    packed[:, :, -1, :, rows - (columns.groups - 1) * columns.group_size :] = float("nan")
    for accumulate in (False, True) if adds else (False,):
        out = torch.empty_like(x).copy_(randn(*x.shape, dtype=x.dtype, seed=5))
        expected = truth.scatter_columns(packed, *lists, out, accumulate)
        gather.scatter_columns(packed, columns, out, accumulate, SETTINGS)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "rows", "group_size", "vector"),
    [
        (torch.bfloat16, 192, 64, 16),  # everything aligned
        (torch.bfloat16, 200, 64, 16),  # a ragged last group of whole vectors
        (torch.float32, 68, 64, 16),
        (torch.bfloat16, 50, 12, 4),  # rows of 100 bytes
        (torch.float16, 193, 24, 2),  # odd rows: element by element
        (torch.bfloat16, 40, 192, 16),  # a group larger than all rows
    ],
    ids=str,
)
def test_each_group_takes_and_returns_its_own_rows(
    dtype: torch.dtype, rows: int, group_size: int, vector: int, emulator: Emulator
) -> None:
    x = randn(2, 60, 2, rows, dtype=dtype).transpose(1, 2)
    columns = scattered_columns(2, 2, rows, 60, group_size)
    assert gather.vector_bytes(x, x, x, group_size) == vector
    packed_and_back(x, columns, adds=dtype is not torch.float16)


def test_a_vector_that_the_last_row_cuts() -> None:
    """R = 196 in a table whose rows are 200 wide: vectors are whole, the last one only half exists."""
    x = randn(1, 2, 60, 200, dtype=torch.bfloat16)[..., :196]
    assert gather.vector_bytes(x, x, x, 64) == 16
    packed_and_back(x, scattered_columns(1, 2, 196, 60, 64), adds=True)


@pytest.mark.parametrize(
    ("width", "dtype"), [(128, torch.bfloat16), (72, torch.float32), (5, torch.bfloat16)]
)
def test_rows_of_a_table(width: int, dtype: torch.dtype) -> None:
    x = randn(2, 90, 3, width, dtype=dtype).transpose(1, 2)
    columns = scattered_columns(2, 3, 130, 90, 64)
    with poisoned_memory():
        packed = gather.gather_columns(x, columns, False, SETTINGS)
    expected = truth.gather_columns(x, columns.indices, columns.counts, columns.group_size)
    torch.testing.assert_close(packed, expected, rtol=0, atol=0)


def test_bfloat16_sums_round_as_torch_does() -> None:
    """To nearest even, with infinities, subnormals and NaN."""
    everything = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(1, 1, 512, 128)
    columns = ColumnSet.full(1, 1, 128, 512, 128)
    for seed in range(3):
        out = randn(1, 1, 512, 128, dtype=torch.bfloat16, seed=seed, scale=10.0**seed)
        expected = out + everything
        gather.scatter_columns(everything.unsqueeze(2), columns, out, True, SETTINGS)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_nothing_kept_launches_nothing() -> None:
    empty = ColumnSet.from_lists([[[[], []]]], 8)
    assert gather.gather_columns(randn(1, 1, 5, 12), empty, False, SETTINGS).shape == (1, 1, 2, 0, 12)


def test_settings_say_what_does_not_fit() -> None:
    problem = Problem("gather_columns", rows=128, columns=1000, width=128, density=0.2)
    assert gather.GatherSettings().misfit(problem) is None
    assert "exceed" in str(gather.GatherSettings(block_columns=8, threads=256, in_flight=8).misfit(problem))

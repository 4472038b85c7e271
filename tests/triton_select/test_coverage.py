"""Coverage selection: the fewest best columns that hold a share of the mass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chipmunk_kernels.backends.triton.select import coverage_columns
from chipmunk_kernels.ops.select import COVERAGE_SLACK
from reference import select as truth
from tests.triton_select.cases import DEVICE, SMALL, always_mask, assert_same_columns

GROUP_SIZE = 64
ROUNDING = 1e-5
"""Of the total: float32 sums of a few hundred terms are good to about 1e-6."""


def counted_scores(*shape: int) -> Tensor:
    """Small whole numbers with many ties: every float32 sum of them is exact, so the answer is unique."""
    return torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(1)).float().to(DEVICE)


@pytest.mark.parametrize("coverage", [0.0, 0.25, 0.5, 0.875, 1.0])
@pytest.mark.parametrize("kept", [False, True], ids=["scores", "kept"])
def test_matches_the_reference_where_sums_are_exact(coverage: float, kept: bool) -> None:
    scores, length = counted_scores(1, 2, 3, 300), 290
    limit = 40 if coverage == 0.875 else 300
    scores[0, 0, 0] = 0.0
    scores[0, 1, 1, 5:20] = float("nan")
    keep, window = (((3, 9), (100, 130)), 4) if kept else ((), 0)
    always = always_mask(3, 300, GROUP_SIZE, keep, window, length)
    got = coverage_columns(scores, coverage, limit, always, 3, 99, length, 300, SMALL)
    expected = truth.coverage_columns(scores.cpu(), coverage, GROUP_SIZE, limit, keep, window, 3, 99, length)
    assert_same_columns(got, expected, 300)


@settings(max_examples=15, deadline=None)
@given(
    row=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=150),
    coverage=st.floats(0, 1),
    first=st.integers(0, 150),
)
def test_the_fewest_best_columns_that_reach_it(row: list[float], coverage: float, first: int) -> None:
    """To rounding: what is kept reaches the goal, less would not, and nothing better is left out."""
    columns = len(row)
    scores = torch.tensor(row, dtype=torch.float32, device=DEVICE).view(1, 1, 1, columns)
    keep = [(min(first, columns), min(first + 5, columns))]
    always = always_mask(1, columns, GROUP_SIZE, keep, 0, columns)
    assert always is not None
    indices, counts = coverage_columns(scores, coverage, columns, always, 0, 0, columns, columns, SMALL)
    kept = indices[0, 0, 0, : int(counts)].tolist()
    granted = always[0].nonzero()[:, 0].tolist()
    assert set(granted) <= set(kept)
    chosen = sorted((row[n], -n) for n in set(kept) - set(granted))
    rest = sorted((row[n], -n) for n in set(range(columns)) - set(kept))
    assert not chosen or not rest or rest[-1] < chosen[0]
    total = sum(row)
    goal, covered, slack = coverage * total, sum(row[n] for n in kept), ROUNDING * total
    assert covered >= goal - slack
    assert not chosen or covered - chosen[0][0] <= goal + slack


def test_full_coverage_keeps_every_column_with_mass() -> None:
    """Also mass that a float32 sum would round away."""
    scores = torch.zeros(1, 1, 1, 200, device=DEVICE)
    scores[..., 7], scores[..., 100], scores[..., 150] = 1e6, 1e-6, 1e-30
    indices, counts = coverage_columns(scores, 1.0, 200, None, 0, 0, 200, 200, SMALL)
    assert indices[0, 0, 0, : int(counts)].tolist() == [7, 100, 150]


def needs(total: np.ndarray, granted: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """What the others must hold in float32, as two roundings and as the one of a fused multiply-add.

    A GPU fuses and the interpreter does not. float64 holds these products exactly.
    """
    product = total * np.float64(np.float32(share))
    apart = product.astype(np.float32) - granted.astype(np.float32)
    return apart, (product - granted).astype(np.float32)


def needless(need: np.ndarray, exact: np.ndarray) -> bool:
    """Whether a row of whole numbers that hold exactly what is needed would be asked for a column more."""
    return bool((need > exact).any())


@pytest.mark.parametrize("tenths", range(1, 10))
def test_no_rounding_asks_for_more_than_an_exact_share(tenths: int) -> None:
    """Every total of up to 40 000 of which the share is a whole number, with always-kept mass or without."""
    total = np.arange(10, 40_000, 10, dtype=np.float64)
    goal = total * tenths // 10
    for part in (0.0, 0.1, 0.5, 0.9):
        granted = np.floor(goal * part)
        for need in needs(total, granted, tenths / 10 * (1 - COVERAGE_SLACK)):
            assert not needless(need, goal - granted)
            assert (need > goal - granted - 1).all(), "nor for less"


def test_without_the_slack_roundings_disagree() -> None:
    """The row that an H200 gave 55 columns, not 54: 0.6 of 7495 are 4497, of which 439 are kept anyway."""
    apart, fused = needs(np.array([7495.0]), np.array([439.0]), 0.6)
    assert not needless(apart, np.array([4058.0])) and needless(fused, np.array([4058.0]))
    for need in needs(np.array([45.0]), np.array([0.0]), 0.6):
        assert needless(need, np.array([27.0])), "float32's 0.6 is too large"


@pytest.mark.parametrize("columns", [45, 16385])
def test_an_exact_share_of_equal_scores(columns: int) -> None:
    """In registers and by radix search."""
    scores, share = torch.ones(1, 1, 1, columns, device=DEVICE), 0.6 * (1 - COVERAGE_SLACK)
    _, counts = coverage_columns(scores, share, columns, None, 0, 0, columns, columns, SMALL)
    assert counts.item() == columns * 6 // 10

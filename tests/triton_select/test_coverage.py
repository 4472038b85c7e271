"""Coverage selection: the fewest best columns that hold a share of the mass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chipmunk_kernels.backends.triton.select import coverage_columns
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

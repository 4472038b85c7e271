"""Column selection against the reference, exactly: which columns, in which order, how many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chipmunk_kernels import ColumnSet, columns_from_mask, coverage_columns, topk_columns
from chipmunk_kernels.backends.torch.select import SelectSettings
from reference import select as reference
from tests.factories import randn

N, GROUPS, GROUP_SIZE = 97, 3, 40
EXTRAS: list[dict[str, Any]] = [
    {},
    {"keep": [(0, 5), (3, 9), (90, 97)]},
    {"window": 3},
    {"random": 7, "seed": 5},
    {"key_length": 50},
    {"keep": [(40, 60)], "window": 9, "random": 11, "seed": -3, "key_length": 80},
]


def with_ties(device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Small integers as scores: many ties, and sums that no rounding touches."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 6, (2, 2, GROUPS, N), generator=rng).float().to(device)


def assert_same(found: ColumnSet, expected: tuple[Tensor, Tensor], columns: int = N) -> None:
    found.validate(found.groups * found.group_size, columns)
    right = ColumnSet(expected[0], expected[1], found.group_size)
    assert torch.equal(found.counts.cpu(), right.counts)
    assert torch.equal(found.to_mask(columns).cpu(), right.to_mask(columns))


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("k", [0, 1, 20, 90, N, 2 * N])
def test_topk_keeps_the_best_with_ties_to_the_lower_index(
    k: int, extras: dict[str, Any], device: torch.device, backend: str
) -> None:
    scores = with_ties(device)
    found = topk_columns(scores, k, group_size=GROUP_SIZE, **extras, backend=backend)
    assert_same(found, reference.topk_columns(scores.cpu(), k, GROUP_SIZE, **extras))


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("coverage", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("max_columns", [None, 13])
def test_coverage_keeps_the_fewest_that_reach_it(
    coverage: float, max_columns: int | None, extras: dict[str, Any], device: torch.device, backend: str
) -> None:
    scores = with_ties(device)
    arguments = {"max_columns": max_columns, **extras}
    found = coverage_columns(scores, coverage, group_size=GROUP_SIZE, **arguments, backend=backend)
    assert_same(found, reference.coverage_columns(scores.cpu(), coverage, GROUP_SIZE, **arguments))


@pytest.mark.parametrize("coverage", [0.07, 0.1, 0.29, 0.6, 0.7, 0.9])
def test_a_share_that_columns_hold_exactly_asks_for_no_more(
    coverage: float, device: torch.device, backend: str
) -> None:
    """Float64's 0.07 of 100 is above 7; float32's 0.6 of 10 is above 6."""
    for columns in (10, 100, 700, 5000, 20_000):
        scores = torch.ones(1, 1, 2, columns, device=device)
        found = coverage_columns(scores, coverage, group_size=GROUP_SIZE, keep=[(0, 5)], backend=backend)
        least = max(5, -(-round(100 * coverage) * columns // 100))
        assert found.counts.tolist() == [[[least, least]]], columns


@pytest.mark.parametrize("capacity", [None, 0, 10, 200])
def test_a_mask_becomes_its_columns(capacity: int | None, device: torch.device, backend: str) -> None:
    mask = randn(2, 2, GROUPS, N, device=device) > 0.7
    mask[0, 0, 0], mask[1, 1, 2] = False, True
    found = columns_from_mask(mask, group_size=GROUP_SIZE, capacity=capacity, backend=backend)
    assert_same(found, reference.columns_from_mask(mask.cpu(), capacity))
    if capacity is None:
        assert torch.equal(found.to_mask(N), mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_special_scores_have_their_order(dtype: torch.dtype, device: torch.device, backend: str) -> None:
    """+inf first, −0 ties with 0, −inf before NaN, NaN last."""
    row = [0.0, float("nan"), -0.0, float("inf"), float("-inf"), 1.0, -2.0]
    scores = torch.tensor(row, dtype=dtype, device=device).view(1, 1, 1, -1)
    best_first = [3, 5, 0, 2, 6, 4, 1]
    for k in range(len(row) + 1):
        found = topk_columns(scores, k, group_size=8, backend=backend)
        assert found.indices[0, 0, 0].tolist() == sorted(best_first[:k])


def test_random_extras_follow_the_seed_alone(device: torch.device, backend: str) -> None:
    """The same draw for another score, batch size or sequence length; another for another seed or group."""
    scores = randn(2, 2, GROUPS, N, device=device)

    def draw(scores: Tensor, seed: int) -> ColumnSet:
        return topk_columns(scores, 0, group_size=GROUP_SIZE, random=10, seed=seed, backend=backend)

    first = draw(scores, 1)
    assert torch.equal(first.indices, draw(-scores, 1).indices)
    assert torch.equal(first.indices[:1], draw(scores[:1], 1).indices)
    assert not torch.equal(first.indices, draw(scores, 2).indices)
    assert len({tuple(row) for row in first.indices.reshape(-1, 10).tolist()}) == 2 * 2 * GROUPS


def test_random_extras_are_spread_evenly(backend: str, device: torch.device) -> None:
    scores = torch.zeros(1, 8, 40, 50, device=device)
    drawn = topk_columns(scores, 0, group_size=1, random=5, backend=backend)
    share = drawn.to_mask(50).float().mean((0, 1, 2))  # each column's chance is 0.1 in 320 draws: σ = 0.017
    assert float(share.min()) > 0.02 and float(share.max()) < 0.19


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 40)),
    k=st.integers(0, 45),
    random=st.integers(0, 45),
    window=st.integers(0, 9),
    group_size=st.integers(1, 20),
    seed=st.integers(-(2**40), 2**40),
    data=st.data(),
)
def test_any_selection_equals_the_reference(
    shape: tuple[int, int, int, int],
    k: int,
    random: int,
    window: int,
    group_size: int,
    seed: int,
    data: st.DataObject,
) -> None:
    columns = shape[3]
    edges = st.lists(st.integers(0, columns), min_size=2, max_size=2).map(sorted)
    keep = [tuple(span) for span in data.draw(st.lists(edges, max_size=2))]
    length = data.draw(st.one_of(st.none(), st.integers(0, columns)))
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, shape, generator=rng).float()
    extras: dict[str, Any] = {
        "keep": keep,
        "window": window,
        "random": random,
        "seed": seed,
        "key_length": length,
    }
    found = topk_columns(scores, k, group_size=group_size, **extras)
    assert_same(found, reference.topk_columns(scores, k, group_size, **extras), columns)
    coverage = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    covered = coverage_columns(scores, coverage, group_size=group_size, **extras)
    assert_same(covered, reference.coverage_columns(scores, coverage, group_size, **extras), columns)
    mask = found.to_mask(columns)
    assert torch.equal(columns_from_mask(mask, group_size=group_size).to_mask(columns), mask)


@pytest.mark.parametrize("extras", EXTRAS)
def test_no_more_room_is_taken_than_can_be_kept(extras: dict[str, Any]) -> None:
    found = topk_columns(with_ties(), 20, group_size=GROUP_SIZE, **extras)
    most = int(found.counts.max())
    window_room = GROUP_SIZE + 2 * extras.get("window", 0) if extras.get("window") else 0
    assert most <= found.capacity <= most + window_room


def test_blocks_of_groups_give_the_same_answer() -> None:
    """A scratch so small that every group is a block of its own."""
    scores = randn(2, 3, 4, 50_000)
    small, large = SelectSettings(scratch_mib=1), SelectSettings(scratch_mib=512)
    arguments: dict[str, Any] = {"group_size": 64, "random": 30, "keep": [(10, 20)], "backend": "torch"}
    one = topk_columns(scores, 500, settings=small, **arguments)
    other = topk_columns(scores, 500, settings=large, **arguments)
    assert torch.equal(one.indices, other.indices) and torch.equal(one.counts, other.counts)


def test_coverage_is_reached_by_random_scores_and_not_sooner() -> None:
    scores = torch.rand(1, 2, 5, 1000, generator=torch.Generator().manual_seed(3)) ** 4
    found = coverage_columns(scores, 0.6, group_size=64)
    mask, total = found.to_mask(1000), scores.double().sum(-1)
    kept = torch.where(mask, scores.double(), 0.0)
    assert bool((kept.sum(-1) >= 0.6 * total * (1 - 2e-6)).all())
    least = torch.where(mask, scores.double(), float("inf")).amin(-1)
    assert bool((kept.sum(-1) - least < 0.6 * total * (1 + 1e-9)).all())

"""Exact top-k, always-kept columns and random extras, against the reference's sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chipmunk_kernels.backends.triton.select import SelectSettings, columns_from_mask, topk_columns
from chipmunk_kernels.problem import Problem
from reference import select as truth
from tests.triton_select.cases import DEVICE, SMALL, always_mask, assert_same_columns, awkward_scores

GROUP_SIZE = 100
KEEP = ((3, 9), (200, 210))


@pytest.mark.parametrize(
    ("k", "random", "bits"),
    [(0, 0, 8), (1, 0, 8), (20, 0, 4), (20, 7, 8), (0, 5, 4), (250, 20, 8), (300, 300, 4), (284, 1, 8)],
)
def test_matches_the_reference(k: int, random: int, bits: int) -> None:
    """k and random from nothing to more than there is, beside kept ranges, a window and a key length."""
    columns, length = 300, 290
    scores = awkward_scores(1, 2, 3, columns, seed=k)
    always = always_mask(3, columns, GROUP_SIZE, KEEP, 4, length)
    got = topk_columns(scores, k, always, random, 12345, length, 300, SelectSettings(block=128, bits=bits))
    expected = truth.topk_columns(scores.cpu(), k, GROUP_SIZE, KEEP, 4, random, 12345, length)
    assert_same_columns(got, expected, columns)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_score_dtype(dtype: torch.dtype) -> None:
    scores = awkward_scores(2, 1, 2, 257, seed=3).to(dtype)
    got = topk_columns(scores, 31, None, 0, 0, 257, 31, SMALL)
    assert_same_columns(got, truth.topk_columns(scores.cpu(), 31, GROUP_SIZE), 257)


def test_equal_scores_keep_the_lowest_indices() -> None:
    scores = torch.zeros(1, 1, 2, 400, device=DEVICE)
    scores[0, 0, 1, ::2] = -0.0
    indices, counts = topk_columns(scores, 130, None, 0, 0, 400, 130, SMALL)
    assert counts.tolist() == [[[130, 130]]]
    assert torch.equal(indices.cpu(), torch.arange(130, dtype=torch.int32).expand(1, 1, 2, 130))


def test_nan_is_kept_last() -> None:
    scores = torch.full((1, 1, 1, 40), float("-inf"), device=DEVICE)
    scores[..., :30] = float("nan")
    indices, _ = topk_columns(scores, 12, None, 0, 0, 40, 12, SMALL)
    assert indices.flatten().tolist() == [0, 1, *range(30, 40)]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, -1])
def test_the_hash_is_the_reference_bit_for_bit(seed: int) -> None:
    """The draw of extras depends on every bit of the hash through its order; scores play no part here."""
    scores = torch.zeros(2, 2, 2, 130, device=DEVICE)
    got = topk_columns(scores, 0, None, 17, seed, 130, 17, SMALL)
    assert_same_columns(got, truth.topk_columns(scores.cpu(), 0, GROUP_SIZE, (), 0, 17, seed), 130)


def test_extras_differ_between_groups_and_seeds() -> None:
    scores = torch.zeros(1, 2, 2, 250, device=DEVICE)
    first, _ = topk_columns(scores, 0, None, 20, 1, 250, 20, SMALL)
    second, _ = topk_columns(scores, 0, None, 20, 2, 250, 20, SMALL)
    rows = {tuple(row) for row in torch.cat([first, second]).view(-1, 20).tolist()}
    assert len(rows) == 8


def test_strided_scores() -> None:
    scores = awkward_scores(2, 2, 2, 100, seed=5)
    expected = truth.topk_columns(scores.cpu(), 20, GROUP_SIZE)
    by_group = scores.transpose(1, 2).contiguous().transpose(1, 2)
    by_column = scores.transpose(2, 3).contiguous().transpose(2, 3)
    for strided in (by_group, by_column):
        assert not strided.is_contiguous()
        assert_same_columns(topk_columns(strided, 20, None, 0, 0, 100, 20, SMALL), expected, 100)


def test_nothing_to_choose_from() -> None:
    scores = torch.rand(1, 1, 2, 50, device=DEVICE)
    indices, counts = topk_columns(scores, 5, None, 3, 0, 0, 8, SMALL)
    assert counts.tolist() == [[[0, 0]]]
    assert not indices.any()


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_row_matches_the_reference(data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 200), label="columns")
    values = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan")]), st.floats(width=32)
    )
    row = data.draw(st.lists(values, min_size=columns, max_size=columns), label="scores")
    length = data.draw(st.integers(0, columns), label="length")
    k, random = (
        data.draw(st.integers(0, columns), label="k"),
        data.draw(st.integers(0, columns), label="random"),
    )
    keep = sorted(data.draw(st.tuples(st.integers(0, columns), st.integers(0, columns)), label="keep"))
    scores = torch.tensor(row, dtype=torch.float32, device=DEVICE).view(1, 1, 1, columns)
    always = always_mask(1, columns, GROUP_SIZE, [(keep[0], keep[1])], 0, length)
    got = topk_columns(scores, k, always, random, 7, length, columns, SMALL)
    expected = truth.topk_columns(scores.cpu(), k, GROUP_SIZE, [(keep[0], keep[1])], 0, random, 7, length)
    assert_same_columns(got, expected, columns)


@pytest.mark.parametrize("capacity", [None, 77, 0])
def test_mask(capacity: int | None) -> None:
    mask = torch.rand(2, 2, 3, 300, device=DEVICE) < 0.4
    mask[0, 0, 0], mask[1, 1, 2] = False, True
    for view in (mask, mask.transpose(2, 3).contiguous().transpose(2, 3)):
        got = columns_from_mask(view, 300 if capacity is None else capacity, SMALL)
        assert_same_columns(got, truth.columns_from_mask(mask.cpu(), capacity), 300)


def test_settings_say_what_does_not_fit() -> None:
    short = Problem("topk_columns", rows=100, columns=1500, width=1)
    assert SelectSettings(block=2048).misfit(short) is None
    assert "1500" in str(SelectSettings(block=4096).misfit(short))
    long = Problem("topk_columns", rows=100, columns=119056, width=1)
    assert "4 warps" in str(SelectSettings(block=8192, num_warps=4).misfit(long))
    assert all(
        default in SelectSettings.space()[name] for name, default in SelectSettings().as_dict().items()
    )

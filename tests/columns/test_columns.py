"""ColumnSet: what it accepts, what it stores, how it reads back."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chipmunk_kernels.columns import ColumnSet, group_count, unpack_mask
from tests.factories import scattered_columns

LISTS = [[[[1, 4], []], [[0], [2, 3, 5]]]]


def column_lists() -> st.SearchStrategy[list[list[list[list[int]]]]]:
    """`[batch][head][group] → columns`, of 7 columns, rectangular in batch, head and group."""
    kept = st.lists(st.integers(0, 6), unique=True, max_size=7)
    return st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)).flatmap(
        lambda shape: st.lists(
            st.lists(
                st.lists(kept, min_size=shape[2], max_size=shape[2]), min_size=shape[1], max_size=shape[1]
            ),
            min_size=shape[0],
            max_size=shape[0],
        )
    )


@settings(max_examples=60, deadline=None)
@given(lists=column_lists())
def test_lists_read_back_as_written(lists: list[list[list[list[int]]]]) -> None:
    columns = ColumnSet.from_lists(lists, group_size=4)
    columns.validate(rows=4 * columns.groups - 1, columns=7)
    mask = columns.to_mask(7)
    read = [[[group.nonzero()[:, 0].tolist() for group in head] for head in batch] for batch in mask]
    assert read == [[[sorted(group) for group in head] for head in batch] for batch in lists]
    kept = sum(len(group) for batch in lists for head in batch for group in head)
    assert columns.density(7) == pytest.approx(kept / columns.counts.numel() / 7)
    assert int(columns.kept().sum()) == kept


@pytest.mark.parametrize("columns", [1, 7, 8, 193, 200])
def test_a_packed_mask_holds_the_same_bits(columns: int, device: torch.device) -> None:
    """Against NumPy's own packing; padding slots, which hold kept columns' indices too, set nothing."""
    chosen = scattered_columns(2, 2, 193, columns, 64, device=device)
    packed = chosen.to_packed_mask(columns)
    mask = chosen.to_mask(columns)
    expected = numpy.packbits(mask.cpu().numpy(), axis=-1, bitorder="little")
    assert packed.dtype == torch.uint8 and packed.shape == (2, 2, 4, -(-columns // 8))
    assert torch.equal(packed.cpu(), torch.from_numpy(expected))
    assert torch.equal(unpack_mask(packed, columns), mask)


def test_what_is_no_packed_mask_is_refused() -> None:
    for wrong in (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="packed: expected uint8 with a last dimension of 2 for 16"):
            unpack_mask(wrong, 16)


def test_the_capacity_is_the_largest_count() -> None:
    columns = ColumnSet.from_lists(LISTS, group_size=4)
    assert (columns.batch, columns.heads, columns.groups, columns.capacity) == (1, 2, 2, 3)
    assert columns.nbytes == 4 * (2 * 2 * 3 + 2 * 2)


def test_full_keeps_everything() -> None:
    columns = ColumnSet.full(2, 3, rows=130, columns=9, group_size=64)
    assert columns.groups == 3 and columns.density(9) == 1.0
    assert bool(columns.to_mask(9).all())


def test_padding_never_clears_a_kept_column() -> None:
    """A padding slot may repeat a kept column's index."""
    columns = ColumnSet(
        torch.tensor([[[[2, 5, 2, 2]]]], dtype=torch.int32), torch.tensor([[[2]]], dtype=torch.int32), 1
    )
    assert columns.to_mask(6)[0, 0, 0].tolist() == [False, False, True, False, False, True]


@pytest.mark.parametrize(("rows", "size", "groups"), [(1, 64, 1), (64, 64, 1), (65, 64, 2), (193, 192, 2)])
def test_the_last_group_may_be_ragged(rows: int, size: int, groups: int) -> None:
    assert group_count(rows, size) == groups


@pytest.mark.parametrize(
    ("indices", "counts", "group_size", "message"),
    [
        (torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1).int(), 1, "indices: expected an int32"),
        (torch.zeros(1, 1, 2).int(), torch.zeros(1, 1, 1).int(), 1, r"indices: .*\(B, H, G, C\)"),
        (torch.zeros(1, 1, 1, 2).int(), torch.zeros(1, 1, 2).int(), 1, r"counts: .*\(1, 1, 1\)"),
        (torch.zeros(1, 1, 1, 2).int(), torch.zeros(1, 1, 1).long(), 1, "counts: expected an int32"),
        (torch.zeros(1, 1, 1, 2).int(), torch.zeros(1, 1, 1).int(), 0, "group_size: expected a positive"),
        (torch.zeros(1, 1, 1, 2).int(), torch.zeros(1, 1, 1).int().to("meta"), 1, "counts: on meta"),
    ],
)
def test_a_wrong_shape_dtype_or_device_is_refused(
    indices: torch.Tensor, counts: torch.Tensor, group_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ColumnSet(indices, counts, group_size)


@pytest.mark.parametrize(
    ("row", "count", "rows", "message"),
    [
        ([0, 1], 3, 1, "counts: expected 0 to the capacity 2, got 3"),
        ([0, 1], -1, 1, "counts: expected 0 to the capacity 2, got -1"),
        ([-1, 1], 2, 1, "indices: expected 0 to 4"),
        ([1, 5], 2, 1, "indices: expected 0 to 4"),
        ([1, 5], 1, 1, "indices: expected 0 to 4"),
        ([3, 1], 2, 1, "ascend strictly"),
        ([3, 3], 2, 1, "ascend strictly"),
        ([0, 1], 2, 9, "make 2 groups, got 1"),
    ],
)
def test_validate_names_a_wrong_value(row: list[int], count: int, rows: int, message: str) -> None:
    columns = ColumnSet(torch.tensor([[[row]]]).int(), torch.tensor([[[count]]]).int(), 8)
    with pytest.raises(ValueError, match=message):
        columns.validate(rows, 5)


def test_validate_accepts_what_is_legal() -> None:
    """Unordered padding, no slots at all, no groups at all."""
    scattered_columns(2, 2, 193, 193, 64).validate(193, 193)
    ColumnSet(torch.zeros(1, 1, 2, 0).int(), torch.zeros(1, 1, 2).int(), 8).validate(9, 5)
    ColumnSet(torch.zeros(0, 1, 2, 3).int(), torch.zeros(0, 1, 2).int(), 8).validate(9, 5)


def test_to_moves_both_parts() -> None:
    moved = ColumnSet.from_lists(LISTS, group_size=4).to("meta")
    assert moved.device == torch.device("meta") and moved.counts.device == moved.device

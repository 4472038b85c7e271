"""The token order: a permutation whose blocks are compact, whatever remains at the border."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chipmunk_kernels.delta.reorder import block_order, raster_grid


@st.composite
def grids_and_patches(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    axes = draw(st.integers(2, 3))
    grid = tuple(draw(st.lists(st.integers(1, 11), min_size=axes, max_size=axes)))
    sides = st.lists(st.integers(1, 6), min_size=axes, max_size=axes).map(tuple)
    return grid, tuple(draw(st.lists(sides, max_size=2)))


@given(grids_and_patches())
def test_round_trip(case: tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]) -> None:
    grid, patch = case
    count = math.prod(grid)
    reorder = block_order(grid, patch)
    assert torch.equal(reorder.order.sort().values, torch.arange(count))
    tokens = torch.arange(2 * count * 3).view(2, count, 3)
    assert torch.equal(reorder.undo(reorder.apply(tokens)), tokens)
    assert torch.equal(reorder.apply(reorder.undo(tokens)), tokens)
    assert torch.equal(reorder.undo(reorder.apply(tokens[0], dim=0), dim=0), tokens[0])


@given(grids_and_patches())
def test_every_block_is_contiguous_and_whole_ones_come_first(
    case: tuple[tuple[int, ...], tuple[tuple[int, ...], ...]],
) -> None:
    """Blocks that the border cuts are compact as well: no token is left unordered."""
    grid, patch = case
    if not patch:
        assert torch.equal(block_order(grid, patch).order, torch.arange(math.prod(grid)))
        return
    sides = torch.tensor(patch[0])
    position = torch.stack(torch.unravel_index(block_order(grid, patch).order, grid), 1)
    blocks = [tuple(row) for row in (position // sides).tolist()]
    seen = list(dict.fromkeys(blocks))
    runs = 1 + sum(one != other for one, other in itertools.pairwise(blocks))
    assert runs == len(seen)
    whole = [all((b + 1) * s <= n for b, s, n in zip(block, patch[0], grid, strict=True)) for block in seen]
    assert whole == sorted(whole, reverse=True)


def test_nested_blocks() -> None:
    order = block_order((8, 16), ((8, 8), (4, 4))).order
    rows, columns = torch.unravel_index(order, (8, 16))
    assert rows[:64].max() == 7 and columns[:64].max() == 7
    for inner in range(4):
        part = slice(16 * inner, 16 * inner + 16)
        assert int(rows[part].max() - rows[part].min()) == 3
        assert int(columns[part].max() - columns[part].min()) == 3


def test_hunyuan_grid() -> None:
    """33×45×80 latent tokens in voxels of 4×6×8: the first 8×7×10 voxels are whole."""
    order = block_order((33, 45, 80), ((4, 6, 8),)).order
    t, y, x = torch.unravel_index(order[: 8 * 7 * 10 * 192], (33, 45, 80))
    assert (int(t.max()), int(y.max()), int(x.max())) == (31, 41, 79)


@pytest.mark.parametrize("patch", [((4,),), ((4, 4, 4),), ((0, 4),)])
def test_misfitting_patch(patch: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"patch: expected 2 positive sides"):
        block_order((8, 8), patch)


def image_ids(height: int, width: int) -> torch.Tensor:
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height).unsqueeze(1)
    ids[..., 2] += torch.arange(width)
    return ids.view(-1, 3)


def test_raster_grid() -> None:
    assert raster_grid(image_ids(5, 7)) == (5, 7)
    assert raster_grid(image_ids(7, 5).bfloat16()) == (7, 5)
    assert raster_grid(image_ids(5, 7) + 3) == (5, 7)


def test_no_raster() -> None:
    ids = image_ids(4, 4)
    assert raster_grid(ids.flip(0)) is None
    assert raster_grid(ids[:-1]) is None
    two = torch.cat((ids, ids + torch.tensor([1.0, 0.0, 0.0])))  # a second, reference image
    assert raster_grid(two) is None
    assert raster_grid(ids[:0]) is None

"""Reorder tokens so that neighbours in the picture are neighbours in the sequence.

A group of consecutive rows shares one column selection, and a raster row of an image is a poor group: its
ends have little in common. Blocks (8×8 tokens, 4×4 inside) make a group a patch of the picture. The
permutation is applied once per forward of the model, to the tokens and to their positions alike, and undone
on the way out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reorder:
    """A token permutation. `order[i]` is the raster index of the i-th token; `inverse` undoes it."""

    order: Tensor
    inverse: Tensor

    def apply(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """Raster order → block order along `dim`."""
        return tokens.index_select(dim, self.order)

    def undo(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """Block order → raster order along `dim`."""
        return tokens.index_select(dim, self.inverse)


def block_order(
    grid: Sequence[int], patch: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> Reorder:
    """Nested blocks in raster order, outermost first.

    Where a side does not divide the grid, the blocks that the border cuts are smaller and still compact.
    They come after all whole blocks, each border by itself, so whole blocks stay aligned with groups of a
    multiple of their size.

    Args:
        grid: tokens along each axis, e.g. `(48, 80)`; raster order means the last axis runs fastest.
        patch: block sides per level, outermost first, e.g. `((8, 8), (4, 4))`. Empty: raster order.
        device: where the permutation shall lie.

    Raises:
        ValueError: a level with another number of sides than the grid, or a side below 1.
    """
    for level in patch:
        if len(level) != len(grid) or min(level) < 1:
            raise ValueError(
                f"patch: expected {len(grid)} positive sides for the grid {tuple(grid)}, got {tuple(level)}"
            )
    position = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(math.prod(grid), len(grid))
    keys: list[Tensor] = []
    for depth, level in enumerate(patch):
        sides = torch.tensor(level)
        if depth == 0:
            whole = torch.tensor(grid) // sides * sides
            keys += (position >= whole).long().unbind(1)
        keys += (position // sides).unbind(1)
        position = position % sides
    keys += position.unbind(1)
    rank = torch.zeros(math.prod(grid), dtype=torch.int64)
    for key in keys:
        rank = rank * (int(key.max()) + 1) + key
    order = rank.argsort()
    return Reorder(order.to(device), order.argsort().to(device))


def raster_grid(ids: Tensor) -> tuple[int, int] | None:
    """Height and width of the raster that FLUX image ids `(N, 3)` describe, or None if they describe no
    single one.

    Copies the ids to the host (a sync): once per generation.
    """
    ids = ids.detach().to("cpu", torch.float64)
    if ids.dim() != 2 or ids.shape[-1] != 3 or ids.shape[0] == 0 or bool((ids[:, 0] != ids[0, 0]).any()):
        return None
    rows, columns = ids[:, 1] - ids[0, 1], ids[:, 2] - ids[0, 2]
    height, width = int(rows.max()) + 1, int(columns.max()) + 1
    if height * width != ids.shape[0]:
        return None
    raster = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    return (height, width) if torch.equal(torch.stack((rows, columns), 1), raster) else None

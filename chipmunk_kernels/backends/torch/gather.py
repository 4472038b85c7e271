"""Packing and unpacking columns with index_select and index_add; no host sync."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.settings import LaunchSettings


@dataclass(frozen=True)
class GatherSettings(LaunchSettings):
    """Nothing to choose: the library kernels pick their own tiles."""


@dataclass(frozen=True)
class ScatterSettings(LaunchSettings):
    """Nothing to choose: the library kernels pick their own tiles."""


def gather_columns(x: Tensor, columns: ColumnSet, per_group: bool, settings: GatherSettings) -> Tensor:
    """See `ops.gather.gather_columns`."""
    batch, heads, groups, capacity = columns.indices.shape
    width = columns.group_size if per_group else x.shape[3]
    packed = x.new_empty(batch, heads, groups, capacity, width)
    if per_group:
        for b, h, g, rows in _groups(columns, x.shape[3]):
            own, used = x[b, h, :, rows], rows.stop - rows.start
            packed[b, h, g, :, :used] = own.index_select(0, columns.indices[b, h, g])
            packed[b, h, g, :, used:] = 0
    else:
        for b in range(batch):
            for h in range(heads):
                chosen = columns.indices[b, h].reshape(-1)
                torch.index_select(x[b, h], 0, chosen, out=packed[b, h].view(-1, width))
    return packed.masked_fill_(~columns.kept().unsqueeze(-1), 0)


def scatter_columns(
    packed: Tensor, columns: ColumnSet, out: Tensor, accumulate: bool, settings: ScatterSettings
) -> None:
    """See `ops.gather.scatter_columns`."""
    kept = columns.kept()
    for b, h, g, rows in _groups(columns, out.shape[3]):
        own = out[b, h, :, rows]
        put_rows(own, columns.indices[b, h, g], kept[b, h, g], packed[b, h, g, :, : own.shape[1]], accumulate)


def put_rows(
    table: Tensor, indices: Tensor, kept: Tensor | None, values: Tensor, accumulate: bool = False
) -> None:
    """Assign or add `values` `(C, R)` to the rows `indices` `(C,)` of `table` `(N, R)` where `kept`, in
    place.

    `kept` None stands for all. A padding slot may hold the index of a kept one. Added, it adds zero;
    assigned, it repeats the first slot, which is then the same write twice, or the old value of that row
    in an empty group.
    """
    if len(indices) == 0:
        return
    if kept is not None:
        mask = kept.unsqueeze(1)
        if accumulate:
            values = values.masked_fill(~mask, 0)
        else:
            first = torch.where(mask[:1], values[:1], table.index_select(0, indices[:1]))
            values, indices = torch.where(mask, values, first), torch.where(kept, indices, indices[:1])
    # From a transposed source index_copy_ takes 3.5 ms where a contiguous one and the copy take 0.4 ms.
    if accumulate:
        table.index_add_(0, indices, values.contiguous())
    else:
        table.index_copy_(0, indices.long(), values.contiguous())


def _groups(columns: ColumnSet, rows: int) -> Iterator[tuple[int, int, int, slice]]:
    """Every group with the slice of its own rows."""
    size = columns.group_size
    for b in range(columns.batch):
        for h in range(columns.heads):
            for g in range(columns.groups):
                yield b, h, g, slice(g * size, min((g + 1) * size, rows))

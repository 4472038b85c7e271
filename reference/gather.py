"""Packing the kept columns of each group, and writing them back, one column at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_mask(indices: Tensor, counts: Tensor, columns: int) -> Tensor:
    """Bool `(B, H, G, columns)`: the first `counts` of the `indices` `(B, H, G, C)` of each group."""
    mask = torch.zeros(*counts.shape, columns, dtype=torch.bool, device=indices.device)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in counts.shape)).view(-1, 3).tolist():
        b, h, g = place
        mask[b, h, g, indices[b, h, g, : int(counts[b, h, g])].long()] = True
    return mask


def gather_columns(
    x: Tensor, indices: Tensor, counts: Tensor, group_size: int, per_group: bool = False
) -> Tensor:
    """Packed columns, zero in padding slots.

    per_group False: x `(B, H, N, D)` → `(B, H, G, C, D)`. per_group True: x `(B, H, N, R)` holds each
    column's value for every row, and group g takes its own rows `[g · group_size, (g + 1) · group_size)` →
    `(B, H, G, C, group_size)`, zero past the last row.
    """
    width = group_size if per_group else x.shape[3]
    packed = torch.zeros(*indices.shape, width, dtype=x.dtype, device=x.device)
    for b in range(indices.shape[0]):
        for h in range(indices.shape[1]):
            for g in range(indices.shape[2]):
                for slot in range(int(counts[b, h, g])):
                    column = x[b, h, int(indices[b, h, g, slot])]
                    taken = column[g * group_size : (g + 1) * group_size] if per_group else column
                    packed[b, h, g, slot, : taken.shape[0]] = taken
    return packed


def scatter_columns(
    packed: Tensor, indices: Tensor, counts: Tensor, group_size: int, out: Tensor, accumulate: bool = False
) -> Tensor:
    """A copy of out `(B, H, N, R)` with each group's packed columns assigned, or added, into its own rows."""
    out = out.clone()
    for b in range(indices.shape[0]):
        for h in range(indices.shape[1]):
            for g in range(indices.shape[2]):
                for slot in range(int(counts[b, h, g])):
                    target = out[b, h, int(indices[b, h, g, slot]), g * group_size : (g + 1) * group_size]
                    value = packed[b, h, g, slot, : target.shape[0]].to(out.dtype)
                    target.copy_(target + value if accumulate else value)
    return out

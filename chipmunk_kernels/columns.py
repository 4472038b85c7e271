"""ColumnSet: which columns each group of rows keeps.

A *group* is `group_size` consecutive rows (queries, or MLP tokens) that share one selection; the last may
be ragged. A *column* is a key/value position (attention) or a hidden neuron (MLP). Only kept slots are
stored: at HunyuanVideo size a list as wide as the sequence would take 7 GB a layer, the kept 5 % takes
0.36 GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def unpack_mask(packed: Tensor, columns: int) -> Tensor:
    """Bool `(…, columns)` from uint8 `(…, ceil(columns / 8))`, the inverse of `ColumnSet.to_packed_mask`.

    Raises:
        ValueError: not uint8, or not as many bytes as the columns take.
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != -(-columns // 8):
        raise ValueError(
            f"packed: expected uint8 with a last dimension of {-(-columns // 8)} for {columns} columns, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> bits) & 1).bool().flatten(-2)[..., :columns]


def group_count(rows: int, group_size: int) -> int:
    """Number of row groups, the ragged last one included."""
    return -(-rows // group_size)


@dataclass(frozen=True)
class ColumnSet:
    """Kept columns of every (batch, head, group).

    Attributes:
        indices: int32 `(B, H, G, C)`. The first `counts` slots of a row are distinct and ascending; the
            padding slots after them hold any valid column index, so a kernel may load through them and mask
            later.
        counts: int32 `(B, H, G)`, `0 <= counts <= C`. Any count is legal, not only multiples of a tile.
        group_size: rows that share one selection.

    MLP selections have `H == 1`.

    Raises:
        ValueError: wrong dtype, rank, shape or device. Values are not read (that would sync with the device);
            `validate` reads them.
    """

    indices: Tensor
    counts: Tensor
    group_size: int

    def __post_init__(self) -> None:
        if self.indices.dtype != torch.int32 or self.indices.dim() != 4:
            raise ValueError(
                "indices: expected an int32 tensor of shape (B, H, G, C), "
                f"got {self.indices.dtype} of shape {tuple(self.indices.shape)}"
            )
        if self.counts.dtype != torch.int32 or self.counts.shape != self.indices.shape[:3]:
            raise ValueError(
                f"counts: expected an int32 tensor of shape {tuple(self.indices.shape[:3])}, "
                f"got {self.counts.dtype} of shape {tuple(self.counts.shape)}"
            )
        if self.counts.device != self.indices.device:
            raise ValueError(f"counts: on {self.counts.device}, but indices are on {self.indices.device}")
        if self.group_size < 1:
            raise ValueError(f"group_size: expected a positive number of rows, got {self.group_size}")

    @property
    def batch(self) -> int:
        return self.indices.shape[0]

    @property
    def heads(self) -> int:
        return self.indices.shape[1]

    @property
    def groups(self) -> int:
        return self.indices.shape[2]

    @property
    def capacity(self) -> int:
        """Slots per group, C."""
        return self.indices.shape[3]

    @property
    def device(self) -> torch.device:
        return self.indices.device

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + self.counts.nbytes

    def kept(self) -> Tensor:
        """Bool `(B, H, G, C)`: which slots are kept columns rather than padding."""
        slots = torch.arange(self.capacity, device=self.device, dtype=torch.int32)
        return slots < self.counts.unsqueeze(-1)

    def to_mask(self, columns: int) -> Tensor:
        """Bool `(B, H, G, columns)` mask of the kept columns."""
        mask = torch.zeros(*self.indices.shape[:3], columns + 1, dtype=torch.bool, device=self.device)
        # Padding slots go to one spare column, so they can never clear a kept one.
        target = torch.where(self.kept(), self.indices, columns).long()
        mask.scatter_(-1, target, True)
        return mask[..., :columns]

    def to_packed_mask(self, columns: int) -> Tensor:
        """uint8 `(B, H, G, ceil(columns / 8))`: the mask, eight columns to a byte, the first the lowest bit.

        An eighth of `to_mask`'s bytes and, where more than 1 in 32 columns is kept, fewer than the list's.
        """
        width = -(-columns // 8)
        packed = torch.zeros(*self.indices.shape[:3], width + 1, dtype=torch.uint8, device=self.device)
        # Kept columns are distinct, so adding their bits sets them; padding slots add to one spare byte.
        byte = torch.where(self.kept(), self.indices >> 3, width).long()
        bit = torch.ones((), dtype=torch.uint8, device=self.device) << (self.indices & 7).to(torch.uint8)
        packed.scatter_add_(-1, byte, bit)
        return packed[..., :width]

    def density(self, columns: int) -> float:
        """Kept columns over all columns, averaged over groups. Reads the counts (syncs with the device)."""
        total = self.counts.numel() * columns
        return float(self.counts.sum(dtype=torch.int64)) / total if total else 0.0

    def to(self, device: torch.device | str) -> ColumnSet:
        return ColumnSet(self.indices.to(device), self.counts.to(device), self.group_size)

    def validate(self, rows: int, columns: int) -> None:
        """Check every value, for `rows` rows choosing among `columns` columns. Syncs: debug and tests only.

        Raises:
            ValueError: naming what is out of range, unsorted or of the wrong extent, and where.
        """
        expected = group_count(rows, self.group_size)
        if self.groups != expected:
            raise ValueError(
                f"columns: {rows} rows in groups of {self.group_size} make {expected} groups, "
                f"got {self.groups}"
            )
        if self.counts.numel() == 0:
            return
        low, high = int(self.counts.min()), int(self.counts.max())
        if low < 0 or high > self.capacity:
            raise ValueError(f"counts: expected 0 to the capacity {self.capacity}, got {low} to {high}")
        if self.capacity == 0:
            return
        low, high = int(self.indices.min()), int(self.indices.max())
        if low < 0 or high >= columns:
            raise ValueError(f"indices: expected 0 to {columns - 1} (padding slots too), got {low} to {high}")
        descending = (self.indices[..., 1:] <= self.indices[..., :-1]) & self.kept()[..., 1:]
        if bool(descending.any()):
            where = tuple(descending.nonzero()[0].tolist())
            raise ValueError(
                f"indices: kept columns must ascend strictly; they do not at (b, h, g, slot) {where}"
            )

    @classmethod
    def full(
        cls,
        batch: int,
        heads: int,
        rows: int,
        columns: int,
        group_size: int,
        device: torch.device | str = "cpu",
    ) -> ColumnSet:
        """Every group keeps every column: the dense case."""
        groups = group_count(rows, group_size)
        indices = torch.arange(columns, dtype=torch.int32, device=device).expand(
            batch, heads, groups, columns
        )
        counts = torch.full((batch, heads, groups), columns, dtype=torch.int32, device=device)
        return cls(indices.contiguous(), counts, group_size)

    @classmethod
    def from_lists(
        cls,
        lists: Sequence[Sequence[Sequence[Sequence[int]]]],
        group_size: int,
        device: torch.device | str = "cpu",
    ) -> ColumnSet:
        """Build from nested Python lists `[batch][head][group] -> columns` (tests and small examples)."""
        counts = torch.tensor([[[len(g) for g in h] for h in b] for b in lists], dtype=torch.int32)
        capacity = int(counts.max()) if counts.numel() else 0
        indices = torch.zeros(*counts.shape, capacity, dtype=torch.int32)
        for b, heads in enumerate(lists):
            for h, groups in enumerate(heads):
                for g, kept in enumerate(groups):
                    indices[b, h, g, : len(kept)] = torch.tensor(sorted(kept), dtype=torch.int32)
        return cls(indices.to(device), counts.to(device), group_size)

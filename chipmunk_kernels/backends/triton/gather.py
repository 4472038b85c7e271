"""Packing kept columns and writing them back, and the mean over each row group: kernels that only move data.

A packed row is a key, a value, or one neuron's activations of a token group: 256 bytes at a width of 128 in
bf16, at scattered addresses. A program moves a block of them, so that many loads are in flight at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_kernels.backends.triton.launch import on_device, signature
from chipmunk_kernels.columns import ColumnSet, group_count
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice

WIDEST_BLOCK = 256


@dataclass(frozen=True)
class GatherSettings(LaunchSettings):
    """How programs share the packed slots.

    Attributes:
        block_columns: columns that one program moves.
        num_warps: its warps.
        across: 1 to move the same slots of all groups before the next slots. Groups lie side by side in a
            neuron's row, so writes that are near in time are near in memory too.
    """

    block_columns: int = choice(32, 8, 16, 32, 64, 128)
    num_warps: int = choice(4, 1, 2, 4, 8)
    across: int = choice(0, 0, 1)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        if self.block_columns > max(8, triton.next_power_of_2(problem.kept_columns)):
            return f"block_columns {self.block_columns} is more than the {problem.kept_columns} kept columns"
        return None


@dataclass(frozen=True)
class GroupMeanSettings(LaunchSettings):
    """How many features one program averages, over how many rows at a time."""

    block_width: int = choice(128, 64, 128, 256, 512)
    block_rows: int = choice(16, 8, 16, 32)
    num_warps: int = choice(4, 2, 4, 8)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        if self.block_width > max(64, triton.next_power_of_2(problem.width)):
            return f"block_width {self.block_width} is more than the {problem.width} features"
        return None


@triton.jit
def _place(
    counts, heads, groups, slot_blocks, width_blocks,
    ACROSS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Which (b, h, g), slots and width this program moves. Width varies fastest, then slots or groups."""
    program = tl.program_id(0)
    w = (program % width_blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    program //= width_blocks
    if ACROSS:
        block = program // groups % slot_blocks
        row = program // (groups * slot_blocks) * groups + program % groups
    else:
        block = program % slot_blocks
        row = program // slot_blocks
    slots = block * BLOCK_C + tl.arange(0, BLOCK_C)
    g = row % groups
    h = (row // groups) % heads
    b = row // (groups * heads)
    return row.to(tl.int64), b.to(tl.int64), h.to(tl.int64), g.to(tl.int64), slots, w, tl.load(counts + row)


@triton.jit(do_not_specialize=["heads", "groups", "capacity", "slot_blocks", "width_blocks"])
def gather_kernel(
    x, indices, counts, packed, heads, groups, capacity, width, extent, slot_blocks, width_blocks,
    stride_b, stride_h, stride_n,
    PER_GROUP: tl.constexpr, ACROSS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Packed slots of one (b, h, g): x[b, h, column] whole, or (PER_GROUP) the group's own rows of it."""
    row, b, h, g, slots, w, count = _place(
        counts, heads, groups, slot_blocks, width_blocks, ACROSS, BLOCK_C, BLOCK_W
    )
    kept = slots < count
    columns = tl.load(indices + row * capacity + slots, mask=kept, other=0)
    source = x + b * stride_b + h * stride_h
    inside = w < width
    if PER_GROUP:
        source += g * width
        inside = inside & (g * width + w < extent)
    value = tl.load(
        source + columns.to(tl.int64)[:, None] * stride_n + w[None, :],
        mask=kept[:, None] & inside[None, :],
        other=0.0,
    )
    target = packed + (row * capacity + slots)[:, None] * width + w[None, :]
    tl.store(target, value, mask=(slots < capacity)[:, None] & (w < width)[None, :])


@triton.jit(do_not_specialize=["heads", "groups", "capacity", "slot_blocks", "width_blocks"])
def scatter_kernel(
    packed, indices, counts, out, heads, groups, capacity, width, extent, slot_blocks, width_blocks,
    packed_b, packed_h, packed_g, packed_c, stride_b, stride_h, stride_n,
    ACCUMULATE: tl.constexpr, ACROSS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Assign, or add, packed slots of one (b, h, g) into the group's own rows of out[b, h, column].

    Columns of a group are distinct and groups own disjoint rows, so no two programs write one element.
    """
    row, b, h, g, slots, w, count = _place(
        counts, heads, groups, slot_blocks, width_blocks, ACROSS, BLOCK_C, BLOCK_W
    )
    kept = slots < count
    columns = tl.load(indices + row * capacity + slots, mask=kept, other=0)
    mask = kept[:, None] & ((w < width) & (g * width + w < extent))[None, :]
    source = packed + b * packed_b + h * packed_h + g * packed_g + slots.to(tl.int64)[:, None] * packed_c
    value = tl.load(source + w[None, :], mask=mask, other=0.0)
    target = out + b * stride_b + h * stride_h + g * width
    target = target + columns.to(tl.int64)[:, None] * stride_n + w[None, :]
    if ACCUMULATE:
        value = tl.load(target, mask=mask, other=0.0).to(tl.float32) + value.to(tl.float32)
    tl.store(target, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "groups", "width_blocks"])
def group_mean_kernel(
    x, means, rows, width, group_size, groups, width_blocks, stride_b, stride_m,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Mean of one group over its real rows, for one block of features."""
    program = tl.program_id(0)
    w = (program % width_blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    group = program // width_blocks
    b = (group // groups).to(tl.int64)
    first = (group % groups) * group_size
    last = tl.minimum(first + group_size, rows)
    total = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (m < last)[:, None] & (w < width)[None, :]
        source = x + b * stride_b + m.to(tl.int64)[:, None] * stride_m + w[None, :]
        total += tl.load(source, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / (last - first).to(tl.float32)
    tl.store(means + group.to(tl.int64) * width + w, mean.to(means.dtype.element_ty), mask=w < width)


def _grid(columns: ColumnSet, width: int, settings: GatherSettings) -> tuple[int, int, int, int]:
    """Programs, slot blocks, width blocks, and the width of a block."""
    block_width = min(WIDEST_BLOCK, triton.next_power_of_2(width))
    width_blocks = triton.cdiv(width, block_width)
    slot_blocks = triton.cdiv(columns.capacity, settings.block_columns)
    return columns.counts.numel() * slot_blocks * width_blocks, slot_blocks, width_blocks, block_width


def gather_columns(x: Tensor, columns: ColumnSet, per_group: bool, settings: GatherSettings) -> Tensor:
    """Packed kept columns, zero in padding slots and past the last row.

    x `(B, H, N, D)` → `(B, H, G, C, D)`; per_group: x `(B, H, N, R)` → `(B, H, G, C, group_size)`, each group
    taking its own rows. The last dimension of x must be contiguous.
    """
    width = columns.group_size if per_group else x.shape[3]
    packed = torch.empty(*columns.indices.shape, width, dtype=x.dtype, device=x.device)
    if packed.numel() == 0:
        return packed
    programs, slot_blocks, width_blocks, block_width = _grid(columns, width, settings)
    with on_device(x):
        gather_kernel[(programs,)](
            x, columns.indices.contiguous(), columns.counts.contiguous(), packed,
            columns.heads, columns.groups, columns.capacity, width, x.shape[3], slot_blocks, width_blocks,
            x.stride(0), x.stride(1), x.stride(2),
            PER_GROUP=per_group, ACROSS=settings.across, BLOCK_C=settings.block_columns,
            BLOCK_W=block_width, num_warps=settings.num_warps,
        )  # fmt: skip
    return packed


def scatter_columns(
    packed: Tensor, columns: ColumnSet, out: Tensor, accumulate: bool, settings: GatherSettings
) -> None:
    """Write packed `(B, H, G, C, group_size)` into out `(B, H, N, R)`, assigned or added (in float32, then
    rounded). The last dimensions of both must be contiguous."""
    if packed.numel() == 0:
        return
    programs, slot_blocks, width_blocks, block_width = _grid(columns, columns.group_size, settings)
    with on_device(packed):
        scatter_kernel[(programs,)](
            packed, columns.indices.contiguous(), columns.counts.contiguous(), out,
            columns.heads, columns.groups, columns.capacity, columns.group_size, out.shape[3],
            slot_blocks, width_blocks,
            packed.stride(0), packed.stride(1), packed.stride(2), packed.stride(3),
            out.stride(0), out.stride(1), out.stride(2),
            ACCUMULATE=accumulate, ACROSS=settings.across, BLOCK_C=settings.block_columns,
            BLOCK_W=block_width, num_warps=settings.num_warps,
        )  # fmt: skip


def group_mean(x: Tensor, group_size: int, settings: GroupMeanSettings) -> Tensor:
    """x `(B, M, K)` → `(B, G, K)` in x.dtype, summed in float32 over the rows that each group really has."""
    batch, rows, width = x.shape
    groups = group_count(rows, group_size)
    means = torch.empty(batch, groups, width, dtype=x.dtype, device=x.device)
    if means.numel() == 0:
        return means
    width_blocks = triton.cdiv(width, settings.block_width)
    with on_device(x):
        group_mean_kernel[(batch * groups * width_blocks,)](
            x, means, rows, width, group_size, groups, width_blocks, x.stride(0), x.stride(1),
            BLOCK_M=settings.block_rows, BLOCK_W=settings.block_width, num_warps=settings.num_warps,
        )  # fmt: skip
    return means


KERNELS = (
    Kernel("gather_columns", "triton", gather_columns, GatherSettings),
    Kernel("scatter_columns", "triton", scatter_columns, GatherSettings),
    Kernel("group_mean", "triton", group_mean, GroupMeanSettings),
)

_TYPES = {
    **dict.fromkeys(("x", "out", "packed", "means"), "*bf16"),
    **dict.fromkeys(("indices", "counts"), "*i32"),
    **dict.fromkeys(("width", "extent", "packed_b", "packed_h", "packed_g", "packed_c"), "i32:16"),
    **dict.fromkeys(("stride_b", "stride_h", "stride_n", "stride_m"), "i32:16"),
}
_GATHER, _MEAN = GatherSettings(), GroupMeanSettings()


def _case(name: str, kernel: Any, warps: int, **constexprs: Any) -> tuple[Any, ...]:
    return name, kernel, signature(kernel, _TYPES, constexprs), constexprs, warps, 3


_MOVED = {"ACROSS": _GATHER.across, "BLOCK_C": _GATHER.block_columns, "BLOCK_W": 128}
COMPILE_CASES = (
    _case("gather_columns rows", gather_kernel, _GATHER.num_warps, PER_GROUP=False, **_MOVED),
    _case("gather_columns groups", gather_kernel, _GATHER.num_warps, PER_GROUP=True, **_MOVED),
    _case("scatter_columns assign", scatter_kernel, _GATHER.num_warps, ACCUMULATE=False, **_MOVED),
    _case("scatter_columns add", scatter_kernel, _GATHER.num_warps, ACCUMULATE=True, **_MOVED),
    _case(
        "group_mean", group_mean_kernel, _MEAN.num_warps, BLOCK_M=_MEAN.block_rows, BLOCK_W=_MEAN.block_width
    ),
)

"""Launching gather.cu: packing kept columns and writing them back, 16 bytes at a time where they can be."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy.module import Source, launch, load
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
WIDEST_LOAD_BYTES = 16


@dataclass(frozen=True)
class GatherSettings(LaunchSettings):
    """How many columns a block moves, with how many threads, and how many loads a thread keeps in flight."""

    block_columns: int = choice(32, 8, 16, 32, 64, 128)
    threads: int = choice(128, 64, 128, 256)
    in_flight: int = choice(4, 1, 2, 4, 8)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        moved = problem.group_size if problem.operation == "scatter_columns" else problem.width
        vectors = self.block_columns * moved * (4 if problem.dtype == "float32" else 2) // WIDEST_LOAD_BYTES
        if self.threads * self.in_flight > max(vectors, 64):
            return f"{self.threads} threads × {self.in_flight} loads exceed the {vectors} of a block"
        return None


def gather_columns(x: Tensor, columns: ColumnSet, per_group: bool, settings: GatherSettings) -> Tensor:
    """Packed kept columns, zero in padding slots and past the last row.

    x `(B, H, N, D)` → `(B, H, G, C, D)`; per_group: x `(B, H, N, R)` → `(B, H, G, C, group_size)`, each group
    taking its own rows. The last dimension of x must be contiguous.
    """
    width = columns.group_size if per_group else x.shape[3]
    packed = torch.empty(*columns.indices.shape, width, dtype=x.dtype, device=x.device)
    if packed.numel():
        _move("gather_groups" if per_group else "gather_rows", x, packed, x, width, columns, settings)
    return packed


def scatter_columns(
    packed: Tensor, columns: ColumnSet, out: Tensor, accumulate: bool, settings: GatherSettings
) -> None:
    """Write packed `(B, H, G, C, group_size)` into out `(B, H, N, R)`, assigned, or added in float32.

    The last dimension of out must be contiguous.
    """
    packed = packed.contiguous()
    if packed.numel():
        name = "scatter_add" if accumulate else "scatter_assign"
        _move(name, packed, out, out, columns.group_size, columns, settings)


def source(dtype: torch.dtype, width: int, vector_bytes: int, settings: GatherSettings) -> Source:
    """gather.cu for packed rows of `width` elements that move `vector_bytes` at a time."""
    return Source(
        "gather.cu",
        (
            ("KIND", KINDS[dtype]),
            ("WORD_BYTES", dtype.itemsize),
            ("VECTOR_BYTES", vector_bytes),
            ("WIDTH", width),
            ("BLOCK_COLUMNS", settings.block_columns),
            ("THREADS", settings.threads),
            ("IN_FLIGHT", settings.in_flight),
        ),
    )


def vector_bytes(origin: Tensor, target: Tensor, table: Tensor, width: int) -> int:
    """The widest load that every address is a multiple of: 16 bytes, or a smaller power of two."""
    item = table.element_size()
    steps = (origin.data_ptr(), target.data_ptr(), *(item * step for step in (width, *table.stride()[:3])))
    return math.gcd(WIDEST_LOAD_BYTES, *steps)


@functools.cache
def _kernel(
    name: str,
    dtype: torch.dtype,
    width: int,
    vector_bytes: int,
    settings: GatherSettings,
    device: torch.device,
) -> Any:
    """One lookup per call: building a source and finding its kernel would take longer than the launch."""
    return load(source(dtype, width, vector_bytes, settings), name, device)


def _move(
    name: str,
    origin: Tensor,
    target: Tensor,
    table: Tensor,
    width: int,
    columns: ColumnSet,
    settings: GatherSettings,
) -> None:
    """Run one of the four kernels; `table` is the one of the two that the column indices point into."""
    at_once = vector_bytes(origin, target, table, width)
    kernel = _kernel(name, table.dtype, width, at_once, settings, table.device)
    blocks = columns.counts.numel() * -(-columns.capacity // settings.block_columns)
    indices, counts = columns.indices.contiguous(), columns.counts.contiguous()
    launch(
        kernel, table.device, blocks, settings.threads,
        origin, indices, counts, target,
        columns.heads, columns.groups, columns.capacity, table.shape[3], *table.stride()[:3],
    )  # fmt: skip


def _unsupported(dtype: torch.dtype, width: int) -> str | None:
    """Why these kernels cannot move this dtype, or None."""
    return None if dtype in KINDS else f"the cupy gather takes float32, float16 and bfloat16; got {dtype}"


KERNELS = (
    Kernel("gather_columns", "cupy", gather_columns, GatherSettings, _unsupported),
    Kernel("scatter_columns", "cupy", scatter_columns, GatherSettings, _unsupported),
)

SOURCES = tuple(source(dtype, 128, WIDEST_LOAD_BYTES, GatherSettings()) for dtype in KINDS)

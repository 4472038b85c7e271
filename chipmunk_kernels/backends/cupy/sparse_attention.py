"""Launching sparse_attention.cu: column-sparse attention on any GPU since Ampere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy.module import Source, load, prepared
from chipmunk_kernels.backends.cupy.vectors import KINDS, VECTOR_BYTES, common_bytes, vector_bytes
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.layout import empty_like_queries, maker, strides_like_queries
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice

WIDTHS = (64, 128)
LOG2E = 1.4426950408889634
SMALLEST_BLOCK = 64  # rows; a smaller group leaves the rest of them idle
REGISTERS_TO_ACCUMULATE = 200  # of a thread's 255; addresses and fragments take the others


@dataclass(frozen=True)
class SparseAttentionSettings(LaunchSettings):
    """Tile and launch of the column-sparse attention kernel.

    Attributes:
        block_m: most query rows of a block; a group is shared evenly by as few blocks as that allows.
        block_n: columns of a pipeline stage.
        warp_rows: rows of a warp. 32 read keys and values from shared memory half as often as 16, and take
            nearly all registers.
        stages: stages of keys and values in shared memory, one of them in use.
        blocks: that must fit a multiprocessor's registers at once.
    """

    block_m: int = choice(128, 64, 96, 128, 192)
    block_n: int = choice(64, 32, 64, 128)
    warp_rows: int = choice(32, 16, 32)
    stages: int = choice(2, 2, 3, 4)
    blocks: int = choice(1, 1, 2, 3)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        rows = block_rows(self.block_m, problem.group_size)
        if self.block_m != rows:
            return (
                f"blocks of {self.block_m} share a group of {problem.group_size} rows as those of {rows} do"
            )
        accumulators = self.warp_rows * (problem.width + self.block_n) // 32
        share = 65536 // (self.blocks * 32 * (self.block_m // self.warp_rows))
        if accumulators > min(REGISTERS_TO_ACCUMULATE, share * 3 // 4):
            return f"accumulates in {accumulators} of a thread's {min(share, 255)} registers"
        needed = shared_bytes(problem.width, self.block_m, self)
        if shared_memory_bytes is not None and needed > shared_memory_bytes:
            return f"needs {needed} bytes of shared memory, the device has {shared_memory_bytes}"
        return None


def block_rows(block_m: int, group_size: int) -> int:
    """What each block takes of a group when as few blocks as `block_m` rows allow share it evenly."""
    blocks = -(-group_size // block_m)
    return max(SMALLEST_BLOCK, -(-group_size // (blocks * 32)) * 32)


def shared_bytes(width: int, block_m: int, settings: SparseAttentionSettings) -> int:
    """The queries, the stages of keys and values, and twice as many column lists."""
    elements = width * (block_m + settings.stages * 2 * settings.block_n)
    return elements * 2 + settings.stages * 2 * settings.block_n * 4


def source(dtype: torch.dtype, width: int, block_m: int, settings: SparseAttentionSettings) -> Source:
    """sparse_attention.cu for heads of `width` elements and blocks of `block_m` rows."""
    return Source(
        "sparse_attention.cu",
        (
            ("KIND", KINDS[dtype]),
            ("WIDTH", width),
            ("BLOCK_M", block_m),
            ("BLOCK_N", settings.block_n),
            ("WARP_ROWS", settings.warp_rows),
            ("STAGES", settings.stages),
            ("BLOCKS", settings.blocks),
        ),
    )


@dataclass(frozen=True)
class Plan:
    """What a launch takes besides addresses.

    Attributes:
        launch: of the kernel, with all arguments but tensors.
        new_out, new_lse: give tensors for the results.
        readable: whether rows begin at multiples of 16 bytes, if the tensors do.
    """

    launch: Callable[..., None]
    new_out: Callable[[], Tensor]
    new_lse: Callable[[], Tensor]
    readable: bool


@functools.lru_cache(maxsize=4096)
def _plan(
    settings: SparseAttentionSettings,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...],
    lists: tuple[int, ...],
    group_size: int,
    scale: float,
    sign: int,
    *strides: tuple[int, ...] | None,
) -> Plan:
    """What follows from shapes and strides (of q, k, v and base): one lookup a call."""
    assert strides[0] is not None
    batch, heads, rows, width = shape
    _, _, groups, capacity = lists
    kernel, block_m, threads, shared = _kernel(dtype, width, group_size, settings, device)
    tiles = -(-group_size // block_m)
    out_strides = strides_like_queries(shape, strides[0])
    steps = [(each or (0, 0, 0, 1))[:3] for each in (*strides, out_strides)]
    launch = prepared(
        kernel, device, batch * heads * groups * tiles, threads,
        heads, rows, groups, capacity, group_size, tiles, *(step for each in steps for step in each),
        scale * LOG2E, float(sign),
        shared_bytes=shared,
    )  # fmt: skip
    return Plan(
        launch=launch,
        new_out=maker(shape, dtype, device, out_strides),
        new_lse=maker((batch, heads, rows), torch.float32, device),
        readable=all(vector_bytes(0, dtype.itemsize, *each) == VECTOR_BYTES for each in steps),
    )


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: ColumnSet,
    base: Tensor | None,
    sign: int,
    scale: float,
    settings: SparseAttentionSettings,
) -> tuple[Tensor, Tensor]:
    """out = base + sign · softmax(q K[cols]ᵀ · scale) V[cols], and the softmax's natural-log normaliser.

    Args:
        q: `(B, H, N, D)`, k and v `(B, H, Nk, D)`: any strides with D contiguous. One whose rows do not begin
            at multiples of 16 bytes is copied.
        columns: the kept columns of every group of `columns.group_size` queries.
        base: `(B, H, N, D)` in q's dtype, or None for zeros.
        sign: +1 or −1.
        scale: of the logits.

    Returns:
        out `(B, H, N, D)` in the dtype and memory order of q, lse `(B, H, N)` float32. A group that keeps
        nothing gives its base, or zeros, and lse = −∞.
    """
    if scale < 0:
        q, scale = -q, -scale  # the maximum is taken before scaling
    shape, device, indices = q.shape, q.device, columns.indices
    plan = _plan(
        settings, q.dtype, device, shape, indices.shape, columns.group_size, scale, sign,
        q.stride(), k.stride(), v.stride(), None if base is None else base.stride(),
    )  # fmt: skip
    q_start, k_start, v_start = q.data_ptr(), k.data_ptr(), v.data_ptr()
    base_start = 0 if base is None else base.data_ptr()
    if not plan.readable or (q_start | k_start | v_start | base_start) % VECTOR_BYTES:
        base = None if base is None else _aligned(base)
        return sparse_attention(_aligned(q), _aligned(k), _aligned(v), columns, base, sign, scale, settings)
    indices, counts = indices.contiguous(), columns.counts.contiguous()  # copies must outlive the launch
    out, lse = plan.new_out(), plan.new_lse()
    plan.launch(
        q_start, k_start, v_start, indices.data_ptr(), counts.data_ptr(), base_start,
        out.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    return out, lse


def _aligned(x: Tensor) -> Tensor:
    """`x` itself if each of its rows begins at a multiple of 16 bytes, else a copy in its order."""
    return x if common_bytes(x) == VECTOR_BYTES else empty_like_queries(x).copy_(x)


@functools.cache
def _kernel(
    dtype: torch.dtype, width: int, group_size: int, settings: SparseAttentionSettings, device: torch.device
) -> tuple[Any, int, int, int]:
    """The kernel, its rows and threads a block, and its shared memory."""
    block_m = block_rows(settings.block_m, group_size)
    shared = shared_bytes(width, block_m, settings)
    kernel = load(source(dtype, width, block_m, settings), "sparse_attention", device, shared)
    return kernel, block_m, block_m // settings.warp_rows * 32, shared


def _unsupported(dtype: torch.dtype, width: int) -> str | None:
    """Why this kernel cannot run this dtype and head dimension, or None."""
    if width not in WIDTHS:
        return f"cupy attention takes head dimensions {', '.join(map(str, WIDTHS))}; got {width}"
    return None if dtype in KINDS else f"cupy attention takes float16 and bfloat16; got {dtype}"


KERNELS = (Kernel("sparse_attention", "cupy", sparse_attention, SparseAttentionSettings, _unsupported),)

SOURCES = (
    source(torch.bfloat16, 128, 128, SparseAttentionSettings()),
    source(torch.float16, 64, 128, SparseAttentionSettings()),
    source(torch.bfloat16, 128, 64, SparseAttentionSettings(warp_rows=16)),
)

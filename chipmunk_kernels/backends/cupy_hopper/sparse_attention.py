"""Launching sparse_attention.cu: column-sparse attention with wgmma and gathered tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy.module import Source, launch, load
from chipmunk_kernels.backends.cupy_hopper import FOLDER
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.layout import empty_like_queries
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice

LOG2E = 1.4426950408889634
WIDTHS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)
ROWS = 64
"""Query rows of one warpgroup."""
VECTOR_BYTES = 16
SHARED_BYTES = 227 * 1024
"""Most shared memory of one block; blocks on one multiprocessor share that, less 1 KiB for each more."""
_OTHER_REGISTERS = 28
"""Of a thread besides accumulators and weights, as compiled."""
LARGEST_ROW_STRIDE = 2**31 - 1
"""In bytes: a row's address is made with one 32-bit multiplication."""


@dataclass(frozen=True)
class SparseAttentionSettings(LaunchSettings):
    """Tile and schedule of the Hopper column-sparse attention kernel.

    Attributes:
        consumers: warpgroups that compute, 64 query rows each; cut to the group where that is shorter. Three
            serve a 192-row group at once: every gathered row then meets 192 queries.
        block_columns: columns gathered at a time.
        stages: tiles of keys, and of values, that are under way.
        overlap: whether a warpgroup multiplies the next tile's keys before it has weighed this tile's logits.
            That takes registers: with three consumers and D = 128, 80 columns fit, 96 do not.
        ping_pong: whether the warpgroups issue their products in turns.
        blocks: that share a multiprocessor. More than one suits short problems, whose last wave is ragged.
    """

    consumers: int = choice(3, 1, 2, 3)
    block_columns: int = choice(80, 48, 64, 80, 112, 128, 176)
    stages: int = choice(3, 2, 3, 4)
    overlap: bool = choice(True, True, False)
    ping_pong: bool = choice(False, True, False)
    blocks: int = choice(1, 1, 2)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        if self.fitted(problem.group_size) != self:
            return f"{self.consumers} warpgroups are more than {problem.group_size} rows need"
        covered = -(-problem.group_size // (ROWS * self.consumers)) * ROWS * self.consumers
        if covered - problem.group_size >= ROWS:
            return f"{self.consumers} warpgroups leave one idle in groups of {problem.group_size}"
        if self.ping_pong and (self.consumers == 1 or not self.overlap):
            return "turns need two warpgroups or more, and overlap"
        needed = (shared_bytes(problem.width, self) + 1024) * self.blocks - 1024
        limit = SHARED_BYTES if shared_memory_bytes is None else min(SHARED_BYTES, shared_memory_bytes)
        if needed > limit:
            return f"needs {needed} bytes of shared memory, the device has {limit}"
        largest = max(problem.width, self.block_columns) // 2 + _OTHER_REGISTERS
        if largest > launch_registers(self):
            return f"one product needs {largest} registers a thread, the launch has {launch_registers(self)}"
        wanted = _registers(problem.width, self)
        if wanted > compute_registers(self):
            return f"needs {wanted} registers a thread and has {compute_registers(self)}"
        return None

    def fitted(self, group_size: int) -> SparseAttentionSettings:
        """These settings with no more warpgroups than a group of `group_size` rows needs."""
        needed = -(-group_size // ROWS)
        if needed >= self.consumers:
            return self
        return replace(self, consumers=needed, ping_pong=self.ping_pong and needed > 1)


def shared_bytes(width: int, settings: SparseAttentionSettings) -> int:
    """Dynamic shared memory of a block: queries, stages of keys and of values, barriers."""
    rows = ROWS * settings.consumers + 2 * settings.stages * settings.block_columns
    return rows * width * 2 + (4 * settings.stages + 2) * 8


def launch_registers(settings: SparseAttentionSettings) -> int:
    """Registers of a thread as the kernel starts: equal parts of the register file, as in the .cu file."""
    return min(65536 // (128 * (settings.consumers + 1) * settings.blocks) // 8 * 8, 255)


def compute_registers(settings: SparseAttentionSettings) -> int:
    """Registers of a thread that computes, once the fetching warpgroup has given up its own."""
    total = min(launch_registers(settings), 256) * (settings.consumers + 1)
    fetching = 24 if launch_registers(settings) < 128 else 32 if settings.consumers == 3 else 40
    return min((total - fetching) // settings.consumers // 8 * 8, 240)


def _registers(width: int, settings: SparseAttentionSettings) -> int:
    """What the accumulators and weights of a computing thread take, and all else."""
    logits = settings.block_columns // 2
    return width // 2 + logits + (logits // 2 if settings.overlap else 0) + _OTHER_REGISTERS


def source(dtype: torch.dtype, width: int, settings: SparseAttentionSettings) -> Source:
    """sparse_attention.cu for one dtype, head dimension and settings."""
    return Source(
        "sparse_attention.cu",
        (
            ("BF16", int(dtype == torch.bfloat16)),
            ("WIDTH", width),
            ("CONSUMERS", settings.consumers),
            ("BLOCK_COLUMNS", settings.block_columns),
            ("STAGES", settings.stages),
            ("OVERLAP", int(settings.overlap)),
            ("PING_PONG", int(settings.ping_pong)),
            ("BLOCKS", settings.blocks),
        ),
        FOLDER,
    )


@functools.cache
def _kernel(
    dtype: torch.dtype, width: int, settings: SparseAttentionSettings, device: torch.device
) -> tuple[Any, int]:
    """The compiled kernel, and how many of its blocks the device holds at once."""
    bytes_ = shared_bytes(width, settings)
    kernel = load(source(dtype, width, settings), "sparse_attention", device, bytes_)
    return kernel, torch.cuda.get_device_properties(device).multi_processor_count * settings.blocks


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
        q: `(B, H, N, D)`, k and v `(B, H, Nk, D)`: any strides with D contiguous. Nothing is copied, unless
            rows do not start at multiples of 16 bytes.
        columns: the kept columns of every group of `columns.group_size` queries.
        base: `(B, H, N, D)` of any float dtype, or None for zeros.
        sign: +1 or −1.
        scale: of the logits.

    Returns:
        out `(B, H, N, D)` in the dtype and memory order of q, lse `(B, H, N)` float32. A group that keeps
        nothing gives its base, or zeros, and lse = −∞.
    """
    batch, heads, rows, width = q.shape
    out = empty_like_queries(q)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    if scale < 0:
        q, scale = -q, -scale  # the running maximum is taken before scaling
    if base is not None and base.dtype != q.dtype:
        base = base.to(q.dtype)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    base = None if base is None else _aligned(base)
    settings = settings.fitted(columns.group_size)
    kernel, most_blocks = _kernel(q.dtype, width, settings, q.device)
    tiles = -(-columns.group_size // (ROWS * settings.consumers))
    total = batch * heads * columns.groups * tiles
    launch(
        kernel, q.device, min(most_blocks, total), 128 * (settings.consumers + 1),
        q, k, v, columns.indices.contiguous(), columns.counts.contiguous(),
        0 if base is None else base, out, lse,
        *_steps(q), *_steps(k), *_steps(v), *((0, 0, 0) if base is None else _steps(base)), *_steps(out),
        heads, rows, columns.groups, columns.capacity, columns.group_size, tiles, total,
        scale * LOG2E, float(sign),
        shared_bytes=shared_bytes(width, settings),
    )  # fmt: skip
    return out, lse


def _steps(x: Tensor) -> tuple[int, int, int]:
    """Bytes from one batch, head and row to the next."""
    b, h, n, _ = x.stride()
    return 2 * b, 2 * h, 2 * n


def _aligned(x: Tensor) -> Tensor:
    """`x` itself if each of its rows starts at a multiple of 16 bytes and within reach, else a copy."""
    steps = _steps(x)
    together = x.data_ptr() | steps[0] | steps[1] | steps[2]
    if together % VECTOR_BYTES == 0 and steps[2] <= LARGEST_ROW_STRIDE:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _unsupported(dtype: torch.dtype, width: int) -> str | None:
    """Why this kernel cannot run this dtype and head dimension, or None."""
    if dtype not in DTYPES:
        return f"the Hopper attention kernels take float16 and bfloat16; got {dtype}"
    if width not in WIDTHS:
        return f"the Hopper attention kernels take head dimensions 64 and 128; got {width}"
    return None


KERNELS = (
    Kernel("sparse_attention", "cupy_hopper", sparse_attention, SparseAttentionSettings, _unsupported),
)

SOURCES = tuple(
    source(dtype, width, settings)
    for dtype, width, settings in (
        (torch.bfloat16, 128, SparseAttentionSettings()),
        (torch.float16, 64, SparseAttentionSettings()),
        (torch.bfloat16, 128, SparseAttentionSettings(3, 128, 2, overlap=False)),
        (torch.float16, 128, SparseAttentionSettings(2, 128, 3, ping_pong=True)),
        (torch.bfloat16, 128, SparseAttentionSettings(2, 176, 2)),
        (torch.bfloat16, 128, SparseAttentionSettings(1, 64, 2, blocks=2)),
    )
)

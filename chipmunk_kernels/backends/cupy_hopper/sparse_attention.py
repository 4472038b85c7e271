"""Launching sparse_attention.cu: column-sparse attention with wgmma and gathered tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy.module import Source, load, prepared
from chipmunk_kernels.backends.cupy_hopper import FOLDER
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.layout import empty_like_queries, maker, strides_like_queries
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice

LOG2E = 1.4426950408889634
WIDTHS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)
ROWS = 64
"""Query rows of one warpgroup."""
WARPGROUP = 128
VECTOR_BYTES = 16
SHARED_BYTES = 227 * 1024
"""Most shared memory of one block; blocks on one multiprocessor share that, less 1 KiB for each more."""
SPEEDS = {3: 1.0, 2: 0.9, 1: 0.7}
"""By warpgroups that share a gathered row, in parts of the fastest: 3 and 2 as measured on an H200 at video
size, 612 and 540 TF/s; 1 gathers three times as much as 3."""
_OTHER_REGISTERS = 28
"""Of a thread besides accumulators and weights, as compiled."""
LARGEST_ROW_STRIDE = 2**31 - 1
"""In bytes: a row's address is made with one 32-bit multiplication."""


@dataclass(frozen=True)
class SparseAttentionSettings(LaunchSettings):
    """Tile and schedule of the Hopper column-sparse attention kernel.

    Attributes:
        consumers: warpgroups that compute, 64 query rows each; cut to the group where that is shorter. Three
            serve a 192-row group at once: every gathered row then meets 192 queries. 0: as many as suit the
            group.
        block_columns: columns gathered at a time.
        stages: tiles of keys, and of values, that are under way.
        overlap: whether a warpgroup multiplies the next tile's keys before it has weighed this tile's logits.
            That takes registers: with three consumers and D = 128, 80 columns fit, 96 do not.
        ping_pong: whether the warpgroups issue their products in turns.
        blocks: that share a multiprocessor. More than one suits short problems, whose last wave is ragged.
        stagger: cycles by which each warpgroup begins its first products after the one before, so that their
            epilogues do not coincide. FLUX at 93 %, groups of 192, on an H200: 53.4 us with 0, 52.9 with
            2000, 50.0 to 50.8 with 3000 to 4000, 51.1 with 5500; over videos no difference.
    """

    consumers: int = choice(0, 0, 1, 2)
    block_columns: int = choice(80, 48, 64, 80, 112, 128, 176)
    stages: int = choice(4, 2, 3, 4)
    overlap: bool = choice(True, True, False)
    ping_pong: bool = choice(False, True, False)
    blocks: int = choice(1, 1, 2)
    stagger: int = choice(3200, 0, 2400, 3200, 4000)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        launched = self.fitted(problem.group_size)
        if self.consumers:
            if launched != self:
                return f"{self.consumers} warpgroups are more than {problem.group_size} rows need"
            if _idle(problem.group_size, self.consumers):
                return f"{self.consumers} warpgroups leave one idle in groups of {problem.group_size}"
        if self.ping_pong and (launched.consumers == 1 or not self.overlap):
            return "turns need two warpgroups or more, and overlap"
        needed = (shared_bytes(problem.width, launched) + 1024) * self.blocks - 1024
        limit = SHARED_BYTES if shared_memory_bytes is None else min(SHARED_BYTES, shared_memory_bytes)
        if needed > limit:
            return f"needs {needed} bytes of shared memory, the device has {limit}"
        largest = max(problem.width, self.block_columns) // 2 + _OTHER_REGISTERS
        if largest > launch_registers(launched):
            return (
                f"one product needs {largest} registers a thread, the launch has {launch_registers(launched)}"
            )
        wanted = _registers(problem.width, launched)
        if wanted > compute_registers(launched):
            return f"needs {wanted} registers a thread and has {compute_registers(launched)}"
        return None

    def fitted(self, group_size: int) -> SparseAttentionSettings:
        """These settings with as many warpgroups as a group of `group_size` rows is to have."""
        needed = -(-group_size // ROWS)
        if not self.consumers:
            chosen = max(
                SPEEDS, key=lambda count: SPEEDS[count] * needed / (needed + _idle(group_size, count))
            )
        elif needed < self.consumers:
            chosen = needed
        else:
            return self
        return replace(self, consumers=chosen, ping_pong=self.ping_pong and chosen > 1)


def _idle(group_size: int, consumers: int) -> int:
    """Warpgroups without a row in the blocks that serve a group."""
    return -(-group_size // ROWS) % -consumers * -1


def shared_bytes(width: int, settings: SparseAttentionSettings) -> int:
    """Dynamic shared memory of a block: queries, stages of keys and of values, barriers."""
    rows = ROWS * settings.consumers + 2 * settings.stages * settings.block_columns
    return rows * width * 2 + 4 * settings.stages * 8


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
            ("STAGGER", settings.stagger),
        ),
        FOLDER,
    )


@dataclass(frozen=True)
class Plan:
    """What a launch takes besides addresses.

    Attributes:
        launch: of the kernel, with all arguments but tensors.
        new_out, new_lse: give tensors for the results.
        readable: whether rows are where 16-byte copies can fetch them, if the tensors start there.
    """

    launch: Callable[..., None]
    new_out: Callable[[], Tensor]
    new_lse: Callable[[], Tensor]
    readable: bool


@functools.cache
def _kernel(
    dtype: torch.dtype, width: int, settings: SparseAttentionSettings, device: torch.device
) -> tuple[Any, int]:
    """The compiled kernel, and how many of its blocks the device holds at once."""
    bytes_ = shared_bytes(width, settings)
    kernel = load(source(dtype, width, settings), "sparse_attention", device, bytes_)
    return kernel, torch.cuda.get_device_properties(device).multi_processor_count * settings.blocks


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
    settings = settings.fitted(group_size)
    batch, heads, rows, width = shape
    _, _, groups, capacity = lists
    kernel, most_blocks = _kernel(dtype, width, settings, device)
    tiles = -(-group_size // (ROWS * settings.consumers))
    pairs, each = batch * heads, groups * tiles
    whole, units = share_out(pairs, each, rows, tiles, group_size, settings.consumers, most_blocks)
    out_strides = strides_like_queries(shape, strides[0])
    steps = [_steps(each or (0, 0, 0, 1)) for each in (*strides, out_strides)]
    launch = prepared(
        kernel, device, min(most_blocks, units), WARPGROUP * (settings.consumers + 1),
        *(step for each in steps for step in each),
        heads, rows, groups, capacity, group_size, tiles, pairs, whole, units,
        scale * LOG2E, float(sign),
        shared_bytes=shared_bytes(width, settings),
    )  # fmt: skip
    return Plan(
        launch=launch,
        new_out=maker(shape, dtype, device, out_strides),
        new_lse=maker((batch, heads, rows), torch.float32, device),
        readable=all(_readable(each) for each in steps),
    )


def share_out(
    pairs: int, each: int, rows: int, tiles: int, group_size: int, consumers: int, blocks: int
) -> tuple[int, int]:
    """How many row tiles are done whole, and how many units of work they and the parts of the others make.

    Tiles left over after rounds of all blocks are cut into one part a warpgroup, if the parts that have rows
    fit one round: a part takes about half of a whole tile's time, for it is bound by its gathers.

    Args:
        pairs: (batch, head) pairs, of `each` row tiles.
        rows: queries; the last tile of a pair holds the last of them, and comes after those of all pairs.
        tiles: of a group of `group_size` queries.
        consumers: warpgroups of a block.
        blocks: that run at once.
    """
    total = pairs * each
    left = total % blocks
    last = min(group_size, rows - (each // tiles - 1) * group_size) - (tiles - 1) * ROWS * consumers
    parts_of_last = max(0, min(consumers, -(-last // ROWS)))
    parts = min(left, pairs) * parts_of_last + max(0, left - pairs) * consumers
    if consumers == 1 or not left or parts > blocks:
        return total, total
    return total - left, total - left + left * consumers


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
    if scale < 0:
        q, scale = -q, -scale  # the running maximum is taken before scaling
    shape, dtype, device = q.shape, q.dtype, q.device
    if base is not None and base.dtype != dtype:
        base = base.to(dtype)
    indices = columns.indices
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


def _steps(strides: tuple[int, ...]) -> tuple[int, int, int]:
    """Bytes from one batch, head and row to the next."""
    b, h, n, _ = strides
    return 2 * b, 2 * h, 2 * n


def _readable(steps: tuple[int, int, int]) -> bool:
    """Whether each row is a multiple of 16 bytes away from the first, and within reach."""
    return (steps[0] | steps[1] | steps[2]) % VECTOR_BYTES == 0 and steps[2] <= LARGEST_ROW_STRIDE


def _aligned(x: Tensor) -> Tensor:
    """`x` itself if its rows start at multiples of 16 bytes and within reach, else a copy in its order."""
    if x.data_ptr() % VECTOR_BYTES == 0 and _readable(_steps(x.stride())):
        return x
    return empty_like_queries(x).copy_(x)


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
        (torch.bfloat16, 128, SparseAttentionSettings().fitted(192)),
        (torch.float16, 64, SparseAttentionSettings().fitted(192)),
        (torch.bfloat16, 128, SparseAttentionSettings(3, 128, 2, overlap=False)),
        (torch.float16, 128, SparseAttentionSettings(2, 128, 3, ping_pong=True)),
        (torch.bfloat16, 128, SparseAttentionSettings(2, 176, 2)),
        (torch.bfloat16, 128, SparseAttentionSettings(1, 64, 2, blocks=2)),
    )
)

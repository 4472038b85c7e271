"""The sparse MLP delta in two kernels: up-projection and cache update, then down-projection into the output.

Up computes the transposed tile (neurons × tokens): the activation cache is neuron-major, so its rows are
read and written along tokens, and the packed delta keeps that layout `(B, G, C, group_size)`. The new
activation is rounded to the cache's dtype first and the delta taken from the rounded value, so that the
caches stay consistent: the output gains exactly what the activation cache gains.

Program order: a band of `band` token groups shares one weight block before the next block begins. Column
lists ascend, so the same slots of neighbouring groups lie near each other in the weights and meet in the L2
cache; a band bounds how many activations compete with them for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_kernels.backends.triton import interpreted
from chipmunk_kernels.backends.triton.device import REGISTERS, units
from chipmunk_kernels.backends.triton.launch import (
    MOST_REGISTERS,
    on_device,
    precision,
    register_cap,
    signature,
    tile_rows,
    tile_warps,
)
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice

SCRATCH_BYTES = 64 << 20
"""Most scratch memory of a call, if one group of each batch entry fits it."""
OTHER_REGISTERS = 112  # that a thread needs besides its accumulator, as compiled for sm_90


@dataclass(frozen=True)
class SparseMlpSettings(LaunchSettings):
    """Tiles of the two kernels.

    Attributes:
        up_columns: neurons per program of the up-projection.
        up_tokens: tokens per program of the up-projection.
        up_depth: model features per step of its loop; half as many in float32.
        up_warps, up_stages: its warps and pipeline stages.
        up_registers: cap on a thread's registers, 0 for none. 128 lets two programs of 8 warps share a
            multiprocessor, so that one's products cover the other's long epilogue; spills nothing on sm_90.
            Left out where operands pass through registers, too: 216 bytes a thread would spill before
            sm_90, 656 in float32.
        down_tokens: tokens per program of the down-projection.
        down_width: output features per program.
        down_depth: kept neurons per step of its loop; half as many in float32.
        down_warps, down_stages: its warps and pipeline stages.
        band: token groups that share a weight block before the next one begins.
        halve: 1 to cut the up-projection's last tiles in half where they would fill less than half a wave.
        prefetch: 1 to call a tile's cached activations into the L2 cache before its product.
    """

    up_columns: int = choice(128, 64, 128, 256)
    up_tokens: int = choice(128, 64, 128)
    up_depth: int = choice(64, 32, 64, 128)
    up_warps: int = choice(8, 4, 8)
    up_stages: int = choice(3, 2, 3, 4)
    up_registers: int = choice(128, 0, 128)
    down_tokens: int = choice(128, 64, 128)
    down_width: int = choice(128, 64, 128, 256)
    down_depth: int = choice(64, 32, 64, 128)
    down_warps: int = choice(4, 4, 8)
    down_stages: int = choice(3, 2, 3, 4)
    band: int = choice(32, 8, 32, 128)
    halve: int = choice(1, 0, 1)
    prefetch: int = choice(0, 0, 1)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        rows = min(problem.group_size, problem.rows)
        kernels = (
            ("up", self.up_columns, self.up_tokens, self.up_depth, self.up_warps, self.up_stages),
            ("down", self.down_width, self.down_tokens, self.down_depth, self.down_warps, self.down_stages),
        )
        for name, wide, tokens, depth, warps, stages in kernels:
            if tokens != tile_rows(tokens, rows):
                return f"{name}_tokens {tokens} is wider than a group of {rows} rows"
            # An accumulator of more than 128 registers a thread leaves too few of the 255 for the rest.
            if wide * tokens > 128 * 32 * warps:
                return f"{name}: a {wide} × {tokens} accumulator does not fit the registers of {warps} warps"
            # Elements of two bytes; one buffer fewer than stages is the least that any capability takes.
            needed = (wide + tokens) * depth * 2 * (stages - 1)
            if shared_memory_bytes is not None and needed > shared_memory_bytes:
                return f"{name}: needs {needed} bytes of shared memory, the device has {shared_memory_bytes}"
        if self.up_registers and self.up_columns * self.up_tokens > 64 * 32 * self.up_warps:
            return f"up: its accumulator would spill under a cap of {self.up_registers} registers"
        return None


@triton.jit
def _gelu_tanh(x):
    """GELU's tanh form as x · sigmoid(2u): for negative x, 1 + tanh(u) would cancel every digit."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * u))


@triton.jit
def _in_bands(program, blocks, groups, tiles, BAND: tl.constexpr):
    """(block, group, tile of the group's tokens): in each band of groups, tile varies fastest, then group."""
    per_group = blocks * tiles
    first = program // (BAND * per_group) * BAND
    wide = tl.minimum(groups - first, BAND)
    program -= first * per_group
    return program // (wide * tiles), first + program // tiles % wide, program % tiles


@triton.jit
def _prefetch(cache, columns, cache_f, m, tokens, COLUMNS: tl.constexpr, TOKENS: tl.constexpr):
    """Call a tile of the activation cache into the L2 cache, one 128-byte line a request."""
    LINE: tl.constexpr = 128 // (cache.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = triton.cdiv(TOKENS, LINE)
    line = tl.minimum(m + tl.arange(0, LINES) * LINE, tokens - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
        [cache + columns[:, None] * cache_f + line[None, :]],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _up_tile(
    x, w1, b1, index, cache, packed, block, tile, group, count,
    capacity, group_size, tokens, width, x_m, w1_f, cache_f,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, PREFETCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Packed delta of a block of kept neurons for one tile of a group's tokens; the cache takes the new."""
    slots = block * COLUMNS + tl.arange(0, COLUMNS)
    kept = slots < count
    columns = tl.load(index + slots, mask=kept, other=0).to(tl.int64)
    within = tile * TOKENS + tl.arange(0, TOKENS)
    m = group * group_size + within
    real = (within < group_size) & (m < tokens)
    # Clamped rather than masked: a masked-off row would only add work to a product that is discarded.
    rows = tl.where(real, m, 0).to(tl.int64)
    k = tl.arange(0, DEPTH)
    weight = w1 + columns[:, None] * w1_f + k[None, :]
    token = x + rows[None, :] * x_m + k[:, None]
    if PREFETCH:
        _prefetch(cache, columns, cache_f, group * group_size + tile * TOKENS, tokens, COLUMNS, TOKENS)
    total = tl.zeros((COLUMNS, TOKENS), tl.float32)
    for start in range(0, width, DEPTH):
        if EVEN:
            a = tl.load(weight)
            t = tl.load(token)
        else:
            a = tl.load(weight, mask=(start + k)[None, :] < width, other=0.0)
            t = tl.load(token, mask=(start + k)[:, None] < width, other=0.0)
        total = tl.dot(a, t, total, input_precision=PRECISION)
        weight += DEPTH
        token += DEPTH
    if b1 is not None:
        total += tl.load(b1 + columns, mask=kept, other=0.0).to(tl.float32)[:, None]
    mask = kept[:, None] & real[None, :]
    target = cache + columns[:, None] * cache_f + m[None, :]
    fresh = _gelu_tanh(total).to(cache.dtype.element_ty)
    delta = fresh.to(tl.float32) - tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, fresh, mask=mask)
    # Zero past the last token: down reads whole groups, a mask by token count would break up its loads.
    delta = tl.where(mask, delta, 0.0).to(packed.dtype.element_ty)
    position = packed + slots.to(tl.int64)[:, None] * group_size + within[None, :]
    tl.store(position, delta, mask=kept[:, None] & (within < group_size)[None, :])


@triton.jit(do_not_specialize=["first", "groups", "all_groups", "capacity", "blocks", "tiles", "whole"])
def up_kernel(
    x, w1, b1, indices, counts, cache, packed,
    first, groups, all_groups, capacity, group_size, tokens, width, blocks, tiles, whole,
    x_b, x_m, w1_f, cache_b, cache_f,
    BAND: tl.constexpr, HALVE: tl.constexpr,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, PREFETCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of packed delta a program. HALVE: tiles from number `whole` on are two programs' work."""
    program = tl.program_id(0)
    half = 0
    if HALVE:
        half = tl.where(program < whole, 0, (program - whole) % 2)
        program = tl.where(program < whole, program, whole + (program - whole) // 2)
    block, group, tile = _in_bands(program, blocks, groups, tiles, BAND)
    b = tl.program_id(1).to(tl.int64)
    packed += (b * groups + group) * capacity * group_size
    group += first
    row = b * all_groups + group
    count = tl.load(counts + row)
    x += b * x_b
    cache += b * cache_b
    index = indices + row * capacity
    if HALVE and tl.program_id(0) >= whole:
        block = 2 * block + half
        if block * (COLUMNS // 2) < count:
            _up_tile(
                x, w1, b1, index, cache, packed, block, tile, group, count,
                capacity, group_size, tokens, width, x_m, w1_f, cache_f,
                COLUMNS // 2, TOKENS, DEPTH, EVEN, PREFETCH, PRECISION,
            )  # fmt: skip
    elif block * COLUMNS < count:
        _up_tile(
            x, w1, b1, index, cache, packed, block, tile, group, count,
            capacity, group_size, tokens, width, x_m, w1_f, cache_f,
            COLUMNS, TOKENS, DEPTH, EVEN, PREFETCH, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first", "groups", "all_groups", "capacity", "blocks", "tiles"])
def down_kernel(
    packed, w2, indices, counts, output,
    first, groups, all_groups, capacity, group_size, tokens, width, blocks, tiles,
    w2_f, output_b, output_m,
    BAND: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the output gains the packed delta times the kept neurons' rows of w2."""
    block, group, tile = _in_bands(tl.program_id(0), blocks, groups, tiles, BAND)
    b = tl.program_id(1).to(tl.int64)
    packed += (b * groups + group) * capacity * group_size
    group += first
    row = b * all_groups + group
    count = tl.load(counts + row)
    if count > 0:
        within = tile * TOKENS + tl.arange(0, TOKENS)
        m = group * group_size + within
        real = (within < group_size) & (m < tokens)
        n = block * WIDTH + tl.arange(0, WIDTH)
        inside = n < width
        slots = tl.arange(0, DEPTH)
        index = indices + row * capacity
        delta = packed + within[:, None] + slots.to(tl.int64)[None, :] * group_size
        weight = w2 + n[None, :]
        written = (within < group_size)[:, None]
        total = tl.zeros((TOKENS, WIDTH), tl.float32)
        # Indices are loaded one step early: a weight load that waits for an index load of its own step would
        # leave the pipeline one tile deep whatever its stages. Two steps early, Triton gives the pipeline up.
        columns = tl.load(index + slots, mask=slots < count, other=0)
        for start in range(0, count, DEPTH):
            kept = start + slots < count
            d = tl.load(delta, mask=kept[None, :] & written, other=0.0)
            w = tl.load(
                weight + columns.to(tl.int64)[:, None] * w2_f, mask=kept[:, None] & inside[None, :], other=0.0
            )
            ahead = start + DEPTH + slots
            columns = tl.load(index + ahead, mask=ahead < count, other=0)
            total = tl.dot(d, w, total, input_precision=PRECISION)
            delta += DEPTH * group_size
        # Within a tile offsets are 32 bits wide (rows less than 16 million elements apart): wider ones spill.
        output += b * output_b + (group * group_size + tile * TOKENS).to(tl.int64) * output_m + block * WIDTH
        target = output + tl.arange(0, TOKENS)[:, None] * output_m + tl.arange(0, WIDTH)[None, :]
        mask = real[:, None] & inside[None, :]
        total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
        tl.store(target, total.to(output.dtype.element_ty), mask=mask)


def _wave(device: torch.device, accumulator: int, warps: int, cap: int) -> int:
    """Programs with an accumulator of that many elements that a device runs at once."""
    threads = 32 * warps
    registers = min(MOST_REGISTERS, cap or accumulator // threads + OTHER_REGISTERS)
    return units(device) * max(1, REGISTERS // (registers * threads))


def _groups_at_once(groups: int, bytes_per_group: int, tiles_per_group: int, wave: int) -> int:
    """As many groups as the scratch memory holds, fewer where that fills the last wave of tiles better."""
    most = max(1, min(groups, SCRATCH_BYTES // bytes_per_group))
    if most == groups:
        return groups
    return min(
        range(most, max(0, most - most // 4 - 1), -1),
        key=lambda some: triton.cdiv(some * tiles_per_group, wave) / (some * tiles_per_group),
    )


def _whole_tiles(tiles: int, batch: int, wave: int) -> int:
    """How many of a launch's tiles to leave whole: all, or the full waves if half tiles fit one last wave."""
    rest = tiles * batch % wave
    return tiles - rest if batch == 1 and tiles > wave and 0 < 2 * rest <= wave else tiles


def sparse_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2_by_neuron: Tensor,
    columns: ColumnSet,
    activation_cache: Tensor,
    output_cache: Tensor,
    activation: str,
    settings: SparseMlpSettings,
) -> None:
    """Assign kept neurons' new activations to activation_cache, add their change times w2 to output_cache.

    x `(B, M, K)`, w1 `(F, K)`, b1 `(F,)` or None, w2_by_neuron `(F, Kout)`, activation_cache `(B, F, M)`,
    output_cache `(B, M, Kout)`: last dimensions contiguous, other strides free. Scratch: the packed delta, in
    x.dtype; as many groups at once as `SCRATCH_BYTES` hold (all of FLUX's: 28 MB at 30 %).

    Raises:
        ValueError: an activation other than `gelu_tanh`.
    """
    if activation != "gelu_tanh":
        raise ValueError(f"activation: the triton backend computes 'gelu_tanh', got {activation!r}")
    batch, tokens, width = x.shape
    groups, capacity, group_size = columns.groups, columns.capacity, columns.group_size
    width_out = w2_by_neuron.shape[1]
    if batch * groups * capacity * tokens * width_out == 0:
        return
    indices, counts = columns.indices.contiguous(), columns.counts.contiguous()
    rows = min(group_size, tokens)
    up_tokens, down_tokens = tile_rows(settings.up_tokens, rows), tile_rows(settings.down_tokens, rows)
    up_blocks, up_tiles = triton.cdiv(capacity, settings.up_columns), triton.cdiv(rows, up_tokens)
    down_blocks, down_tiles = triton.cdiv(width_out, settings.down_width), triton.cdiv(rows, down_tokens)
    # Wide elements in half as deep tiles take the same shared memory.
    up_depth, down_depth = settings.up_depth * 2 // x.itemsize, settings.down_depth * 2 // x.itemsize
    cap = register_cap(settings.up_registers, x.device) if x.itemsize == 2 else None
    up_wave = _wave(x.device, settings.up_columns * up_tokens, settings.up_warps, cap or 0)
    per_group = batch * capacity * group_size * x.itemsize
    at_once = _groups_at_once(groups, per_group, batch * up_blocks * up_tiles, up_wave)
    packed = torch.empty(batch * at_once * capacity * group_size, dtype=x.dtype, device=x.device)
    with on_device(x):
        for first in range(0, groups, at_once):
            some = min(at_once, groups - first)
            up_programs = up_blocks * up_tiles * some
            whole = _whole_tiles(up_programs, batch, up_wave) if settings.halve else up_programs
            up_kernel[(2 * up_programs - whole, batch)](
                x, w1, b1, indices, counts, activation_cache, packed,
                first, some, groups, capacity, group_size, tokens, width, up_blocks, up_tiles, whole,
                *x.stride()[:2], w1.stride(0), *activation_cache.stride()[:2],
                BAND=settings.band, HALVE=whole < up_programs,
                COLUMNS=settings.up_columns, TOKENS=up_tokens, DEPTH=up_depth,
                EVEN=width % up_depth == 0, PREFETCH=bool(settings.prefetch) and not interpreted(),
                PRECISION=precision(x.dtype),
                num_warps=settings.up_warps, num_stages=settings.up_stages,
                maxnreg=cap,
            )  # fmt: skip
            down_kernel[(down_blocks * down_tiles * some, batch)](
                packed, w2_by_neuron, indices, counts, output_cache,
                first, some, groups, capacity, group_size, tokens, width_out, down_blocks, down_tiles,
                w2_by_neuron.stride(0), *output_cache.stride()[:2],
                BAND=settings.band, TOKENS=down_tokens, WIDTH=settings.down_width, DEPTH=down_depth,
                PRECISION=precision(x.dtype),
                num_warps=tile_warps(settings.down_warps, down_tokens), num_stages=settings.down_stages,
            )  # fmt: skip


KERNELS = (Kernel("sparse_mlp", "triton", sparse_mlp, SparseMlpSettings),)

_DEFAULT = SparseMlpSettings()
_TYPES = {
    **dict.fromkeys(("x", "w1", "b1", "w2", "cache", "packed", "output"), "*bf16"),
    **dict.fromkeys(("indices", "counts"), "*i32"),
    **dict.fromkeys(("group_size", "tokens", "width"), "i32:16"),
    **dict.fromkeys(("x_b", "x_m", "w1_f", "w2_f", "cache_b", "cache_f", "output_b", "output_m"), "i32:16"),
}
_UP = {
    "BAND": _DEFAULT.band, "HALVE": True, "COLUMNS": _DEFAULT.up_columns, "TOKENS": _DEFAULT.up_tokens,
    "DEPTH": _DEFAULT.up_depth, "EVEN": True, "PREFETCH": True, "PRECISION": "tf32",
}  # fmt: skip
_DOWN = {
    "BAND": _DEFAULT.band, "TOKENS": _DEFAULT.down_tokens, "WIDTH": _DEFAULT.down_width,
    "DEPTH": _DEFAULT.down_depth, "PRECISION": "tf32",
}  # fmt: skip
COMPILE_CASES = (
    (
        "sparse_mlp up", up_kernel, signature(up_kernel, _TYPES, _UP), _UP,
        _DEFAULT.up_warps, _DEFAULT.up_stages,
    ),
    (
        "sparse_mlp down", down_kernel, signature(down_kernel, _TYPES, _DOWN), _DOWN,
        _DEFAULT.down_warps, _DEFAULT.down_stages,
    ),
)  # fmt: skip

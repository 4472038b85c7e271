"""Dense attention that also sums each group's attention mass per column, in the same pass.

One program owns one group: it takes the group's rows in tiles of BLOCK_M, and for each tile every column in
turn. The mass of a column is a float32 sum in a fixed order, first over a tile's rows, then tile after tile
into the output, which no other program touches: no atomics, no scratch, the same bits every time.

A weight exp(s − lse_prev) is the softmax weight exp(s − m) that the tile has anyway, times exp(m − lse_prev)
of the row: one exponential a row instead of one an element, where exponentials are dear (at D = 128 a tile's
take sm_90 as long as its products do). It stays in log space until then; where a row's logits outgrow its
previous normaliser by 77, the factor saturates, so that no sum of rows leaves float32's range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_kernels.backends.triton.flash import attend, key_count, log_sum_exp, reciprocal
from chipmunk_kernels.backends.triton.launch import (
    LOG2E,
    attention_misfit,
    key_limits,
    on_device,
    precision,
    register_cap,
    signature,
    tile_rows,
    tile_warps,
    unsupported_attention,
)
from chipmunk_kernels.columns import group_count
from chipmunk_kernels.layout import empty_like_queries
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice

PER_LN2 = tl.constexpr(LOG2E)
LARGEST_SHARE = tl.constexpr(112.0)  # in base 2: 65536 rows of it still add up to a finite float32


@dataclass(frozen=True)
class ColsumAttentionSettings(LaunchSettings):
    """Tile and launch of the dense attention kernel with column sums.

    Attributes:
        block_m: query rows taken at a time; cut to the group where that is shorter.
        block_n: columns taken in at a time.
        num_warps: warps of a program.
        num_stages: tiles of keys and values in flight.
        max_registers: cap on a thread's registers, so that more programs fit a multiprocessor; 0 is no cap.
    """

    block_m: int = choice(128, 64, 128, 256)
    block_n: int = choice(64, 32, 64, 128)
    num_warps: int = choice(8, 4, 8)
    num_stages: int = choice(2, 2, 3, 4)
    max_registers: int = choice(0, 0, 128)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        return attention_misfit(
            problem, problem.group_size, self.block_m, self.block_n, self.num_warps,
            self.max_registers, self.num_stages, shared_memory_bytes,
        )  # fmt: skip


@triton.jit
def _add_mass(mass, column, live, p, share, ADD: tl.constexpr):
    """Give columns the sum of a tile's weights, scaled by each row's share: assign it, or ADD it."""
    total = tl.sum(p * share[:, None], 0)
    if ADD:
        total += tl.load(mass + column, mask=live, other=0.0)
    tl.store(mass + column, total, mask=live)


@triton.jit
def _row_tile(
    q, k, v, lse_prev, out, lse, mass, q_n, k_n, v_n, out_n, top, end, n, scale_log2,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Rows `top` to `end` (BLOCK_M at most) against `n` columns; pointers are at the head's first element."""
    d = tl.arange(0, WIDTH)
    slots = tl.arange(0, BLOCK_N)
    row = top + tl.arange(0, BLOCK_M)
    inside = row < end
    row = row.to(tl.int64)
    q_tile = tl.load(q + row[:, None] * q_n + d[None, :], mask=inside[:, None], other=0.0)
    # Rows past the end weigh exp(−∞) = 0.
    reference = tl.load(lse_prev + row, mask=inside, other=float("inf")) * PER_LN2

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    full = n // BLOCK_N * BLOCK_N
    for start in tl.range(0, full, BLOCK_N):
        live = slots < BLOCK_N
        column = (start + slots).to(tl.int64)
        m, l, acc, p = attend(
            q_tile, k + column[:, None] * k_n + d[None, :], v + column[:, None] * v_n + d[None, :], live,
            m, l, acc, scale_log2, False, PRECISION,
        )  # fmt: skip
        _add_mass(mass, column, live, p, tl.exp2(tl.minimum(m - reference, LARGEST_SHARE)), ADD)
    if full < n:
        live = full + slots < n
        column = tl.minimum(full + slots, n - 1).to(tl.int64)
        m, l, acc, p = attend(
            q_tile, k + column[:, None] * k_n + d[None, :], v + column[:, None] * v_n + d[None, :], live,
            m, l, acc, scale_log2, True, PRECISION,
        )  # fmt: skip
        _add_mass(mass, column, live, p, tl.exp2(tl.minimum(m - reference, LARGEST_SHARE)), ADD)

    result = (acc * reciprocal(l)[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * out_n + d[None, :], result, mask=inside[:, None])
    tl.store(lse + row, log_sum_exp(m, l), mask=inside)


@triton.jit(do_not_specialize=["heads", "rows", "keys", "columns", "groups", "group_size"])
def colsum_attention_kernel(
    q, k, v, lse_prev, key_length, out, lse, mass,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n,
    heads, rows, keys, columns, groups, group_size, scale_log2,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SAME_ROWS: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One group. `columns` is the width of `mass`, `keys` how many may take part.

    SAME_ROWS says that k_n equals v_n, ONE_TILE that BLOCK_M covers a group: no mass then to read back
    and no outer loop, around which the compiler keeps so much in registers that some spill.
    """
    pair = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    b, h = pair // heads, pair % heads
    if SAME_ROWS:
        v_n = k_n
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    out += b * out_b + h * out_h
    lse_prev += pair * rows
    lse += pair * rows
    mass += (pair * groups + group) * columns
    n = key_count(key_length, b, keys)
    first = group * group_size
    end = tl.minimum(first + group_size, rows)

    slots = tl.arange(0, BLOCK_N)
    for start in tl.range(n if ONE_TILE else 0, columns, BLOCK_N):
        tl.store(mass + start + slots, 0.0, mask=start + slots < columns)
    if ONE_TILE:
        _row_tile(
            q, k, v, lse_prev, out, lse, mass, q_n, k_n, v_n, out_n, first, end, n, scale_log2,
            WIDTH, BLOCK_M, BLOCK_N, PRECISION, False,
        )  # fmt: skip
    else:
        for top in tl.range(first, end, BLOCK_M):
            tl.debug_barrier()  # this tile's threads read the mass that other threads wrote
            _row_tile(
                q, k, v, lse_prev, out, lse, mass, q_n, k_n, v_n, out_n, top, end, n, scale_log2,
                WIDTH, BLOCK_M, BLOCK_N, PRECISION, True,
            )  # fmt: skip


def colsum_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_prev: Tensor,
    group_size: int,
    key_length: int | Tensor | None,
    scale: float,
    settings: ColsumAttentionSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention, its normaliser, and each column's mass, Σ exp(s − lse_prev) over a group's queries.

    Args:
        q: `(B, H, N, D)`, k and v `(B, H, Nk, D)`: any strides with D contiguous, nothing is copied.
        lse_prev: float32 `(B, H, N)`, the natural-log normalisers of an earlier call.
        group_size: queries that share a sum; the last group may be ragged.
        key_length: an int, an integer tensor `(B,)` that the kernel reads itself, or None for all.
        scale: of the logits.

    Returns:
        out `(B, H, N, D)` in the dtype and memory order of q, lse `(B, H, N)` float32, mass `(B, H, G, Nk)`
        float32, zero from `key_length` on.
    """
    batch, heads, rows, width = q.shape
    groups, columns = group_count(rows, group_size), k.shape[2]
    out = empty_like_queries(q)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    mass = torch.empty((batch, heads, groups, columns), dtype=torch.float32, device=q.device)
    if scale < 0:
        q, scale = -q, -scale  # the running maximum is taken before scaling
    keys, lengths = key_limits(key_length, columns)
    block_m = tile_rows(settings.block_m, group_size)
    with on_device(q):
        colsum_attention_kernel[(batch * heads * groups,)](
            q, k, v, lse_prev.contiguous(), lengths, out, lse, mass,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            heads, rows, keys, columns, groups, group_size, scale * LOG2E,
            WIDTH=width, BLOCK_M=block_m, BLOCK_N=settings.block_n,
            SAME_ROWS=k.stride(2) == v.stride(2), ONE_TILE=block_m >= group_size,
            PRECISION=precision(q.dtype),
            num_warps=tile_warps(settings.num_warps, block_m), num_stages=settings.num_stages,
            maxnreg=register_cap(settings.max_registers),
        )  # fmt: skip
    return out, lse, mass


KERNELS = (
    Kernel("colsum_attention", "triton", colsum_attention, ColsumAttentionSettings, unsupported_attention),
)

_DEFAULT = ColsumAttentionSettings()
_CONSTEXPRS = {
    "WIDTH": 128, "BLOCK_M": _DEFAULT.block_m, "BLOCK_N": _DEFAULT.block_n, "SAME_ROWS": True,
    "ONE_TILE": True, "key_length": None, "PRECISION": "tf32",
}  # fmt: skip
_TYPES = {
    "q": "*bf16", "k": "*bf16", "v": "*bf16", "lse_prev": "*fp32", "out": "*bf16",
    "lse": "*fp32", "mass": "*fp32", "scale_log2": "fp32",
}  # fmt: skip
COMPILE_CASES = (
    (
        "colsum_attention", colsum_attention_kernel, signature(colsum_attention_kernel, _TYPES, _CONSTEXPRS),
        _CONSTEXPRS, _DEFAULT.num_warps, _DEFAULT.num_stages,
    ),
)  # fmt: skip

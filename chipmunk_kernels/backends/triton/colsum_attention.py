"""Dense attention that also sums each group's attention mass per column, in the same pass.

One program owns a row tile of a group, and takes every column in turn. Groups of several tiles take as many
launches, each of which adds its tile's rows to the sums of those before: a column's mass is a float32 sum in
a fixed order, with no atomics and no scratch, the same bits every time. (One program with a loop over its row
tiles kept so much in registers around that loop that some spilled.)

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

from chipmunk_kernels.backends.triton.flash import key_count, log_sum_exp, reciprocal, sweep
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


@dataclass(frozen=True)
class ColsumAttentionSettings(LaunchSettings):
    """Tile and launch of the dense attention kernel with column sums.

    Attributes:
        block_m: query rows taken at a time; cut to the group where that is shorter.
        block_n: columns taken in at a time.
        num_warps: warps of a program.
        num_stages: tiles of keys and values in flight.
        max_registers: cap on a thread's registers, so that more programs fit a multiprocessor; 0 is no cap.
        overlap: whether a tile's product with its values runs one tile late, beside the next tile's softmax.
    """

    block_m: int = choice(128, 64, 128, 256)
    block_n: int = choice(64, 32, 64, 128)
    num_warps: int = choice(8, 4, 8)
    num_stages: int = choice(2, 2, 3, 4)
    max_registers: int = choice(0, 0, 128)
    overlap: bool = choice(False, True, False)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        return attention_misfit(
            problem, problem.group_size, self.block_m, self.block_n, self.num_warps,
            self.max_registers, self.num_stages, self.overlap, shared_memory_bytes,
        )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "rows", "keys", "columns", "groups", "group_size", "within"])
def colsum_attention_kernel(
    q, k, v, lse_prev, key_length, out, lse, mass,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n,
    heads, rows, keys, columns, groups, group_size, within, scale_log2,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SAME_ROWS: tl.constexpr, OVERLAP: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The row tile of one group that begins `within` it. `columns` is the width of `mass`, `keys` how many
    may take part. SAME_ROWS says that k_n equals v_n, ADD that an earlier launch summed the rows before.
    """
    pair = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    b, h = pair // heads, pair % heads
    top = group * group_size + within
    end = tl.minimum((group + 1) * group_size, rows)
    if top >= end:  # a ragged last group has no rows for its later tiles
        return
    if SAME_ROWS:
        v_n = k_n
    d = tl.arange(0, WIDTH)
    row = top + tl.arange(0, BLOCK_M)
    inside = row < end
    row = row.to(tl.int64)
    k += b * k_b + h * k_h + d[None, :]
    v += b * v_b + h * v_h + d[None, :]
    q += b * q_b + h * q_h
    q_tile = tl.load(q + row[:, None] * q_n + d[None, :], mask=inside[:, None], other=0.0)
    mass += (pair * groups + group) * columns
    n = key_count(key_length, b, keys)
    if not ADD:
        slots = tl.arange(0, BLOCK_N)
        for start in tl.range(n, columns, BLOCK_N):
            tl.store(mass + start + slots, 0.0, mask=start + slots < columns)
    # Rows past the end weigh exp(−∞) = 0.
    reference = tl.load(lse_prev + pair * rows + row, mask=inside, other=float("inf")) * PER_LN2
    m, l, acc = sweep(
        q_tile, k, v, k_n, v_n, n, scale_log2, mass, reference,
        BLOCK_M, BLOCK_N, WIDTH, OVERLAP, ADD, PRECISION,
    )  # fmt: skip
    out += b * out_b + h * out_h
    result = (acc * reciprocal(l)[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * out_n + d[None, :], result, mask=inside[:, None])
    tl.store(lse + pair * rows + row, log_sum_exp(m, l), mask=inside)


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
    lse_prev = lse_prev.contiguous()
    programs, within = batch * heads * groups, 0
    with on_device(q):
        while within < min(group_size, rows):
            block_m = tile_rows(settings.block_m, group_size - within)
            colsum_attention_kernel[(programs,)](
                q, k, v, lse_prev, lengths, out, lse, mass,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
                heads, rows, keys, columns, groups, group_size, within, scale * LOG2E,
                WIDTH=width, BLOCK_M=block_m, BLOCK_N=settings.block_n,
                SAME_ROWS=k.stride(2) == v.stride(2), OVERLAP=settings.overlap, ADD=within > 0,
                PRECISION=precision(q.dtype),
                num_warps=tile_warps(settings.num_warps, block_m), num_stages=settings.num_stages,
                maxnreg=register_cap(settings.max_registers),
            )  # fmt: skip
            within += block_m
    return out, lse, mass


KERNELS = (
    Kernel("colsum_attention", "triton", colsum_attention, ColsumAttentionSettings, unsupported_attention),
)

_DEFAULT = ColsumAttentionSettings()
_CONSTEXPRS = {
    "WIDTH": 128, "BLOCK_M": _DEFAULT.block_m, "BLOCK_N": _DEFAULT.block_n, "SAME_ROWS": True,
    "OVERLAP": _DEFAULT.overlap, "ADD": False, "key_length": None, "PRECISION": "tf32",
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

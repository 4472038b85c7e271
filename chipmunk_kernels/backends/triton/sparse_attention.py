"""Column-sparse attention: each group of queries attends to its own scattered columns only.

One program handles up to BLOCK_M rows of one group: it reads the group's column list, gathers those rows of k
and v straight into shared memory (asynchronous copies to computed addresses; TMA cannot gather on Hopper) and
adds the normalised result to the base while it is still in registers.

Programs run heads outermost, so that those in flight share one head's keys and values in the L2 cache, and
lists ascend, so that they read the same neighbourhood at the same time.

The column list is read one tile ahead of the rows it names and carried through the loop: left to itself, the
compiler pipelines the chain list → rows → product so that each gather is waited for right after it is issued.
With `overlap`, a tile's product with its values also runs one tile late, beside the next tile's exponentials.
Keys are loaded as rows and transposed by the product, so that keys and values share addresses (on sm_90 that
took 10 % of the loop's instructions and most of its spills away).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_kernels.backends.triton.flash import (
    attend,
    held,
    hold,
    log_sum_exp,
    logits,
    only,
    reciprocal,
    weigh,
)
from chipmunk_kernels.backends.triton.launch import (
    ALMOST_ZERO,
    LOG2E,
    Launcher,
    attention_misfit,
    on_device,
    overlaps,
    precision,
    register_cap,
    signature,
    tile_rows,
    tile_warps,
    unsupported_attention,
)
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.layout import empty_like_queries
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice


@dataclass(frozen=True)
class SparseAttentionSettings(LaunchSettings):
    """Tile and launch of the column-sparse attention kernel.

    Attributes:
        block_m: query rows of a program; what a group has beyond whole tiles goes to shorter ones (see
            `launches`). Twice the rows gather half the bytes for each product.
        block_n: columns gathered at a time.
        num_warps: 8 spill on no GPU.
        num_stages: tiles of keys and values in flight, and in shared memory.
        max_registers: cap on a thread's registers, so that more programs fit a multiprocessor (see
            `register_cap`): two of 8 warps with 128, three of 4 warps with 168; 0 is no cap.
        peel_tail: whether the last, partly filled tile runs apart from the loop, where nothing hides its
            loads. In the loop, the natural order tests each tile and masks the last; `overlap` masks all.
        overlap: whether a tile's product with its values runs one tile late, beside the next tile's softmax.
            For one program of 8 warps on a multiprocessor; takes registers for the weights that wait.

    The defaults were the best of 25 on an H200 at FLUX's size, and of those that fit 99 KiB at a video's:
    there 128×128 tiles, 3 stages, no cap, peeled and overlapped, which need 224 KiB, were 12 % faster in one
    run and no faster in another, so the tuner tries them.
    """

    block_m: int = choice(128, 64, 128, 256)
    block_n: int = choice(64, 32, 64, 128)
    num_warps: int = choice(8, 4, 8)
    num_stages: int = choice(2, 2, 3, 4, 5)
    max_registers: int = choice(128, 0, 128, 168)
    peel_tail: bool = choice(False, True, False)
    overlap: bool = choice(False, True, False)

    @classmethod
    def presets(cls) -> tuple[SparseAttentionSettings, ...]:
        # Groups of 256 in one program, N 118656, H200: 24.9 ms, 11.3 times dense, measured by itself (in two
        # programs 27.7); 29.2 ms, 9.5 times, within a run of all bars.
        return cls(128, 128, 8, 3, 0, peel_tail=True, overlap=True), cls(256, 64, 8, 3, 0, peel_tail=True)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        return attention_misfit(
            problem, problem.group_size, self.block_m, self.block_n, self.num_warps,
            self.max_registers, self.num_stages, self.overlap, shared_memory_bytes,
        )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "rows", "groups", "capacity", "group_size", "within", "tiles"])
def sparse_attention_kernel(
    q, k, v, indices, counts, base, out, lse,
    q_b, q_h, q_n, k_b, k_h, v_b, v_h, base_b, base_h, base_n, out_b, out_h, out_n,
    heads, rows, groups, capacity, group_size, within, tiles, scale_log2, sign,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    K_N: tl.constexpr, V_N: tl.constexpr,
    PEEL_TAIL: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One of the `tiles` row tiles that begin `within` each group.

    K_N and V_N are the strides of rows of k and v: constants, so that an address is one instruction.
    """
    pair = tl.program_id(0) // (groups * tiles)
    tile = tl.program_id(0) % (groups * tiles)
    group = tile // tiles
    b = (pair // heads).to(tl.int64)
    h = (pair % heads).to(tl.int64)
    row = group * group_size + within + (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < tl.minimum((group + 1) * group_size, rows)
    row = row.to(tl.int64)
    d = tl.arange(0, WIDTH)
    slots = tl.arange(0, BLOCK_N)

    which = pair.to(tl.int64) * groups + group
    columns = indices + which * capacity
    kept = tl.load(counts + which)
    last = tl.maximum(kept - 1, 0)
    whole = kept // BLOCK_N * BLOCK_N if PEEL_TAIL else kept  # how far the loop goes
    # Columns are read one tile early: a gather that waited for its own list would leave one tile in flight.
    # The first tile's do not wait for the count either; slots past it repeat the first column.
    first = tl.load(columns, mask=capacity > 0, other=0)
    ahead = tl.where(slots < kept, tl.load(columns + slots, mask=slots < capacity, other=0), first)
    k += b * k_b + h * k_h + d[None, :]
    v += b * v_b + h * v_h + d[None, :]
    q_tile = tl.load(q + b * q_b + h * q_h + row[:, None] * q_n + d[None, :], mask=inside[:, None], other=0.0)

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    if OVERLAP:
        half = v.dtype.element_ty
        rescale = tl.full((BLOCK_M,), 1.0, tl.float32)
        waiting = hold(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), half)
        behind = ahead.to(tl.int64) * V_N
        # One step more than there are tiles, for the last product; none at all for an empty list.
        for start in tl.range(0, whole if PEEL_TAIL else tl.where(kept > 0, kept + BLOCK_N, 0), BLOCK_N):
            keys = k + (ahead.to(tl.int64) * K_N)[:, None]
            values = tl.load(v + behind[:, None])
            behind = ahead.to(tl.int64) * V_N
            ahead = tl.load(columns + tl.minimum(start + BLOCK_N + slots, last))
            s = logits(q_tile, keys, PRECISION)
            acc = tl.dot(held(waiting, half), values, acc * rescale[:, None], input_precision=PRECISION)
            if not PEEL_TAIL:
                s = only(s, slots, kept - start, False)
            p, m, l, rescale = weigh(s, slots < BLOCK_N, m, l, scale_log2, False)
            waiting = hold(p, half)
        if (whole if PEEL_TAIL else 0) > 0:
            values = tl.load(v + behind[:, None])
            acc = tl.dot(held(waiting, half), values, acc * rescale[:, None], input_precision=PRECISION)
    else:
        for start in tl.range(0, whole, BLOCK_N):
            column = ahead.to(tl.int64)[:, None]
            ahead = tl.load(columns + tl.minimum(start + BLOCK_N + slots, last))
            s = logits(q_tile, k + column * K_N, PRECISION)
            if not PEEL_TAIL:
                s = only(s, slots, kept - start, True)
            p, m, l, rescale = weigh(s, slots < BLOCK_N, m, l, scale_log2, False)
            values = tl.load(v + column * V_N)
            acc = tl.dot(p.to(values.dtype), values, acc * rescale[:, None], input_precision=PRECISION)
    if whole < kept:
        column = tl.load(columns + tl.minimum(whole + slots, last)).to(tl.int64)[:, None]
        m, l, acc, _ = attend(
            q_tile, k + column * K_N, v + column * V_N, whole + slots < kept,
            m, l, acc, scale_log2, True, PRECISION,
        )  # fmt: skip

    result = acc * (sign * reciprocal(l))[:, None]
    if base is not None:
        base_rows = base + b * base_b + h * base_h + row[:, None] * base_n + d[None, :]
        result += tl.load(base_rows, mask=inside[:, None], other=0.0).to(tl.float32)
    out_rows = out + b * out_b + h * out_h + row[:, None] * out_n + d[None, :]
    tl.store(out_rows, result.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + pair.to(tl.int64) * rows + row, log_sum_exp(m, l), mask=inside)


_launch = Launcher(sparse_attention_kernel)


def launches(group_size: int, settings: SparseAttentionSettings) -> list[tuple[int, int, int, int]]:
    """How the rows of a group are shared out: (first row, row tiles, block_m, block_n) of each launch.

    As many tiles of `block_m` as a group holds; then one of the smallest power of two for the rows that are
    left (192 = 128 + 64). Fewer rows take fewer columns at a time, so that more such programs share a
    multiprocessor.
    """
    tiles, rest = divmod(group_size, settings.block_m)
    plan = [(0, tiles, settings.block_m, settings.block_n)] if tiles else []
    if rest:
        block_m = tile_rows(settings.block_m, rest)
        block_n = max(32, settings.block_n * block_m // settings.block_m)
        plan.append((group_size - rest, 1, block_m, min(block_n, settings.block_n)))
    return plan


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
        q: `(B, H, N, D)`, k and v `(B, H, Nk, D)`: any strides with D contiguous, nothing is copied.
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
    if scale < 0:
        q, scale = -q, -scale  # the running maximum is taken before scaling
    base_strides = (0, 0, 0) if base is None else base.stride()[:3]
    indices, counts = columns.indices.contiguous(), columns.counts.contiguous()
    with on_device(q):
        for within, tiles, block_m, block_n in launches(columns.group_size, settings):
            num_warps = tile_warps(settings.num_warps, block_m)
            overlap = overlaps(
                settings.overlap, block_m, block_n, width, num_warps, settings.max_registers, q.device
            )
            _launch(
                batch * heads * columns.groups * tiles,
                (q, k, v, indices, counts, base, out, lse),
                (
                    *q.stride()[:3], *k.stride()[:2], *v.stride()[:2], *base_strides, *out.stride()[:3],
                    heads, rows, columns.groups, columns.capacity, columns.group_size, within, tiles,
                ),
                ((scale or ALMOST_ZERO) * LOG2E, float(sign)),
                {
                    "WIDTH": width, "BLOCK_M": block_m, "BLOCK_N": block_n,
                    "K_N": k.stride(2), "V_N": v.stride(2), "PEEL_TAIL": settings.peel_tail,
                    "OVERLAP": overlap, "PRECISION": precision(q.dtype),
                },
                {
                    "num_warps": num_warps,
                    "num_stages": settings.num_stages,
                    "maxnreg": register_cap(settings.max_registers, q.device),
                },
            )  # fmt: skip
    return out, lse


KERNELS = (
    Kernel("sparse_attention", "triton", sparse_attention, SparseAttentionSettings, unsupported_attention),
)

_DEFAULT = SparseAttentionSettings()
_CONSTEXPRS = {
    "WIDTH": 128, "BLOCK_M": _DEFAULT.block_m, "BLOCK_N": _DEFAULT.block_n, "K_N": 128, "V_N": 128,
    "PEEL_TAIL": _DEFAULT.peel_tail, "OVERLAP": _DEFAULT.overlap, "PRECISION": "tf32",
}  # fmt: skip
_TYPES = {
    "q": "*bf16", "k": "*bf16", "v": "*bf16", "indices": "*i32", "counts": "*i32",
    "base": "*bf16", "out": "*bf16", "lse": "*fp32", "scale_log2": "fp32", "sign": "fp32",
}  # fmt: skip
COMPILE_CASES = (
    (
        "sparse_attention", sparse_attention_kernel, signature(sparse_attention_kernel, _TYPES, _CONSTEXPRS),
        _CONSTEXPRS, _DEFAULT.num_warps, _DEFAULT.num_stages,
    ),
)  # fmt: skip

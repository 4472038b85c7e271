"""Selection of short rows: a contest in the registers of one program."""

from __future__ import annotations

import triton
import triton.language as tl

from chipmunk_kernels.backends.triton.select_keys import (
    append,
    covering_count,
    cut,
    finish,
    locate,
    mix,
    order_key,
    place_of,
    precedes,
)


def contest_shape(size: int) -> dict[str, int]:
    """Launch of a contest: 16 candidates a thread but no fewer than 4 warps; 2 a thread written at a time."""
    return {"SIZE": size, "PART": max(1, size // 8), "num_warps": max(4, size // 512)}


@triton.jit
def _contestants(scores, always, n, length, HAS_ALWAYS: tl.constexpr):
    """Key (0 if it does not compete, 1 for NaN) of each column, and whether it is kept anyway."""
    present = n < length
    granted = n < 0
    score = tl.load(scores + n, mask=present, other=0.0).to(tl.float32)
    if HAS_ALWAYS:
        granted = tl.load(always + n, mask=present, other=0) != 0
    key = tl.where(present & (granted == 0), tl.maximum(order_key(score), 1), 0).to(tl.uint32)
    return key, granted


@triton.jit
def _decide(
    indices, counts, row, scores, always, length, wanted, random, place, capacity,
    RANDOM: tl.constexpr, HAS_ALWAYS: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Write what the contest of one row keeps.

    Contestants are loaded anew, from caches, for each search and in parts to write them: held in registers
    from first to last they would spill.
    """
    n = tl.arange(0, SIZE)
    key, _ = _contestants(scores, always, n, length, HAS_ALWAYS)
    threshold, last = cut(key, n, wanted, SIZE)
    threshold = tl.maximum(threshold, 1)
    tl.debug_barrier()
    drawn, drawn_last = threshold, last
    if RANDOM:
        key_left, granted = _contestants(scores, always, n, length, HAS_ALWAYS)
        left = (n < length) & (granted == 0) & (precedes(key_left, n, threshold, last) == 0)
        hashed = tl.where(left, mix(place ^ n.to(tl.uint32)), 0).to(tl.uint32)
        # A hash of 0 cannot compete, and as the smallest it need not: it is drawn where all that is left is.
        drawn, drawn_last = cut(hashed, n, random, SIZE)
        tl.debug_barrier()
    written = tl.full((), 0, tl.int32)
    for start in range(0, length, PART):
        some = start + tl.arange(0, PART)
        rank, always_kept = _contestants(scores, always, some, length, HAS_ALWAYS)
        kept = always_kept | precedes(rank, some, threshold, last)
        if RANDOM:
            lot = mix(place ^ some.to(tl.uint32))
            kept = kept | ((some < length) & precedes(lot, some, drawn, drawn_last))
        written = append(indices, some, kept, written, capacity)
    finish(indices, counts, row, written, capacity, PART)


@triton.jit(do_not_specialize=["k", "random", "seed", "heads", "groups", "length", "capacity"])
def contest_kernel(
    scores, always, indices, counts,
    k, random, seed, coverage, heads, groups, length, capacity,
    stride_b, stride_h, stride_g, stride_always,
    COVERAGE: tl.constexpr, RANDOM: tl.constexpr, HAS_ALWAYS: tl.constexpr,
    SIZE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """A short row: the always-kept columns, the k best others (no more than COVERAGE needs), extras."""
    row = tl.program_id(0)
    b, h, g = locate(row, heads, groups)
    scores += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + g.to(tl.int64) * stride_g
    always += g.to(tl.int64) * stride_always
    wanted = k.to(tl.int32)
    if COVERAGE:
        n = tl.arange(0, SIZE)
        score = tl.load(scores + n, mask=n < length, other=0.0).to(tl.float32)
        mass = tl.where(score > 0.0, score, 0.0)
        granted = n < 0
        if HAS_ALWAYS:
            granted = tl.load(always + n, mask=n < length, other=1) != 0
        need = tl.sum(mass) * coverage - tl.sum(tl.where(granted, mass, 0.0))
        wanted = tl.minimum(wanted, covering_count(tl.where(granted, 0.0, mass), need, coverage))
        tl.debug_barrier()
    place = place_of(seed, b, h, g)
    _decide(
        indices + row.to(tl.int64) * capacity, counts, row, scores, always, length,
        wanted, random.to(tl.int32), place, capacity, RANDOM, HAS_ALWAYS, SIZE, PART,
    )  # fmt: skip

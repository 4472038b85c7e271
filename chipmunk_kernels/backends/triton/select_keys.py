"""What the selection kernels share: keys that order as scores do, the hash of the extras, the search.

A search never sorts. It builds the key of the last column taken bit by bit from the top, counting each time
how many keys reach the trial, and stops as soon as a trial is reached by exactly as many as are wanted: among
some thousand distinct scores after about 15 of 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """The finaliser of the extras' hash, on uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def order_key(score):
    """uint32 that orders as the float does: NaN lowest, then −inf; −0 equals +0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    flip = tl.where((bits >> 31) != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    return tl.where(score != score, 0, bits ^ flip).to(tl.uint32)


@triton.jit
def score_of(key):
    """The float whose `order_key` this is; some NaN for keys below that of −inf."""
    flip = tl.where((key >> 31) != 0, 0x80000000, 0xFFFFFFFF).to(tl.uint32)
    return (key ^ flip).to(tl.float32, bitcast=True)


@triton.jit
def locate(row, heads, groups):
    """(b, h, g) of a row of `(B, H, G)`."""
    return row // (groups * heads), (row // groups) % heads, row % groups


@triton.jit
def place_of(seed, b, h, g):
    """The hash of a row, which `mix(place ^ n)` completes for column n."""
    return mix(mix(mix(seed.to(tl.uint32) ^ b.to(tl.uint32)) ^ h.to(tl.uint32)) ^ g.to(tl.uint32))


@triton.jit
def reach(key, competitors, wanted, slack):
    """A key that at least `wanted` of the keys reach and, ties aside, at most `wanted + slack`; how many do.

    Keys of columns that do not compete must be 0; `competitors` is the number of those that do.
    """
    prefix = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    reached = competitors
    while (bit != 0) & (reached > wanted + slack):
        trial = prefix | bit
        count = tl.sum((key >= trial).to(tl.int32))
        prefix = tl.where(count >= wanted, trial, prefix)
        reached = tl.where(count >= wanted, count, reached)
        bit >>= 1
    return prefix, reached


@triton.jit
def cut(key, slot, wanted, SIZE: tl.constexpr):
    """(key, slot) of the last one taken: the `wanted` best are those with a larger key, and those with that
    very key up to that slot. Columns that do not compete must have the key 0; it is the threshold where more
    are wanted than have another."""
    competitors = tl.sum((key != 0).to(tl.int32))
    least = (competitors >= wanted).to(tl.uint32)
    wanted = tl.minimum(wanted, competitors)
    prefix, reached = reach(key, competitors, wanted, 0)
    prefix = tl.maximum(prefix, least)
    last = tl.full((), 2147483647, tl.int32)
    if reached > wanted:
        # Ties: bisects the slot too, since a running count of all would take more registers than there are.
        taken = tl.sum((key == prefix).to(tl.int32)) - (reached - wanted)
        last = tl.full((), 0, tl.int32)
        bit = tl.full((), SIZE // 2, tl.int32)
        while bit != 0:
            before = tl.sum(((key == prefix) & (slot < (last | bit))).to(tl.int32))
            last = tl.where(before < taken, last | bit, last)
            bit >>= 1
        last = tl.where(taken > 0, last, -1)
    return prefix, last


@triton.jit
def precedes(key, slot, threshold, last):
    """Whether `cut` takes a key."""
    return (key > threshold) | ((key == threshold) & (slot <= last))


@triton.jit
def covering_count(mass, need, coverage):
    """How many of the largest masses it takes to reach the `need`, or, for full coverage, all that are not 0.

    Every trial sums the same lanes in the same order and no term is negative, so the rounded sums are
    monotone in the trial, as the search needs.
    """
    count = tl.full((), 0, tl.int32)
    if coverage >= 1.0:
        # Also those that a float32 sum would round away.
        count = tl.sum((mass > 0.0).to(tl.int32))
    elif need > 0.0:
        bits = mass.to(tl.int32, bitcast=True)
        # Rounding may leave the need just above all that there is; then all that there is will do.
        need = tl.minimum(need, tl.sum(mass))
        prefix = tl.full((), 0, tl.int32)
        bit = tl.full((), 0x40000000, tl.int32)
        while bit != 0:
            trial = prefix | bit
            prefix = tl.where(tl.sum(tl.where(bits >= trial, mass, 0.0)) >= need, trial, prefix)
            bit >>= 1
        # `prefix` is the mass that crosses the need: all above it, and enough of its equals.
        above = tl.sum(tl.where(bits > prefix, mass, 0.0))
        ties = tl.sum((bits == prefix).to(tl.int32))
        short = tl.ceil((need - above) / tl.maximum(prefix.to(tl.float32, bitcast=True), 1e-38))
        taken = tl.where(short < ties, short, ties.to(tl.float32)).to(tl.int32)
        count = tl.sum((bits > prefix).to(tl.int32)) + tl.maximum(taken, tl.minimum(ties, 1))
    return count


@triton.jit
def finish(indices, counts, row, written, capacity, BLOCK: tl.constexpr):
    """Store the count, which may be a mark below 0; padding slots must hold a valid index, so they hold 0."""
    count = tl.minimum(written, capacity)
    tl.store(counts + row, count)
    for start in range(tl.maximum(count, 0), capacity, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(indices + slot, tl.zeros((BLOCK,), tl.int32), mask=slot < capacity)


@triton.jit
def append(indices, n, kept, written, capacity):
    """Write the kept columns of a block after the `written` ones; how many there are now."""
    slot = written + tl.cumsum(kept.to(tl.int32)) - 1
    tl.store(indices + slot, n, mask=kept & (slot < capacity))
    return written + tl.sum(kept.to(tl.int32))

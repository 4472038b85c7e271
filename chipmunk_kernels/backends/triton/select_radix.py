"""Selection by radix search: any row, any number of columns, many passes. What `select_fast` leaves over.

Scores become uint32 keys that order as the floats do; keys are counted digit by digit until the exact k-th
one is known; a last pass writes the kept columns in ascending order. That reads a row up to 32 / bits + 2
times. The random extras are found by the same search over hash keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from chipmunk_kernels.backends.triton.select_keys import append, finish, locate, mix, order_key, place_of


@triton.jit
def _is_best(key, n, threshold, last):
    """Above the threshold key, or equal to it and no later than the last tie that still fits."""
    return (key > threshold) | ((key == threshold) & (n <= last))


@triton.jit
def _candidates(scores, always, n, length, HAS_ALWAYS: tl.constexpr):
    """Scores, and which columns compete by score: those that exist and are not kept anyway."""
    inside = n < length
    score = tl.load(scores + n, mask=inside, other=0.0).to(tl.float32)
    competes = inside
    if HAS_ALWAYS:
        competes = inside & (tl.load(always + n, mask=inside, other=1) == 0)
    return score, competes


@triton.jit
def _keys(scores, always, n, length, place, threshold, last, EXTRAS: tl.constexpr, HAS_ALWAYS: tl.constexpr):
    """Keys and who competes: by score, or (EXTRAS) by hash among those that the scores left over."""
    score, competes = _candidates(scores, always, n, length, HAS_ALWAYS)
    key = order_key(score)
    if EXTRAS:
        competes = competes & (_is_best(key, n, threshold, last) == 0)
        key = mix(place ^ n.to(tl.uint32))
    return key, competes


@triton.jit
def _search(
    scores, always, length, place, wanted, threshold, last,
    EXTRAS: tl.constexpr, HAS_ALWAYS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Key and last index such that `_is_best` holds for exactly the `wanted` best competitors (or all)."""
    bins = tl.arange(0, 2**BITS)
    prefix = tl.full((), 0, tl.uint32)
    ties = tl.full((), 2147483647, tl.int32)
    shift = tl.full((), 32 - BITS, tl.int32)
    # Where a whole bucket is wanted, its lower digits do not matter: every key from `prefix` up is taken.
    while (shift >= 0) & (wanted < ties):
        counts = tl.zeros((2**BITS,), tl.int32)
        for start in range(0, length, BLOCK):
            n = start + tl.arange(0, BLOCK)
            key, competes = _keys(scores, always, n, length, place, threshold, last, EXTRAS, HAS_ALWAYS)
            # Two shifts: at the first digit BITS + shift is 32, more than a uint32 may be shifted by.
            competes = competes & (((key >> shift) >> BITS) == ((prefix >> shift) >> BITS))
            digit_of = ((key >> shift) & (2**BITS - 1)).to(tl.int32)
            counts += tl.histogram(digit_of, 2**BITS, mask=competes)
        wanted = tl.minimum(wanted, tl.sum(counts))
        at_least = tl.cumsum(counts, reverse=True)
        digit = tl.sum((at_least >= wanted).to(tl.int32)) - 1
        ties = tl.sum(tl.where(bins == digit, counts, 0))
        wanted -= tl.sum(tl.where(bins == digit, at_least - counts, 0))
        prefix = prefix | (digit.to(tl.uint32) << shift)
        shift -= BITS
    # Else `wanted` of the `ties` columns that have this very key remain to be taken, the first by index.
    end = length - 1
    if wanted < ties:
        end = tl.full((), -1, tl.int32)
        seen = tl.full((), 0, tl.int32)
        for start in range(0, length, BLOCK):
            n = start + tl.arange(0, BLOCK)
            key, competes = _keys(scores, always, n, length, place, threshold, last, EXTRAS, HAS_ALWAYS)
            tie = (competes & (key == prefix)).to(tl.int32)
            rank = seen + tl.cumsum(tie)
            end = tl.maximum(end, tl.max(tl.where((tie != 0) & (rank <= wanted), n, -1)))
            seen += tl.sum(tie)
    return prefix, end


@triton.jit
def _covering_count(scores, always, length, coverage, HAS_ALWAYS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the best competitors it takes until all kept columns hold `coverage` of the row's mass.

    Bisects the key, 16 thresholds at a time. Each threshold's sum runs over the same lanes in the same order
    and no term is negative, so the rounded sums are monotone in the threshold, as the search needs.
    """
    total = tl.zeros((BLOCK,), tl.float32)
    granted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        score, competes = _candidates(scores, always, start + tl.arange(0, BLOCK), length, HAS_ALWAYS)
        mass = tl.where(score == score, score, 0.0)
        total += mass
        granted += tl.where(competes, 0.0, mass)
    need = tl.sum(total) * coverage - tl.sum(granted)
    count = tl.full((), 0, tl.int32)
    if coverage >= 1.0:
        # Every column that holds any mass, also those that a float32 sum would round away.
        for start in range(0, length, BLOCK):
            score, competes = _candidates(scores, always, start + tl.arange(0, BLOCK), length, HAS_ALWAYS)
            count += tl.sum((competes & (score > 0.0)).to(tl.int32))
    elif need > 0.0:
        digits = tl.arange(0, 16)
        prefix = tl.full((), 0, tl.uint32)
        for step in range(8):
            shift = 28 - 4 * step
            bounds = prefix | (digits.to(tl.uint32) << shift)
            sums = tl.zeros((BLOCK, 16), tl.float32)
            for start in range(0, length, BLOCK):
                score, competes = _candidates(scores, always, start + tl.arange(0, BLOCK), length, HAS_ALWAYS)
                mass = tl.where(competes & (score == score), score, 0.0)
                sums += tl.where(order_key(score)[:, None] >= bounds[None, :], mass[:, None], 0.0)
            covered = tl.sum(sums, axis=0)
            # Rounding may leave the need just above all that there is; then all that there is will do.
            need = tl.minimum(need, tl.max(covered))
            digit = tl.sum((covered >= need).to(tl.int32)) - 1
            prefix = prefix | (digit.to(tl.uint32) << shift)
        # `prefix` is the key of the column that crosses the need: all above it, and enough of its equals.
        above = tl.zeros((BLOCK,), tl.float32)
        value = tl.zeros((BLOCK,), tl.float32)
        higher = tl.zeros((BLOCK,), tl.int32)
        equal = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, length, BLOCK):
            score, competes = _candidates(scores, always, start + tl.arange(0, BLOCK), length, HAS_ALWAYS)
            key = order_key(score)
            mass = tl.where(competes & (score == score), score, 0.0)
            above += tl.where(key > prefix, mass, 0.0)
            higher += (competes & (key > prefix)).to(tl.int32)
            equal += (competes & (key == prefix)).to(tl.int32)
            value = tl.maximum(value, tl.where(key == prefix, mass, 0.0))
        short = tl.ceil((need - tl.sum(above)) / tl.maximum(tl.max(value), 1e-38))
        ties = tl.sum(equal)
        taken = tl.where(short < ties, short, ties.to(tl.float32)).to(tl.int32)
        count = tl.sum(higher) + tl.maximum(taken, tl.minimum(ties, 1))
    return count


@triton.jit(do_not_specialize=["k", "random", "seed", "heads", "groups", "length", "capacity"])
def select_kernel(
    scores, always, indices, counts,
    k, random, seed, coverage, heads, groups, length, capacity,
    stride_b, stride_h, stride_g, stride_always,
    COVERAGE: tl.constexpr, RANDOM: tl.constexpr, HAS_ALWAYS: tl.constexpr,
    BLOCK: tl.constexpr, BITS: tl.constexpr, SUM_BLOCK: tl.constexpr, LEFT_OVER: tl.constexpr,
):  # fmt: skip
    """Row (b, h, g): the always-kept columns, the k best others (no more than COVERAGE needs), extras.

    LEFT_OVER: only rows that `shortlist_kernel` left undecided.
    """
    row = tl.program_id(0)
    if LEFT_OVER and tl.load(counts + row) >= 0:
        return
    b, h, g = locate(row, heads, groups)
    scores += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + g.to(tl.int64) * stride_g
    always += g.to(tl.int64) * stride_always
    indices += row.to(tl.int64) * capacity
    place = place_of(seed, b, h, g)

    wanted = k.to(tl.int32)
    if COVERAGE:
        wanted = tl.minimum(wanted, _covering_count(scores, always, length, coverage, HAS_ALWAYS, SUM_BLOCK))
    threshold, last = _search(
        scores, always, length, place, wanted, place, length, False, HAS_ALWAYS, BLOCK, BITS
    )
    extra_threshold, extra_last = threshold, last
    if RANDOM:
        extra_threshold, extra_last = _search(
            scores, always, length, place, random.to(tl.int32), threshold, last, True, HAS_ALWAYS, BLOCK, BITS
        )
    written = tl.full((), 0, tl.int32)
    for start in range(0, length, BLOCK):
        n = start + tl.arange(0, BLOCK)
        score, competes = _candidates(scores, always, n, length, HAS_ALWAYS)
        best = _is_best(order_key(score), n, threshold, last)
        if RANDOM:
            best = best | _is_best(mix(place ^ n.to(tl.uint32)), n, extra_threshold, extra_last)
        written = append(indices, n, (n < length) & (best | (competes == 0)), written, capacity)
    finish(indices, counts, row, written, capacity, BLOCK)

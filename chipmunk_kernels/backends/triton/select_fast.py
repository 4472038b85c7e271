"""Selection of long rows in one read, in three kernels.

Of a long row (HunyuanVideo: 119 056 scores, 5 % kept) a sample estimates a score that somewhat more columns
reach than are wanted; one pass over the row marks those columns, the always-kept ones and enough of the
largest hashes for the extras; they are listed in ascending order, and the contest is decided among the list,
exactly. Where the sample misled (the list overflows or holds too few) the row is marked, and `select_kernel`
decides it by radix search.

Marking is bound by memory, estimate and contest by the latency of searches whose every step waits for the
last: in one kernel, one row a multiprocessor at a time, they took 82 us a row, six times what reading it
takes. Apart, marking runs at the memory's pace and several contests share a multiprocessor.

Bytes: the row once and a bit a column; the listed scores again. 7.1 GB at HunyuanVideo's size, 1.65 ms at
4.3 TB/s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_kernels.backends.triton.select_keys import (
    append,
    finish,
    locate,
    mix,
    order_key,
    place_of,
    precedes,
    reach,
    score_of,
)

SAMPLE = 4096
CLUSTER = 8
"""Neighbours sampled together: one 32-byte sector, the least that memory delivers."""
EFFECTIVE_SAMPLE = SAMPLE // 4
"""Independent samples that the clusters are counted as, since neighbours in a video resemble each other."""
DEVIATIONS = 4.0
LISTS = (4096, 8192, 16384)
"""Sizes of a contest. Short rows hold it in registers, 16 candidates a thread; at 32 the searches spill."""
PACK_BLOCK = 128
ESTIMATE_WARPS = 8
MARK_WARPS = 4


@dataclass(frozen=True)
class Plan:
    """How to list the candidates of long rows.

    Attributes:
        size: slots of a list, one of `LISTS`.
        share: of a row's columns, the best that the list should take.
        bound: columns whose hash is at least this are listed for the draw of the extras.
    """

    size: int
    share: float
    bound: int

    @staticmethod
    def make(length: int, k: int, always: int, random: int) -> Plan | None:
        """The smallest list for the k best of `length` columns, `always` kept ones and `random` extras,
        with room for the sample's error to both sides; None if none is large enough."""
        if k + always + random >= length:
            return None
        part = min(0.5, k / length + 4 / EFFECTIVE_SAMPLE)
        spread = math.ceil(DEVIATIONS * length * math.sqrt(part * (1.0 - part) / EFFECTIVE_SAMPLE))
        drawn = random + math.ceil(6.0 * math.sqrt(random)) + 8 if random else 0
        rest = length - always - k
        least = k + spread + always + drawn
        for size in LISTS:
            if least + spread <= size and drawn < rest:
                # The middle of what is enough and what still fits.
                listed = k + (size - k - always - drawn) / 2
                share = min(1.0, listed / (length - always))
                return Plan(size, share, min(2**32 - 1, math.floor((1.0 - drawn / rest) * 2**32)))
        return None


def contest_size(length: int) -> int | None:
    """Slots of the contest of a row that fits registers whole, or None."""
    return next((size for size in LISTS if length <= size), None)


def shortlist_shape(size: int, warps: int) -> dict[str, int]:
    """Launch of the contests of long rows: 4 candidates a thread at once take 64 to 80 registers; 8, 111."""
    return {"SIZE": size, "PART": min(size, 4 * 32 * warps), "num_warps": warps}


@triton.jit
def _is_set(words, n, present):
    """Whether column n's bit is set."""
    return ((tl.load(words + n // 32, mask=present, other=0) >> (n % 32)) & 1) != 0


@triton.jit
def _ones(word):
    """Bits set in each uint32."""
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _estimate(
    scores, always, length, share,
    HAS_ALWAYS: tl.constexpr, SAMPLE: tl.constexpr, CLUSTER: tl.constexpr,
):  # fmt: skip
    """A score that about `share` of the competing columns reach, from clusters spread over the row."""
    i = tl.arange(0, SAMPLE)
    cluster = i // CLUSTER
    stride = length // (SAMPLE // CLUSTER)
    # Shaken, so that no period of the video's layout is met at one phase only.
    shaken = mix(cluster.to(tl.uint32)) % (stride - CLUSTER + 1).to(tl.uint32)
    n = (cluster * stride + shaken.to(tl.int32)) // CLUSTER * CLUSTER + i % CLUSTER
    key = order_key(tl.load(scores + n).to(tl.float32))
    competes = n >= 0
    if HAS_ALWAYS:
        competes = _is_set(always, n, competes) == 0
    competitors = tl.sum(competes.to(tl.int32))
    wanted = (competitors.to(tl.float32) * share).to(tl.int32)
    key = tl.where(competes, key, 0).to(tl.uint32)
    prefix, _ = reach(key, competitors, wanted, wanted // 16)
    return score_of(prefix)


@triton.jit(do_not_specialize=["first", "heads", "groups", "length"])
def estimate_kernel(
    scores, always, floors, share, first, heads, groups, length,
    stride_b, stride_h, stride_g, stride_always,
    HAS_ALWAYS: tl.constexpr, SAMPLE: tl.constexpr, CLUSTER: tl.constexpr,
):  # fmt: skip
    """The score from which a row's columns are candidates, for a chunk of rows from the `first`."""
    row = tl.program_id(0)
    b, h, g = locate(first + row, heads, groups)
    scores += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + g.to(tl.int64) * stride_g
    always += g.to(tl.int64) * stride_always
    tl.store(floors + row, _estimate(scores, always, length, share, HAS_ALWAYS, SAMPLE, CLUSTER))


@triton.jit(do_not_specialize=["seed", "bound", "first", "heads", "groups", "length", "blocks"])
def mark_kernel(
    scores, always, floors, words, seed, bound, first, heads, groups, length, blocks,
    stride_b, stride_h, stride_g, stride_always, stride_words,
    RANDOM: tl.constexpr, HAS_ALWAYS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One bit for each of 32 * STEP columns of a row: whether it is a candidate. `always` holds bits too.

    Marks are bits, so that a running count of 32 columns a lane suffices later: counting at every step takes
    ten times the instructions.
    """
    row = tl.program_id(0) // blocks
    b, h, g = locate(first + row, heads, groups)
    line = scores + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + g.to(tl.int64) * stride_g
    word = tl.program_id(0) % blocks * STEP + tl.arange(0, STEP)
    n = (word * 32)[:, None] + tl.arange(0, 32)[None, :]
    floor = tl.load(floors + row)
    if (tl.program_id(0) % blocks + 1) * (32 * STEP) <= length:
        # Without a mask, which would break up the loads' vectors.
        taken = tl.load(line + n).to(tl.float32) >= floor
    else:
        taken = tl.load(line + n, mask=n < length, other=float("nan")).to(tl.float32) >= floor
    if RANDOM:
        taken = taken | (mix(place_of(seed, b, h, g) ^ n.to(tl.uint32)) >= bound.to(tl.uint32))
    bit = tl.full((1,), 1, tl.int32) << tl.arange(0, 32)
    marks = tl.sum(tl.where(taken, bit[None, :], 0), axis=1)
    if RANDOM:
        # Hashes know no end of the row.
        beyond = tl.minimum(tl.maximum(word * 32 + 32 - length, 0), 31)
        marks = marks & (tl.full((1,), -1, tl.int32).to(tl.uint32, bitcast=True) >> beyond.to(tl.uint32)).to(
            tl.int32, bitcast=True
        )
    present = word * 32 < length
    if HAS_ALWAYS:
        marks = marks | tl.load(always + g.to(tl.int64) * stride_always + word, mask=present, other=0)
    tl.store(words + row.to(tl.int64) * stride_words + word, marks, mask=present)


@triton.jit
def _expand(words, listed, used, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """List the columns whose bits are set, as far as the list goes; how many there are."""
    held = tl.full((), 0, tl.int32)
    for start in range(0, used, BLOCK):
        at = start + tl.arange(0, BLOCK)
        word = tl.load(words + at, mask=at < used, other=0).to(tl.uint32, bitcast=True)
        ones = _ones(word)
        slot = held + tl.cumsum(ones) - ones
        held += tl.sum(ones)
        for bit in range(32):
            marked = ((word >> bit) & 1) != 0
            tl.store(listed + slot, at * 32 + bit, mask=marked & (slot < SIZE))
            slot += marked.to(tl.int32)
    return held


@triton.jit
def _complete(scores, always, keys, listed, held, floor, HAS_ALWAYS: tl.constexpr, PART: tl.constexpr):
    """Put the keys beside the listed columns, 0 for those listed for other reasons than their score, and the
    sign bit on the columns that are kept anyway. How many compete, and the highest key.

    Slots past the last get zeros, which win nothing: later loads need no mask, which would break them up.
    """
    competitors = tl.zeros((PART,), tl.int32)
    highest = tl.zeros((PART,), tl.uint32)
    for start in range(0, held, PART):
        slot = start + tl.arange(0, PART)
        present = slot < held
        n = tl.load(listed + slot, mask=present, other=0)
        score = tl.load(scores + n, mask=present, other=0.0).to(tl.float32)
        competes = present & (score >= floor)
        if HAS_ALWAYS:
            granted = _is_set(always, n, present)
            competes = competes & (granted == 0)
            n = tl.where(granted, n | -2147483648, n)
        key = tl.where(competes, order_key(score), 0).to(tl.uint32)
        tl.store(keys + slot, key.to(tl.int32, bitcast=True))
        tl.store(listed + slot, n)
        competitors += competes.to(tl.int32)
        highest = tl.maximum(highest, key)
    return tl.sum(competitors), tl.max(highest)


@triton.jit
def _draw(keys, listed, held, threshold, last, place, bound, PART: tl.constexpr):
    """Put its hash in the key's place beside each column that the scores left over, 0 beside the others, and
    the sign bit on those that the scores kept; how many have a hash."""
    competitors = tl.zeros((PART,), tl.int32)
    for start in range(0, held, PART):
        slot = start + tl.arange(0, PART)
        key = tl.load(keys + slot).to(tl.uint32, bitcast=True)
        entry = tl.load(listed + slot)
        best = precedes(key, slot, threshold, last)
        hashed = mix(place ^ entry.to(tl.uint32))
        competes = (slot < held) & (entry >= 0) & (best == 0) & (hashed >= bound)
        hashed = tl.where(competes, hashed, 0).to(tl.uint32)
        tl.store(keys + slot, hashed.to(tl.int32, bitcast=True))
        tl.store(listed + slot, tl.where(best, entry | -2147483648, entry))
        # A hash of 0 cannot compete, and as the smallest it need not: it is drawn where all that is left is.
        competitors += (hashed != 0).to(tl.int32)
    return tl.sum(competitors)


@triton.jit
def _reaching(keys, held, first, step, PART: tl.constexpr):
    """How many listed keys reach `first`, one step more, and two: in fields of 21 bits."""
    total = tl.zeros((PART,), tl.int32)
    for start in range(0, held, PART):
        slot = start + tl.arange(0, PART)
        key = tl.load(keys + slot).to(tl.uint32, bitcast=True)
        total += (key >= first).to(tl.int32)
        total += (key >= first + step).to(tl.int32) << 10
        total += (key >= first + 2 * step).to(tl.int32) << 20
    wide = total.to(tl.int64)
    return tl.sum((wide & 1023) | ((wide >> 10 & 1023) << 21) | (wide >> 20 << 42))


@triton.jit
def _cut_listed(keys, held, competitors, wanted, lowest, highest, SIZE: tl.constexpr, PART: tl.constexpr):
    """`cut` over keys in memory, all 0 or from `lowest` to `highest`: two bits a pass over them, from the
    first that differ."""
    shift = tl.full((), 30, tl.int32)
    while (shift > 0) & (((lowest ^ highest) >> shift.to(tl.uint32)) == 0):
        shift -= 2
    prefix = highest >> shift.to(tl.uint32) >> 2 << 2 << shift.to(tl.uint32)
    wanted = tl.minimum(wanted, competitors)
    reached = competitors
    while (shift >= 0) & (reached > wanted):
        step = tl.full((), 1, tl.uint32) << shift.to(tl.uint32)
        fields = _reaching(keys, held, prefix + step, step, PART)
        one = (fields & 0x1FFFFF).to(tl.int32)
        two = (fields >> 21 & 0x1FFFFF).to(tl.int32)
        three = (fields >> 42).to(tl.int32)
        digit = (one >= wanted).to(tl.uint32) + (two >= wanted).to(tl.uint32)
        digit += (three >= wanted).to(tl.uint32)
        reached = tl.where(one >= wanted, one, reached)
        reached = tl.where(two >= wanted, two, reached)
        reached = tl.where(three >= wanted, three, reached)
        prefix += digit * step
        shift -= 2
    prefix = tl.maximum(prefix, 1)
    last = tl.full((), 2147483647, tl.int32)
    if reached > wanted:
        taken = _ties_before(keys, held, prefix, held, PART) - (reached - wanted)
        last = tl.full((), 0, tl.int32)
        bit = tl.full((), SIZE // 2, tl.int32)
        while bit != 0:
            before = _ties_before(keys, held, prefix, last | bit, PART)
            last = tl.where(before < taken, last | bit, last)
            bit >>= 1
        last = tl.where(taken > 0, last, -1)
    return prefix, last


@triton.jit
def _ties_before(keys, held, threshold, end, PART: tl.constexpr):
    """How many of the first `end` listed keys equal the threshold."""
    total = tl.zeros((PART,), tl.int32)
    for start in range(0, held, PART):
        slot = start + tl.arange(0, PART)
        key = tl.load(keys + slot).to(tl.uint32, bitcast=True)
        total += ((key == threshold) & (slot < end)).to(tl.int32)
    return tl.sum(total)


@triton.jit(
    do_not_specialize=[
        "k", "random", "seed", "bound", "first", "heads", "groups", "rows", "length", "capacity",
    ]
)  # fmt: skip
def shortlist_kernel(
    scores, always, floors, words, indices, counts, scratch,
    k, random, seed, bound, first, heads, groups, rows, length, capacity,
    stride_b, stride_h, stride_g, stride_always, stride_words,
    RANDOM: tl.constexpr, HAS_ALWAYS: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Long rows whose candidates are marked, one after the other: list them, hold the contest among them.

    Columns and their keys, later hashes, lie in a program's own scratch memory, which the caches hold; in
    registers they would leave room for one row a multiprocessor. Barriers stand where threads read what
    others wrote, or write what others read.
    """
    bound = bound.to(tl.uint32)
    for number in tl.range(tl.program_id(0), rows, tl.num_programs(0), disable_licm=True):
        row = tl.cast(number, tl.int32)
        # The program's own number, as a value of the loop: addresses kept from row to row would only spill.
        keys = scratch + (row % tl.num_programs(0)).to(tl.int64) * (2 * SIZE)
        listed = keys + SIZE
        decided = first + row
        b, h, g = locate(decided, heads, groups)
        line = scores + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + g.to(tl.int64) * stride_g
        marks = always + g.to(tl.int64) * stride_always
        place = place_of(seed, b, h, g)
        floor = tl.load(floors + row)
        held = _expand(words + row.to(tl.int64) * stride_words, listed, (length + 31) // 32, SIZE, PART)
        tl.debug_barrier()
        written = tl.full((), -1, tl.int32)
        if held <= SIZE:
            wanted = k.to(tl.int32)
            competitors, highest = _complete(line, marks, keys, listed, held, floor, HAS_ALWAYS, PART)
            tl.debug_barrier()
            threshold, last = _cut_listed(
                keys, held, competitors, wanted, order_key(floor), highest, SIZE, PART
            )
            enough = competitors >= wanted
            drawn, drawn_last = threshold, last
            if RANDOM:
                extras = random.to(tl.int32)
                tl.debug_barrier()
                left = _draw(keys, listed, held, threshold, last, place, bound, PART)
                tl.debug_barrier()
                drawn, drawn_last = _cut_listed(
                    keys, held, left, extras, bound, tl.full((), 0xFFFFFFFF, tl.uint32), SIZE, PART
                )
                enough = enough & (left >= extras)
            if enough:
                written = tl.full((), 0, tl.int32)
                out = indices + decided.to(tl.int64) * capacity
                for start in range(0, held, PART):
                    slot = start + tl.arange(0, PART)
                    entry = tl.load(listed + slot)
                    key = tl.load(keys + slot).to(tl.uint32, bitcast=True)
                    kept = (entry < 0) | precedes(key, slot, drawn, drawn_last)
                    written = append(out, entry & 0x7FFFFFFF, kept, written, capacity)
        finish(indices + decided.to(tl.int64) * capacity, counts, decided, written, capacity, PART)
        tl.debug_barrier()


@triton.jit
def pack_kernel(mask, words, length, stride, BLOCK: tl.constexpr):
    """Bits of a bool row, 32 to a word."""
    width = (length + 31) // 32
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = (word * 32)[:, None] + tl.arange(0, 32)[None, :]
    marked = tl.load(mask + tl.program_id(0).to(tl.int64) * stride + n, mask=n < length, other=0) != 0
    bit = tl.full((1,), 1, tl.int32) << tl.arange(0, 32)
    marks = tl.sum(tl.where(marked, bit[None, :], 0), axis=1)
    tl.store(words + tl.program_id(0).to(tl.int64) * width + word, marks, mask=word < width)


def packed(mask: Tensor, length: int) -> Tensor:
    """Bits of the first `length` columns of a bool `(G, N)`, 32 to an int32: `(G, ceil(length / 32))`.

    Rows that are one row expanded are packed once.
    """
    mask = mask.view(torch.uint8)
    rows = 1 if mask.stride(0) == 0 else mask.shape[0]
    width = triton.cdiv(length, 32)
    words = torch.empty(rows, width, dtype=torch.int32, device=mask.device)
    pack_kernel[(rows, triton.cdiv(width, PACK_BLOCK))](
        mask, words, length, mask.stride(0), BLOCK=PACK_BLOCK, num_warps=4
    )
    return words.expand(mask.shape[0], width)

"""Selection in one read of the row, for rows whose contest fits one program's registers.

Short rows are the contest themselves. Of a long row (HunyuanVideo: 119 056 scores, 5 % kept) a sample
estimates a score that somewhat more columns reach than are wanted; one pass over the row marks those columns,
the always-kept ones and enough of the largest hashes for the extras; they are listed in ascending order, and
the contest is decided among the list, exactly. Where the sample misled (the list overflows or holds too few)
the row is marked, and `select_kernel` decides it by radix search.

Bytes: the row once; bits, list and the listed scores again come from the L2 cache. 7.1 GB at HunyuanVideo's
size, 1.65 ms at 4.3 TB/s.
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
    covering_count,
    cut,
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
"""Sizes of a contest: 16 candidates a thread; at 32 a thread the searches spill."""
PACK_BLOCK = 128


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


def contest_shape(size: int) -> dict[str, int]:
    """Launch of a contest: 16 candidates a thread but no fewer than 4 warps; 2 a thread written at a time."""
    return {"SIZE": size, "PART": max(1, size // 8), "num_warps": max(4, size // 512)}


def shortlist_shape(size: int, length: int, columns: int) -> dict[str, int]:
    """Launch of a shortlist: a contest's, and `columns` to mark per thread and step."""
    shape = contest_shape(size)
    step = columns * shape["num_warps"]
    return shape | {"STEP": step, "WORDS": max(step, triton.next_power_of_2(triton.cdiv(length, 32)))}


@triton.jit
def _contestants(
    source, always, slot, held, LISTED: tl.constexpr, HAS_ALWAYS: tl.constexpr, SIZE: tl.constexpr
):
    """Column, key (0 if it does not compete, 1 for NaN) and whether it is kept anyway, of each slot.

    LISTED: `source` holds the keys, then the columns with the sign bit for those kept anyway; else scores.
    """
    present = slot < held
    n = slot
    granted = slot < 0
    if LISTED:
        key = tl.load(source + slot, mask=present, other=0).to(tl.uint32, bitcast=True)
        entry = tl.load(source + SIZE + slot, mask=present, other=0)
        n = entry & 0x7FFFFFFF
        granted = entry < 0
    else:
        score = tl.load(source + slot, mask=present, other=0.0).to(tl.float32)
        if HAS_ALWAYS:
            granted = tl.load(always + slot, mask=present, other=0) != 0
        key = tl.where(present & (granted == 0), tl.maximum(order_key(score), 1), 0).to(tl.uint32)
    return n, key, granted


@triton.jit
def _decide(
    indices, counts, row, source, always, held, wanted, random, place, capacity, bound,
    RANDOM: tl.constexpr, LISTED: tl.constexpr, HAS_ALWAYS: tl.constexpr,
    SIZE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Write what the contest of one row keeps; mark the row if its list proves too short.

    Contestants are loaded anew, from caches, for each search and in parts to write them: held in registers
    from first to last they would spill.
    """
    slot = tl.arange(0, SIZE)
    _, key, _ = _contestants(source, always, slot, held, LISTED, HAS_ALWAYS, SIZE)
    enough = tl.sum((key != 0).to(tl.int32)) >= wanted
    threshold, last = cut(key, slot, wanted, SIZE)
    threshold = tl.maximum(threshold, 1)
    tl.debug_barrier()
    drawn, drawn_last = threshold, last
    if RANDOM:
        n, key_left, granted = _contestants(source, always, slot, held, LISTED, HAS_ALWAYS, SIZE)
        left = (slot < held) & (granted == 0) & (precedes(key_left, slot, threshold, last) == 0)
        hashed = mix(place ^ n.to(tl.uint32))
        hashed = tl.where(left & (hashed >= bound), hashed, 0).to(tl.uint32)
        enough = enough & (tl.sum((hashed != 0).to(tl.int32)) >= random)
        # A hash of 0 cannot compete, and as the smallest it need not: it is drawn where all that is left is.
        drawn, drawn_last = cut(hashed, slot, random, SIZE)
        tl.debug_barrier()
    written = tl.full((), 0, tl.int32)
    for start in range(0, held, PART):
        some = start + tl.arange(0, PART)
        column, rank, always_kept = _contestants(source, always, some, held, LISTED, HAS_ALWAYS, SIZE)
        kept = always_kept | precedes(rank, some, threshold, last)
        if RANDOM:
            lot = mix(place ^ column.to(tl.uint32))
            kept = kept | ((some < held) & (lot >= bound) & precedes(lot, some, drawn, drawn_last))
        written = append(indices, column, kept, written, capacity)
    if LISTED:
        written = tl.where(enough, written, -1)
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
        wanted, random.to(tl.int32), place, capacity, tl.full((), 0, tl.uint32),
        RANDOM, False, HAS_ALWAYS, SIZE, PART,
    )  # fmt: skip


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


@triton.jit
def _mark(
    scores, always, words, start, length, floor, place, bound,
    HAS_ALWAYS: tl.constexpr, RANDOM: tl.constexpr, WHOLE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One bit for each of 32 * STEP columns: whether it is a candidate. `always` holds bits too."""
    word = start // 32 + tl.arange(0, STEP)
    n = (word * 32)[:, None] + tl.arange(0, 32)[None, :]
    if WHOLE:
        score = tl.load(scores + n).to(tl.float32)
        taken = score >= floor
    else:
        score = tl.load(scores + n, mask=n < length, other=0.0).to(tl.float32)
        taken = (score >= floor) & (n < length)
    if RANDOM:
        drawn = mix(place ^ n.to(tl.uint32)) >= bound
        taken = taken | (drawn & (n < length))
    bit = tl.full((1,), 1, tl.int32) << tl.arange(0, 32)
    marks = tl.sum(tl.where(taken, bit[None, :], 0), axis=1)
    if HAS_ALWAYS:
        marks = marks | tl.load(always + word, mask=word * 32 < length, other=0)
    tl.store(words + word, marks)


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
def _expand(words, listed, used, SIZE: tl.constexpr, WORDS: tl.constexpr):
    """List the columns whose bits are set, as far as the list goes; how many there are."""
    at = tl.arange(0, WORDS)
    word = tl.load(words + at, mask=at < used, other=0).to(tl.uint32, bitcast=True)
    ones = _ones(word)
    slot = tl.cumsum(ones) - ones
    for bit in range(32):
        marked = ((word >> bit) & 1) != 0
        tl.store(listed + SIZE + slot, at * 32 + bit, mask=marked & (slot < SIZE))
        slot += marked.to(tl.int32)
    return tl.sum(ones)


@triton.jit
def _complete(
    scores, always, listed, held, floor, HAS_ALWAYS: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr
):
    """Put the keys beside the listed columns, 0 for those listed for other reasons than their score, and the
    sign bit on the columns that are kept anyway."""
    for start in range(0, held, PART):
        slot = start + tl.arange(0, PART)
        present = slot < held
        n = tl.load(listed + SIZE + slot, mask=present, other=0)
        score = tl.load(scores + n, mask=present, other=0.0).to(tl.float32)
        competes = score >= floor
        if HAS_ALWAYS:
            granted = _is_set(always, n, present)
            competes = competes & (granted == 0)
            tl.store(listed + SIZE + slot, tl.where(granted, n | -2147483648, n), mask=present)
        key = tl.where(competes, order_key(score), 0).to(tl.uint32)
        tl.store(listed + slot, key.to(tl.int32, bitcast=True), mask=present)


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


@triton.jit(
    do_not_specialize=["k", "random", "seed", "bound", "heads", "groups", "rows", "length", "capacity"]
)
def shortlist_kernel(
    scores, always, indices, counts, scratch,
    k, random, seed, bound, share, heads, groups, rows, length, capacity,
    stride_b, stride_h, stride_g, stride_always,
    RANDOM: tl.constexpr, HAS_ALWAYS: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr, SAMPLE: tl.constexpr, CLUSTER: tl.constexpr,
    SIZE: tl.constexpr, WORDS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Long rows, one after the other: mark the candidates, list them, hold the contest among them.

    Marks are bits, so that one running count of 32 columns a lane suffices: counting every step of the way
    takes ten times the instructions. Barriers stand where threads read what others wrote.
    """
    bound = bound.to(tl.uint32)
    whole = length // (32 * STEP) * (32 * STEP)
    for number in tl.range(tl.program_id(0), rows, tl.num_programs(0), disable_licm=True):
        row = tl.cast(number, tl.int32)
        # The program's own number, as a value of the loop: addresses kept from row to row would only spill.
        listed = scratch + (row % tl.num_programs(0)).to(tl.int64) * (2 * SIZE + WORDS)
        words = listed + 2 * SIZE
        b, h, g = locate(row, heads, groups)
        line = scores + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + g.to(tl.int64) * stride_g
        marks = always + g.to(tl.int64) * stride_always
        place = place_of(seed, b, h, g)
        floor = _estimate(line, marks, length, share, HAS_ALWAYS, SAMPLE, CLUSTER)
        for start in tl.range(0, whole, 32 * STEP, num_stages=STAGES):
            _mark(line, marks, words, start, length, floor, place, bound, HAS_ALWAYS, RANDOM, True, STEP)
        if whole < length:
            _mark(line, marks, words, whole, length, floor, place, bound, HAS_ALWAYS, RANDOM, False, STEP)
        tl.debug_barrier()
        held = _expand(words, listed, (length + 31) // 32, SIZE, WORDS)
        tl.debug_barrier()
        if held <= SIZE:
            _complete(line, marks, listed, held, floor, HAS_ALWAYS, SIZE, PART)
            tl.debug_barrier()
            _decide(
                indices + row.to(tl.int64) * capacity, counts, row, listed, marks, held,
                k.to(tl.int32), random.to(tl.int32), place, capacity, bound,
                RANDOM, True, HAS_ALWAYS, SIZE, PART,
            )  # fmt: skip
        else:
            tl.store(counts + row, -1)
        tl.debug_barrier()


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

"""Exact column selection: the best by score, by share of mass, or from a mask. One program per (b, h, g) row.

A row may hold 119 056 scores (HunyuanVideo), more than registers can, so nothing is sorted. Scores become
uint32 keys that order as the floats do; a radix search counts keys digit by digit until it knows the exact
k-th one; a last pass writes the kept columns in ascending order. That reads a row up to 32 / bits + 2
times. The random extras are found by the same search over hash keys.

Everything that decides is an integer, or a float32 sum taken in a fixed order, so repeats are bit-identical.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_kernels.backends.triton.launch import on_device, signature
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice


@dataclass(frozen=True)
class SelectSettings(LaunchSettings):
    """How a program walks its row.

    Attributes:
        block: columns per step.
        bits: digit of the radix search; at most 32 / bits passes over the row.
        num_warps: warps per program.
    """

    block: int = choice(2048, 1024, 2048, 4096, 8192, 16384)
    bits: int = choice(8, 4, 8)
    num_warps: int = choice(8, 4, 8, 16)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        if self.block > max(1024, triton.next_power_of_2(problem.columns)):
            return f"a block of {self.block} columns is wider than the row of {problem.columns}"
        if self.block > 1024 * self.num_warps:
            # 64 columns a thread spilled 5 kB on sm_90 and took a minute to compile.
            return f"a block of {self.block} columns is more than 32 to a thread of {self.num_warps} warps"
        return None


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _order_key(score):
    """uint32 that orders as the float does: NaN lowest, then −inf; −0 equals +0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    flip = tl.where((bits >> 31) != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    return tl.where(score != score, 0, bits ^ flip).to(tl.uint32)


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
    key = _order_key(score)
    if EXTRAS:
        competes = competes & (_is_best(key, n, threshold, last) == 0)
        key = _mix(place ^ n.to(tl.uint32))
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
                sums += tl.where(_order_key(score)[:, None] >= bounds[None, :], mass[:, None], 0.0)
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
            key = _order_key(score)
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


@triton.jit
def _append(indices, n, kept, written, capacity):
    """Write the kept columns of a block after the `written` ones; how many there are now."""
    slot = written + tl.cumsum(kept.to(tl.int32)) - 1
    tl.store(indices + slot, n, mask=kept & (slot < capacity))
    return written + tl.sum(kept.to(tl.int32))


@triton.jit
def _finish(indices, counts, row, written, capacity, BLOCK: tl.constexpr):
    """Store the count; padding slots must hold a valid index, so they hold 0."""
    count = tl.minimum(written, capacity)
    tl.store(counts + row, count)
    for start in range(count, capacity, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(indices + slot, tl.zeros((BLOCK,), tl.int32), mask=slot < capacity)


@triton.jit(do_not_specialize=["k", "random", "seed", "heads", "groups", "length", "capacity"])
def select_kernel(
    scores, always, indices, counts,
    k, random, seed, coverage, heads, groups, length, capacity,
    stride_b, stride_h, stride_g, stride_always,
    COVERAGE: tl.constexpr, RANDOM: tl.constexpr, HAS_ALWAYS: tl.constexpr,
    BLOCK: tl.constexpr, BITS: tl.constexpr, SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Row (b, h, g): the always-kept columns, the k best others (no more than COVERAGE needs), extras."""
    row = tl.program_id(0)
    g = row % groups
    h = (row // groups) % heads
    b = row // (groups * heads)
    scores += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + g.to(tl.int64) * stride_g
    always += g.to(tl.int64) * stride_always
    indices += row.to(tl.int64) * capacity
    place = _mix(_mix(_mix(seed.to(tl.uint32) ^ b.to(tl.uint32)) ^ h.to(tl.uint32)) ^ g.to(tl.uint32))

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
        best = _is_best(_order_key(score), n, threshold, last)
        if RANDOM:
            best = best | _is_best(_mix(place ^ n.to(tl.uint32)), n, extra_threshold, extra_last)
        written = _append(indices, n, (n < length) & (best | (competes == 0)), written, capacity)
    _finish(indices, counts, row, written, capacity, BLOCK)


@triton.jit(do_not_specialize=["heads", "groups", "columns", "capacity"])
def mask_kernel(
    mask, indices, counts, heads, groups, columns, capacity, stride_b, stride_h, stride_g, BLOCK: tl.constexpr
):
    """Row (b, h, g): the marked columns, as far as the capacity goes."""
    row = tl.program_id(0)
    g = row % groups
    h = (row // groups) % heads
    b = row // (groups * heads)
    mask += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + g.to(tl.int64) * stride_g
    indices += row.to(tl.int64) * capacity
    written = tl.full((), 0, tl.int32)
    for start in range(0, columns, BLOCK):
        n = start + tl.arange(0, BLOCK)
        kept = tl.load(mask + n, mask=n < columns, other=0) != 0
        written = _append(indices, n, kept, written, capacity)
    _finish(indices, counts, row, written, capacity, BLOCK)


SUM_BLOCK = 512


def _outputs(shape: torch.Size, capacity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    indices = torch.empty(*shape[:3], capacity, dtype=torch.int32, device=device)
    return indices, torch.empty(shape[:3], dtype=torch.int32, device=device)


def _with_rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _select(
    scores: Tensor,
    k: int,
    coverage: float | None,
    always: Tensor | None,
    random: int,
    seed: int,
    key_length: int,
    capacity: int,
    settings: SelectSettings,
) -> tuple[Tensor, Tensor]:
    indices, counts = _outputs(scores.shape, capacity, scores.device)
    if counts.numel() == 0:
        return indices, counts
    scores = _with_rows_contiguous(scores)
    marks = counts if always is None else always.view(torch.uint8)
    # The hash works on 32 bits; as a signed number the seed always compiles to the same argument type.
    seed = (seed & 0xFFFFFFFF) - ((seed & 0x80000000) << 1)
    with on_device(scores):
        select_kernel[(counts.numel(),)](
            scores, marks, indices, counts,
            k, random, seed, 0.0 if coverage is None else coverage,
            scores.shape[1], scores.shape[2], key_length, capacity,
            scores.stride(0), scores.stride(1), scores.stride(2), 0 if always is None else marks.stride(0),
            COVERAGE=coverage is not None, RANDOM=random > 0, HAS_ALWAYS=always is not None,
            BLOCK=settings.block, BITS=settings.bits, SUM_BLOCK=SUM_BLOCK, num_warps=settings.num_warps,
        )  # fmt: skip
    return indices, counts


def topk_columns(
    scores: Tensor,
    k: int,
    always: Tensor | None,
    random: int,
    seed: int,
    key_length: int,
    capacity: int,
    settings: SelectSettings,
) -> tuple[Tensor, Tensor]:
    """Indices int32 `(B, H, G, capacity)` and counts of the always-kept, the k best others and `random` more.

    scores `(B, H, G, N)`, always bool `(G, N)` or None; columns from key_length on are not kept.
    """
    return _select(scores, k, None, always, random, seed, key_length, capacity, settings)


def coverage_columns(
    scores: Tensor,
    coverage: float,
    max_columns: int,
    always: Tensor | None,
    random: int,
    seed: int,
    key_length: int,
    capacity: int,
    settings: SelectSettings,
) -> tuple[Tensor, Tensor]:
    """As `topk_columns`, with k for each row the fewest columns that reach `coverage` (summed in float32)."""
    return _select(scores, max_columns, coverage, always, random, seed, key_length, capacity, settings)


def columns_from_mask(mask: Tensor, capacity: int, settings: SelectSettings) -> tuple[Tensor, Tensor]:
    """Indices and counts of the marked columns of bool `(B, H, G, N)`, the first `capacity` of each row."""
    indices, counts = _outputs(mask.shape, capacity, mask.device)
    if counts.numel() == 0:
        return indices, counts
    mask = _with_rows_contiguous(mask).view(torch.uint8)
    with on_device(mask):
        mask_kernel[(counts.numel(),)](
            mask, indices, counts, mask.shape[1], mask.shape[2], mask.shape[3], capacity,
            mask.stride(0), mask.stride(1), mask.stride(2),
            BLOCK=settings.block, num_warps=settings.num_warps,
        )  # fmt: skip
    return indices, counts


KERNELS = (
    Kernel("topk_columns", "triton", topk_columns, SelectSettings),
    Kernel("coverage_columns", "triton", coverage_columns, SelectSettings),
    Kernel("columns_from_mask", "triton", columns_from_mask, SelectSettings),
)

_DEFAULT = SelectSettings()
_TYPES = {
    "scores": "*fp32", "coverage": "fp32", "always": "*u8", "mask": "*u8",
    **dict.fromkeys(("indices", "counts"), "*i32"),
    **dict.fromkeys(("stride_b", "stride_h", "stride_g", "stride_always"), "i32:16"),
}  # fmt: skip


def _case(name: str, kernel: Any, **constexprs: Any) -> tuple[Any, ...]:
    return name, kernel, signature(kernel, _TYPES, constexprs), constexprs, _DEFAULT.num_warps, 3


_WALK = {
    "HAS_ALWAYS": True,
    "RANDOM": True,
    "BLOCK": _DEFAULT.block,
    "BITS": _DEFAULT.bits,
    "SUM_BLOCK": SUM_BLOCK,
}
COMPILE_CASES = (
    _case("topk_columns", select_kernel, COVERAGE=False, **_WALK),
    _case("coverage_columns", select_kernel, COVERAGE=True, **_WALK),
    _case("columns_from_mask", mask_kernel, BLOCK=_DEFAULT.block),
)

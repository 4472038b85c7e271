"""Exact column selection: the best by score, by share of mass, or from a mask. One program per (b, h, g) row.

Most rows are read once: short ones by `select_short`, long ones by `select_fast`. `select_radix` decides the
others: coverage of long rows, more columns than a list holds, rows that a sample misled.

Everything that decides is an integer, or a float32 sum taken in a fixed order, so repeats are bit-identical.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_kernels.backends.triton.device import register_share, units
from chipmunk_kernels.backends.triton.launch import on_device, signature
from chipmunk_kernels.backends.triton.select_fast import (
    CLUSTER,
    ESTIMATE_WARPS,
    LISTS,
    MARK_WARPS,
    SAMPLE,
    Plan,
    contest_size,
    estimate_kernel,
    mark_kernel,
    packed,
    shortlist_kernel,
    shortlist_shape,
)
from chipmunk_kernels.backends.triton.select_keys import append, finish, locate
from chipmunk_kernels.backends.triton.select_radix import select_kernel
from chipmunk_kernels.backends.triton.select_scratch import chunk
from chipmunk_kernels.backends.triton.select_short import contest_kernel, contest_shape
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice


@dataclass(frozen=True)
class SelectSettings(LaunchSettings):
    """How programs walk their rows.

    Attributes:
        block: columns per step of the radix search and of the mask's walk.
        bits: digit of the radix search; at most 32 / bits passes over the row.
        num_warps: warps per program of these two.
        mark_columns: columns per thread while marking the candidates of a long row.
        contest_warps: warps of a program that holds the contests of long rows.
        per_unit: most such programs per multiprocessor, fewer where their lists exceed the scratch memory;
            its registers hold 32 of their warps on sm_90.
    """

    block: int = choice(2048, 1024, 2048, 4096, 8192, 16384)
    bits: int = choice(8, 4, 8)
    num_warps: int = choice(8, 4, 8, 16)
    mark_columns: int = choice(32, 8, 16, 32)
    contest_warps: int = choice(8, 4, 8)
    per_unit: int = choice(4, 2, 3, 4, 6, 8)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        if self.block > max(1024, triton.next_power_of_2(problem.columns)):
            return f"a block of {self.block} columns is wider than the row of {problem.columns}"
        if self.block > 1024 * self.num_warps:
            # 64 columns a thread spilled 5 kB on sm_90 and took a minute to compile.
            return f"a block of {self.block} columns is more than 32 to a thread of {self.num_warps} warps"
        return None


@triton.jit(do_not_specialize=["heads", "groups", "columns", "capacity"])
def mask_kernel(
    mask, indices, counts, heads, groups, columns, capacity, stride_b, stride_h, stride_g, BLOCK: tl.constexpr
):
    """Row (b, h, g): the marked columns, as far as the capacity goes."""
    row = tl.program_id(0)
    b, h, g = locate(row, heads, groups)
    mask += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + g.to(tl.int64) * stride_g
    indices += row.to(tl.int64) * capacity
    written = tl.full((), 0, tl.int32)
    for start in range(0, columns, BLOCK):
        n = start + tl.arange(0, BLOCK)
        kept = tl.load(mask + n, mask=n < columns, other=0) != 0
        written = append(indices, n, kept, written, capacity)
    finish(indices, counts, row, written, capacity, BLOCK)


SUM_BLOCK = 512
FEWEST_REGISTERS = 64
"""Of a contest's thread: with fewer it spills much. Left alone, Triton 3.6 takes 80 with 8 warps, room for
three programs, not four; and rows are dealt out beforehand, so one that waits doubles the time of all."""


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
    row = Row(scores, always, indices, counts, k, coverage, random, seed, key_length)
    with on_device(scores):
        size = contest_size(key_length)
        if size is not None:
            row.contest(size)
            return indices, counts
        plan = None if coverage is not None else Plan.make(key_length, k, capacity - k - random, random)
        if plan is not None:
            row.shortlist(plan, settings)
        row.search(settings, left_over=plan is not None)
    return indices, counts


class Row:
    """The launches that decide rows of one shape: what they share, and what each adds."""

    def __init__(
        self,
        scores: Tensor,
        always: Tensor | None,
        indices: Tensor,
        counts: Tensor,
        k: int,
        coverage: float | None,
        random: int,
        seed: int,
        length: int,
    ) -> None:
        self.rows, self.length = counts.numel(), length
        self.scores, self.always, self.results = scores, always, (indices, counts)
        self.wanted = (k, random, _signed(seed))
        self.coverage = coverage
        self.extent = (scores.shape[1], scores.shape[2])
        self.room = (length, indices.shape[3])
        self.kinds: dict[str, Any] = {"RANDOM": random > 0, "HAS_ALWAYS": always is not None}

    def _tensors(self, marks: Tensor | None) -> tuple[Tensor, ...]:
        return self.scores, self.results[1] if marks is None else marks, *self.results

    def _strides(self, marks: Tensor | None) -> tuple[int, ...]:
        return *self.scores.stride()[:3], 0 if marks is None else marks.stride(0)

    def contest(self, size: int) -> None:
        """Rows short enough for registers."""
        marks = None if self.always is None else self.always.view(torch.uint8)
        contest_kernel[(self.rows,)](
            *self._tensors(marks), *self.wanted, self.coverage or 0.0, *self.extent, *self.room,
            *self._strides(marks),
            COVERAGE=self.coverage is not None, **contest_shape(size), **self.kinds,
        )  # fmt: skip

    def shortlist(self, plan: Plan, settings: SelectSettings) -> None:
        """Long rows whose candidates are few, some at a time; marks those that the sample misled."""
        marks = None if self.always is None else packed(self.always, self.length)
        device, rows, kept = self.scores.device, self.rows, self.kinds["HAS_ALWAYS"]
        step = settings.mark_columns * MARK_WARPS
        blocks = triton.cdiv(self.length, 32 * step)
        width = triton.cdiv(self.length, 32)
        list_bytes, processors = 2 * 4 * plan.size, units(device)
        taken = 0 if marks is None else marks.untyped_storage().nbytes()
        part = chunk(rows, 4 * width + 4, list_bytes, processors * settings.per_unit, processors, taken)
        floors = torch.empty(part.rows, dtype=torch.float32, device=device)
        words = torch.empty(part.rows, width, dtype=torch.int32, device=device)
        scratch = torch.empty(part.programs, 2 * plan.size, dtype=torch.int32, device=device)
        bound, (scores, always, indices, counts) = _signed(plan.bound), self._tensors(marks)
        k, random, seed = self.wanted
        together = triton.cdiv(part.programs, processors)
        registers = register_share(together, settings.contest_warps, FEWEST_REGISTERS)
        for first in range(0, rows, part.rows):
            some = min(part.rows, rows - first)
            estimate_kernel[(some,)](
                scores, always, floors, plan.share, first, *self.extent, self.length, *self._strides(marks),
                HAS_ALWAYS=kept, SAMPLE=SAMPLE, CLUSTER=CLUSTER, num_warps=ESTIMATE_WARPS,
            )  # fmt: skip
            mark_kernel[(some * blocks,)](
                scores, always, floors, words, seed, bound, first, *self.extent, self.length, blocks,
                *self._strides(marks), width, STEP=step, num_warps=MARK_WARPS, **self.kinds,
            )  # fmt: skip
            shortlist_kernel[(min(some, part.programs),)](
                scores, always, floors, words, indices, counts, scratch, k, random, seed, bound,
                first, *self.extent, some, *self.room, *self._strides(marks), width,
                **shortlist_shape(plan.size, settings.contest_warps), **self.kinds, maxnreg=registers,
            )  # fmt: skip

    def search(self, settings: SelectSettings, left_over: bool) -> None:
        """Any row; with `left_over` only those marked."""
        marks = None if self.always is None else self.always.view(torch.uint8)
        select_kernel[(self.rows,)](
            *self._tensors(marks), *self.wanted, self.coverage or 0.0, *self.extent, *self.room,
            *self._strides(marks),
            COVERAGE=self.coverage is not None, BLOCK=settings.block, BITS=settings.bits,
            SUM_BLOCK=SUM_BLOCK, LEFT_OVER=left_over, num_warps=settings.num_warps, **self.kinds,
        )  # fmt: skip


def _signed(x: int) -> int:
    """32 bits as a signed number: the argument's type does not depend on its value then."""
    return (x & 0xFFFFFFFF) - ((x & 0x80000000) << 1)


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
    "scores": "*fp32", "floors": "*fp32", "coverage": "fp32", "share": "fp32", "always": "*u8", "mask": "*u8",
    **dict.fromkeys(("indices", "counts", "scratch", "words"), "*i32"),
    **dict.fromkeys(("stride_b", "stride_h", "stride_g", "stride_always"), "i32:16"),
}  # fmt: skip


def _case(
    name: str,
    kernel: Any,
    types: Any = None,
    num_warps: Any = _DEFAULT.num_warps,
    **constexprs: Any,
) -> tuple[Any, ...]:
    return name, kernel, signature(kernel, _TYPES | (types or {}), constexprs), constexprs, num_warps, 3


_KINDS = {"HAS_ALWAYS": True, "RANDOM": True}
_WALK = {
    "BLOCK": _DEFAULT.block, "BITS": _DEFAULT.bits, "SUM_BLOCK": SUM_BLOCK, "LEFT_OVER": True, **_KINDS,
}  # fmt: skip
_BITS = {"always": "*i32"}
COMPILE_CASES = (
    *(
        _case(
            f"{operation} {size}", contest_kernel, COVERAGE=operation == "coverage_columns",
            **contest_shape(size), **_KINDS,
        )
        for operation in ("topk_columns", "coverage_columns") for size in LISTS
    ),
    _case(
        "topk_columns estimate", estimate_kernel, _BITS, ESTIMATE_WARPS,
        HAS_ALWAYS=True, SAMPLE=SAMPLE, CLUSTER=CLUSTER,
    ),
    _case(
        "topk_columns mark", mark_kernel, _BITS, MARK_WARPS, STEP=_DEFAULT.mark_columns * MARK_WARPS, **_KINDS
    ),
    *(
        _case(
            f"topk_columns list {size}", shortlist_kernel, _BITS,
            **shortlist_shape(size, _DEFAULT.contest_warps), **_KINDS,
        )
        for size in LISTS
    ),
    _case("topk_columns search", select_kernel, COVERAGE=False, **_WALK),
    _case("coverage_columns search", select_kernel, COVERAGE=True, **_WALK),
    _case("columns_from_mask", mask_kernel, BLOCK=_DEFAULT.block),
)  # fmt: skip

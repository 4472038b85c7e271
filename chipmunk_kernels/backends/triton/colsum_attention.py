"""Dense attention that also sums each group's attention mass per column, in two passes.

The first is dense attention. The second computes the logits again, transposed: keys are the rows of its
tiles and a group's queries their columns, so that a column's mass, Σ exp(s − lse_prev), is a sum along the
registers of a thread and three of its neighbours. It needs no running maximum, no values and no atomics:
half of the first pass's products, and less of all else. In one pass the sum runs across lanes and warps, for
every tile of keys, between two products that wait for it; that took an H200 2.1 times cuDNN's dense attention
where the first pass alone takes 1.25.

Weights come from `lse_prev` directly, in float32, in a fixed order: the same bits every time. A mass past
2¹²⁰, of a row whose logits outgrew its previous normaliser by 80, saturates there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_kernels.backends.triton.dense_attention import DenseAttentionSettings, dense_attention
from chipmunk_kernels.backends.triton.flash import key_count
from chipmunk_kernels.backends.triton.launch import (
    LOG2E,
    Launcher,
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
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice

PER_LN2 = tl.constexpr(LOG2E)
LARGEST_MASS = tl.constexpr(2.0**120)
TALLEST_QUERIES = 128  # rows of one tile of queries; a program holds two
MANY_PROGRAMS = 2048  # eight waves of two programs on each of an H200's multiprocessors
FEWEST_KEYS, MOST_KEYS = 1024, 8192  # of a program: less is all start, more may leave a long last wave


@dataclass(frozen=True)
class ColsumAttentionSettings(LaunchSettings):
    """Tile and launch of dense attention with column sums.

    Attributes:
        block_m, block_n, num_warps, num_stages, max_registers, overlap: of the first pass, as in
            `DenseAttentionSettings`.
        mass_keys: keys that the second pass takes in at a time.
        mass_warps: warps of its programs.
        mass_stages: tiles of keys in flight.
        mass_registers: cap on a thread's registers, so that more programs fit a multiprocessor and one's
            products run beside another's exponentials; 0 is no cap.
    """

    block_m: int = choice(128, 64, 128, 256)
    block_n: int = choice(64, 32, 64, 128)
    num_warps: int = choice(8, 4, 8)
    num_stages: int = choice(2, 2, 3, 4)
    max_registers: int = choice(0, 0, 128)
    overlap: bool = choice(True, True, False)
    mass_keys: int = choice(64, 64, 128)
    mass_warps: int = choice(4, 4, 8)
    mass_stages: int = choice(2, 2, 3)
    mass_registers: int = choice(0, 0, 128)

    def dense(self) -> DenseAttentionSettings:
        """Settings of the first pass."""
        return DenseAttentionSettings(
            self.block_m, self.block_n, self.num_warps, self.num_stages, self.max_registers, self.overlap
        )

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        item = getattr(torch, problem.dtype).itemsize
        queries = min(2 * TALLEST_QUERIES, max(16, problem.group_size))
        needed = item * problem.width * (queries + self.mass_stages * self.mass_keys)
        if shared_memory_bytes is not None and needed > shared_memory_bytes:
            return f"masses need {needed} bytes of shared memory, the device has {shared_memory_bytes}"
        if tile_warps(self.mass_warps, self.mass_keys) != self.mass_warps:
            return f"{self.mass_warps} warps leave less than 16 of {self.mass_keys} keys to a warp"
        return attention_misfit(
            problem, problem.rows, self.block_m, self.block_n, self.num_warps,
            self.max_registers, self.num_stages, self.overlap, shared_memory_bytes,
        )  # fmt: skip


@triton.jit
def queries_of(q, lse_prev, q_n, top, end, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Queries `(BLOCK, WIDTH)` from row `top`, zeros from `end`, and lse_prev in base 2: rows past the end
    weigh exp(−∞) = 0."""
    row = top + tl.arange(0, BLOCK)
    inside = row < end
    row = row.to(tl.int64)
    tile = tl.load(q + row[:, None] * q_n + tl.arange(0, WIDTH)[None, :], mask=inside[:, None], other=0.0)
    return tile, tl.load(lse_prev + row, mask=inside, other=float("inf")) * PER_LN2


@triton.jit
def mass_of(keys, q, reference, scale_log2, PRECISION: tl.constexpr):
    """Σ over the queries of exp2(logit − reference), of each of a tile of keys."""
    s = tl.dot(keys, tl.trans(q), input_precision=PRECISION)
    return tl.sum(tl.exp2(s * scale_log2 - reference[None, :]), 1)


@triton.jit(do_not_specialize=["heads", "rows", "keys", "columns", "groups", "group_size", "within", "chunk"])
def colsum_attention_kernel(
    q, k, lse_prev, key_length, mass,
    q_b, q_h, q_n, k_b, k_h,
    heads, rows, keys, columns, groups, group_size, within, chunk, scale_log2,
    WIDTH: tl.constexpr, K_N: tl.constexpr,
    BLOCK_Q: tl.constexpr, REST_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Masses of a `chunk` of columns over BLOCK_Q + REST_Q queries of one group, which begin `within` it.

    Programs that are in flight together share a chunk. `columns` is the width of `mass`, `keys` how many may
    take part. K_N is the stride of rows of k; ADD says that an earlier launch summed the queries before.
    """
    group = tl.program_id(0) % groups
    place = tl.program_id(0) // groups
    chunks = tl.cdiv(columns, chunk)
    pair = (place // chunks).to(tl.int64)
    b, h = pair // heads, pair % heads
    begin = place % chunks * chunk
    stop = tl.minimum(begin + chunk, columns)
    n = key_count(key_length, b, keys)
    top = group * group_size + within
    end = tl.minimum((group + 1) * group_size, rows)
    if top >= end:  # a ragged last group has no rows for its later queries
        return
    q += b * q_b + h * q_h
    lse_prev += pair * rows
    k += b * k_b + h * k_h + tl.arange(0, WIDTH)[None, :]
    mass += (pair * groups + group) * columns
    first, reference = queries_of(q, lse_prev, q_n, top, end, BLOCK_Q, WIDTH)
    if REST_Q > 0:
        second, reference_2 = queries_of(q, lse_prev, q_n, top + BLOCK_Q, end, REST_Q, WIDTH)
    slots = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, tl.minimum(stop, n), BLOCK_N):
        column = start + slots
        tile = tl.load(k + tl.minimum(column, n - 1).to(tl.int64)[:, None] * K_N)
        total = mass_of(tile, first, reference, scale_log2, PRECISION)
        if REST_Q > 0:
            total += mass_of(tile, second, reference_2, scale_log2, PRECISION)
        live = column < tl.minimum(stop, n)
        if ADD:
            total += tl.load(mass + column, mask=live, other=0.0)
        tl.store(mass + column, tl.minimum(total, LARGEST_MASS), mask=live)
    if not ADD:
        for start in tl.range(tl.maximum(begin, n), stop, BLOCK_N):
            tl.store(mass + start + slots, 0.0, mask=start + slots < stop)


_launch = Launcher(colsum_attention_kernel)


def keys_per_program(columns: int, programs: int, block_n: int) -> int:
    """How many columns a program sums where `programs` of them cover the queries: whole tiles."""
    chunks = max(-(-columns // MOST_KEYS), min(-(-columns // FEWEST_KEYS), -(-MANY_PROGRAMS // programs)))
    return max(1, -(-columns // (chunks * block_n))) * block_n


def query_tiles(rows: int) -> tuple[int, int]:
    """The one or two tiles of queries that a program takes of `rows` in a group; the second may be 0."""
    first = tile_rows(TALLEST_QUERIES, rows)
    rest = rows - first
    return first, tile_rows(TALLEST_QUERIES, rest) if rest > 0 else 0


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
    out, lse = dense_attention(q, k, v, key_length, scale, settings.dense())
    batch, heads, rows, width = q.shape
    groups, columns = group_count(rows, group_size), k.shape[2]
    mass = torch.empty((batch, heads, groups, columns), dtype=torch.float32, device=q.device)
    if mass.numel() == 0:
        return out, lse, mass
    keys, lengths = key_limits(key_length, columns)
    lse_prev = lse_prev.contiguous()
    chunk = keys_per_program(columns, batch * heads * groups, settings.mass_keys)
    programs, within = batch * heads * groups * -(-columns // chunk), 0
    with on_device(q):
        while within < min(group_size, rows):
            block_q, rest_q = query_tiles(group_size - within)
            _launch(
                programs,
                (q, k, lse_prev, lengths, mass),
                (
                    *q.stride()[:3], *k.stride()[:2],
                    heads, rows, keys, columns, groups, group_size, within, chunk,
                ),
                (scale * LOG2E,),
                {
                    "WIDTH": width, "K_N": k.stride(2), "BLOCK_Q": block_q, "REST_Q": rest_q,
                    "BLOCK_N": settings.mass_keys, "ADD": within > 0, "PRECISION": precision(q.dtype),
                },
                {
                    "num_warps": tile_warps(settings.mass_warps, settings.mass_keys),
                    "num_stages": settings.mass_stages,
                    "maxnreg": register_cap(settings.mass_registers, q.device),
                },
            )  # fmt: skip
            within += block_q + rest_q
    return out, lse, mass


KERNELS = (
    Kernel("colsum_attention", "triton", colsum_attention, ColsumAttentionSettings, unsupported_attention),
)

_DEFAULT = ColsumAttentionSettings()
_CONSTEXPRS = {
    "WIDTH": 128, "K_N": 128, "BLOCK_Q": 128, "REST_Q": 64, "BLOCK_N": _DEFAULT.mass_keys, "ADD": False,
    "key_length": None, "PRECISION": "tf32",
}  # fmt: skip
_TYPES = {"q": "*bf16", "k": "*bf16", "lse_prev": "*fp32", "mass": "*fp32", "scale_log2": "fp32"}
COMPILE_CASES = (
    (
        "colsum_attention", colsum_attention_kernel, signature(colsum_attention_kernel, _TYPES, _CONSTEXPRS),
        _CONSTEXPRS, _DEFAULT.mass_warps, _DEFAULT.mass_stages,
    ),
)  # fmt: skip

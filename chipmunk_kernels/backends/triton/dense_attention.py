"""Dense attention with its log-sum-exp: one program for BLOCK_M queries, all keys in turn.

Programs run heads outermost, so that those in flight share one head's keys and values in the L2 cache.
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
    Launcher,
    attention_misfit,
    key_limits,
    on_device,
    overlaps,
    precision,
    register_cap,
    signature,
    tile_rows,
    tile_warps,
    unsupported_attention,
)
from chipmunk_kernels.layout import empty_like_queries
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice


@dataclass(frozen=True)
class DenseAttentionSettings(LaunchSettings):
    """Tile and launch of the dense attention kernel.

    Attributes:
        block_m: query rows of a program.
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
    overlap: bool = choice(True, True, False)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        return attention_misfit(
            problem, problem.rows, self.block_m, self.block_n, self.num_warps,
            self.max_registers, self.num_stages, self.overlap, shared_memory_bytes,
        )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "rows", "keys", "tiles"])
def dense_attention_kernel(
    q, k, v, key_length, out, lse,
    q_b, q_h, q_n, k_b, k_h, v_b, v_h, out_b, out_h, out_n,
    heads, rows, keys, tiles, scale_log2,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    K_N: tl.constexpr, V_N: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row tile. `tiles` row tiles make a head; K_N and V_N are the strides of k's and v's rows."""
    pair = tl.program_id(0) // tiles
    b = (pair // heads).to(tl.int64)
    h = (pair % heads).to(tl.int64)
    row = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    row = row.to(tl.int64)
    d = tl.arange(0, WIDTH)

    k += b * k_b + h * k_h + d[None, :]
    v += b * v_b + h * v_h + d[None, :]
    q_tile = tl.load(q + b * q_b + h * q_h + row[:, None] * q_n + d[None, :], mask=inside[:, None], other=0.0)
    m, l, acc = sweep(
        q_tile, k, v, K_N, V_N, key_count(key_length, b, keys), scale_log2,
        BLOCK_M, BLOCK_N, WIDTH, OVERLAP, PRECISION,
    )  # fmt: skip

    out_rows = out + b * out_b + h * out_h + row[:, None] * out_n + d[None, :]
    tl.store(out_rows, (acc * reciprocal(l)[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + pair.to(tl.int64) * rows + row, log_sum_exp(m, l), mask=inside)


_launch = Launcher(dense_attention_kernel)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_length: int | Tensor | None,
    scale: float,
    settings: DenseAttentionSettings,
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale) v over the first `key_length` columns, and its natural-log normaliser.

    Args:
        q: `(B, H, N, D)`, k and v `(B, H, Nk, D)`: any strides with D contiguous, nothing is copied.
        key_length: an int, an integer tensor `(B,)` that the kernel reads itself, or None for all.
        scale: of the logits.

    Returns:
        out `(B, H, N, D)` in the dtype and memory order of q, lse `(B, H, N)` float32; zeros and −∞ where no
        column takes part.
    """
    batch, heads, rows, width = q.shape
    out = empty_like_queries(q)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    if scale < 0:
        q, scale = -q, -scale  # the running maximum is taken before scaling
    keys, lengths = key_limits(key_length, k.shape[2])
    block_m = tile_rows(settings.block_m, rows)
    tiles = -(-rows // block_m)
    num_warps = tile_warps(settings.num_warps, block_m)
    overlap = overlaps(
        settings.overlap, block_m, settings.block_n, width, num_warps, settings.max_registers, q.device
    )
    with on_device(q):
        _launch(
            batch * heads * tiles,
            (q, k, v, lengths, out, lse),
            (
                *q.stride()[:3], *k.stride()[:2], *v.stride()[:2], *out.stride()[:3],
                heads, rows, keys, tiles,
            ),
            (scale * LOG2E,),
            {
                "WIDTH": width, "BLOCK_M": block_m, "BLOCK_N": settings.block_n,
                "K_N": k.stride(2), "V_N": v.stride(2), "OVERLAP": overlap,
                "PRECISION": precision(q.dtype),
            },
            {
                "num_warps": num_warps, "num_stages": settings.num_stages,
                "maxnreg": register_cap(settings.max_registers, q.device),
            },
        )  # fmt: skip
    return out, lse


KERNELS = (
    Kernel("dense_attention", "triton", dense_attention, DenseAttentionSettings, unsupported_attention),
)

_DEFAULT = DenseAttentionSettings()
# In the natural order, as sm_80 runs it whatever the settings say.
_CONSTEXPRS = {
    "WIDTH": 128, "BLOCK_M": _DEFAULT.block_m, "BLOCK_N": _DEFAULT.block_n, "K_N": 128, "V_N": 128,
    "OVERLAP": False, "key_length": None, "PRECISION": "tf32",
}  # fmt: skip
_TYPES = {
    "q": "*bf16", "k": "*bf16", "v": "*bf16", "out": "*bf16", "lse": "*fp32",
    "scale_log2": "fp32",
}  # fmt: skip
COMPILE_CASES = (
    (
        "dense_attention", dense_attention_kernel, signature(dense_attention_kernel, _TYPES, _CONSTEXPRS),
        _CONSTEXPRS, _DEFAULT.num_warps, _DEFAULT.num_stages,
    ),
)  # fmt: skip

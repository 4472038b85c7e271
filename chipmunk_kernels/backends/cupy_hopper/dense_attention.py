"""Dense attention with its log-sum-exp: colsum_attention.cu without the column sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy_hopper.colsum_attention import (
    WARPGROUP_ROWS,
    Shape,
    attend,
    source,
    unsupported,
)
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice


@dataclass(frozen=True)
class DenseAttentionSettings(LaunchSettings):
    """Tiles of the dense attention kernel.

    Attributes:
        warpgroups: of 64 query rows each, in a block.
        block_n: columns taken in at a time.
        stages: tiles of keys and values in flight.
        overlap: whether a warpgroup starts the next tile's logits before it waits for this tile's output.
    """

    warpgroups: int = choice(2, 2, 3)
    block_n: int = choice(128, 64, 96, 128)
    stages: int = choice(2, 2, 4)
    overlap: bool = choice(True, True, False)

    def shape(self, group_size: int = 0) -> Shape:
        """Whatever the size of a group: nothing is summed over one."""
        return Shape(False, self.warpgroups, self.warpgroups, self.block_n, self.stages, self.overlap)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        return self.shape().misfit(problem.width)


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
        q: `(B, H, N, D)`, k and v `(B, H, Nk, D)`: any strides with D contiguous; copied only where
            rows are not 16-byte aligned.
        key_length: an int, an integer tensor `(B,)` that the kernel reads itself, or None for all.
        scale: of the logits.

    Returns:
        out `(B, H, N, D)` in the dtype and memory order of q, lse `(B, H, N)` float32; zeros and −∞ where no
        column takes part.
    """
    rows_of_a_block = settings.warpgroups * WARPGROUP_ROWS
    out, lse, _ = attend(q, k, v, None, rows_of_a_block, key_length, scale, settings)
    return out, lse


KERNELS = (Kernel("dense_attention", "cupy_hopper", dense_attention, DenseAttentionSettings, unsupported),)

_DEFAULT = DenseAttentionSettings()
SOURCES = (source(torch.bfloat16, 128, _DEFAULT.shape()), source(torch.float16, 64, _DEFAULT.shape()))

"""What the selection tests share: scores that hide nothing, and the always-kept columns as a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from chipmunk_kernels.backends.triton.select import SelectSettings
from reference.select import always_kept

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = SelectSettings(block=128, num_warps=4)
"""Several blocks even in a short row."""


def awkward_scores(batch: int, heads: int, groups: int, columns: int, seed: int = 0) -> Tensor:
    """Scores with long runs of ties, both zeros, infinities, subnormals, negatives and NaN."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, heads, groups, columns, generator=generator)
    specials = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, -1e-42, 0.5])
    pick = torch.randint(0, len(specials), scores.shape, generator=generator)
    special = torch.rand(scores.shape, generator=generator) < 0.4
    return torch.where(special, specials[pick], scores).to(DEVICE)


def always_mask(
    groups: int, columns: int, group_size: int, keep: Sequence[tuple[int, int]], window: int, length: int
) -> Tensor | None:
    """Bool `(G, N)` of the always-kept columns, None if no argument asks for any."""
    if not keep and not window:
        return None
    mask = torch.zeros(groups, columns, dtype=torch.bool)
    for g in range(groups):
        mask[g, sorted(always_kept(g, columns, group_size, keep, window, length))] = True
    return mask.to(DEVICE)


def assert_same_columns(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], columns: int) -> None:
    """Same counts, same kept indices in the same order; padding slots hold valid indices."""
    indices, counts = (x.cpu() for x in actual)
    wanted_indices, wanted_counts = expected
    assert indices.dtype == counts.dtype == torch.int32
    torch.testing.assert_close(counts, wanted_counts, rtol=0, atol=0)
    kept = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
    wanted = torch.zeros_like(indices)
    shared = min(indices.shape[-1], wanted_indices.shape[-1])
    wanted[..., :shared] = wanted_indices[..., :shared]
    torch.testing.assert_close(indices.where(kept, 0), wanted.where(kept, 0), rtol=0, atol=0)
    assert indices.numel() == 0 or 0 <= int(indices.min()) <= int(indices.max()) < columns

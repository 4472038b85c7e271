"""Mean over each group of rows."""

from __future__ import annotations

import torch
from torch import Tensor


def group_mean(x: Tensor, group_size: int) -> Tensor:
    """x `(B, M, K)` → `(B, G, K)`; the ragged last group is averaged over the rows it has."""
    return torch.stack([rows.mean(1) for rows in x.split(group_size, dim=1)], dim=1)

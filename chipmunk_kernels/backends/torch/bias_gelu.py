"""Bias and GELU of a neuron-major product, in place: two passes of PyTorch's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chipmunk_kernels.settings import LaunchSettings


@dataclass(frozen=True)
class BiasGeluSettings(LaunchSettings):
    """Nothing to choose."""


def bias_gelu(mid: Tensor, bias: Tensor | None, settings: BiasGeluSettings) -> None:
    """See `ops.mlp.bias_gelu`."""
    if bias is not None:
        mid.add_(bias.unsqueeze(1))
    torch.ops.aten.gelu_(mid, approximate="tanh")

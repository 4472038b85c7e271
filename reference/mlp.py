"""The column-sparse MLP delta, computed densely and masked, and what follows a neuron-major product.

Source: arXiv 2506.03275, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.gather import kept_mask


def sparse_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2_by_neuron: Tensor,
    indices: Tensor,
    counts: Tensor,
    group_size: int,
    activation_cache: Tensor,
    output_cache: Tensor,
    activation: str = "gelu_tanh",
) -> tuple[Tensor, Tensor]:
    """The new activation cache `(B, F, M)` and output cache `(B, M, Kout)`.

    Args:
        x: `(B, M, K)`.
        w1: `(F, K)`, b1 `(F,)` or None; w2_by_neuron `(F, Kout)`.
        indices: `(B, 1, G, C)` kept neurons of each token group, the first `counts` `(B, 1, G)` of them.
        activation_cache: the activations of the last evaluation; kept entries are assigned the new ones.
        output_cache: the output of the last evaluation; gains (new − cached) kept activations times w2.
        activation: only "gelu_tanh".
    """
    if activation != "gelu_tanh":
        raise ValueError(f"activation: expected 'gelu_tanh', got {activation!r}")
    fresh = F.gelu(F.linear(x, w1, b1), approximate="tanh")
    kept = kept_mask(indices, counts, w1.shape[0])[:, 0].repeat_interleave(group_size, dim=1)[:, : x.shape[1]]
    cached = activation_cache.transpose(1, 2)
    delta = torch.where(kept, fresh - cached, 0.0)
    new_cache = torch.where(kept, fresh, cached).transpose(1, 2).contiguous()
    return new_cache, output_cache + (delta @ w2_by_neuron).to(output_cache.dtype)


def bias_gelu(mid: Tensor, bias: Tensor | None) -> Tensor:
    """gelu_tanh(mid + bias): mid `(B, F, M)`, one value of bias `(F,)` for each neuron."""
    return F.gelu(mid if bias is None else mid + bias[:, None], approximate="tanh")

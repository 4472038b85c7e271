"""The method's equations written out step by step with masks, in whatever dtype the inputs have.

Written from the paper (arXiv 2506.03275), apart from the engine: no caches of differences where a direct
formula exists, no operation of the package.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Qkv = tuple[Tensor, Tensor, Tensor]


def rows_of(groups: Tensor, group_size: int, rows: int) -> Tensor:
    """`(B, H, G, N)` per group → `(B, H, rows, N)` per row."""
    return groups.repeat_interleave(group_size, dim=2)[:, :, :rows]


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, taking_part: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the columns taking part, and its log normaliser; rows with none give zeros and −∞."""
    logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~taking_part, float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0) @ v, logits.logsumexp(-1)


def column_mass(q: Tensor, k: Tensor, lse_prev: Tensor, group_size: int) -> Tensor:
    """mass[g, j] = Σ over the group's queries i of exp(s_ij − lse_prev_i)."""
    share = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 - lse_prev.unsqueeze(-1)).exp()
    return torch.stack([part.sum(2) for part in share.split(group_size, dim=2)], dim=2)


def attention(
    steps: Sequence[Qkv],
    masks: dict[int, Tensor],
    group_size: int,
    merge: str,
    *,
    by_difference: bool = False,
) -> list[Tensor]:
    """Outputs of all steps.

    Args:
        steps: q, k, v of each.
        masks: the selection `(B, H, G, N)` of each full step before a sparse one. A later step without one
        is sparse.
        group_size: rows per group.
        merge: "delta" or "lse".
        by_difference: for the `lse` form, take the unselected part as whole minus selected, which a
            same-dtype peer of the engine must do too: its error is that of the difference of two
            normalisers.
    """
    outputs: list[Tensor] = []
    chosen = rest = rest_lse = full_lse = None
    full = set(masks) | set(range(min(masks)))
    for number, (q, k, v) in enumerate(steps):
        if number in full:
            everything = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
            out, full_lse = masked_softmax(q, k, v, everything)
            if number in masks:
                chosen = rows_of(masks[number], group_size, q.shape[2])
                selected, selected_lse = masked_softmax(q, k, v, chosen)
                rest, rest_lse = masked_softmax(q, k, v, ~chosen)
                if merge == "delta":
                    rest = out - selected
                elif by_difference:
                    share = (selected_lse - full_lse).exp()
                    rest_lse = (1 - share).log() + full_lse
                    rest = (out - share.unsqueeze(-1) * selected) / (1 - share).unsqueeze(-1)
        else:
            assert chosen is not None and rest is not None and rest_lse is not None and full_lse is not None
            out, lse = masked_softmax(q, k, v, chosen)
            if merge == "delta":
                out = rest + out
            else:
                weight = (rest_lse - torch.logaddexp(lse, rest_lse)).exp()
                weight = torch.minimum(weight, 4.0 * (rest_lse - full_lse).exp()).unsqueeze(-1)
                out = (1 - weight) * out + weight * rest
        outputs.append(out)
    return outputs


def means(x: Tensor, group_size: int) -> Tensor:
    """`(B, M, K)` → `(B, G, K)`."""
    return torch.stack([part.mean(1) for part in x.split(group_size, dim=1)], dim=1)


class Mlp:
    """One MLP with its caches, one method per kind of step."""

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group_size: int) -> None:
        self.w1, self.b1, self.w2, self.b2, self.group_size = w1, b1, w2, b2, group_size

    def full(self, x: Tensor) -> Tensor:
        """Dense; remembers activations, output and group means."""
        mid = F.linear(x, self.w1, self.b1)
        self.activations = F.gelu(mid, approximate="tanh")
        self.means = means(mid, self.group_size)
        self.out = F.linear(self.activations, self.w2, self.b2)
        return self.out

    def change(self, x: Tensor) -> Tensor:
        """How much each neuron's group mean changed, `(B, G, F)`."""
        return (F.linear(means(x, self.group_size), self.w1, self.b1) - self.means).abs()

    def sparse(self, x: Tensor, kept: Tensor) -> Tensor:
        """Recompute the neurons `kept` `(B, G, F)`."""
        fresh = F.gelu(F.linear(x, self.w1, self.b1), approximate="tanh")
        mask = kept.repeat_interleave(self.group_size, dim=1)[:, : x.shape[1]]
        delta = torch.where(mask, fresh - self.activations, 0.0)
        self.activations = torch.where(mask, fresh, self.activations)
        self.means = torch.where(kept, F.linear(means(x, self.group_size), self.w1, self.b1), self.means)
        self.out = self.out + delta @ self.w2.t()
        return self.out

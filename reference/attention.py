"""Attention in full matrices: q `(B, H, Nq, D)`, k and v `(B, H, Nk, D)`. Source: arXiv 2506.03275."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.gather import kept_mask


def _logits(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    return q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)


def _within(k: Tensor, key_length: int | Tensor | None) -> Tensor:
    """Bool `(B, 1, 1, Nk)`: the keys that take part."""
    batch, keys = k.shape[0], k.shape[2]
    lengths = torch.as_tensor(keys if key_length is None else key_length, device=k.device).expand(batch)
    return (torch.arange(keys, device=k.device) < lengths.unsqueeze(1)).view(batch, 1, 1, keys)


def _softmax_times(logits: Tensor, taking_part: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the columns taking part, times v, and its log normaliser. A row with none: zeros, -inf."""
    logits = logits.masked_fill(~taking_part, float("-inf"))
    weights = logits.softmax(-1).nan_to_num(0.0)
    return weights @ v, logits.logsumexp(-1)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, key_length: int | Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale) v over the first `key_length` keys → out `(B, H, Nq, D)`, lse `(B, H, Nq)`."""
    logits = _logits(q, k, scale)
    return _softmax_times(logits, _within(k, key_length).expand_as(logits), v)


def colsum_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_prev: Tensor,
    group_size: int,
    key_length: int | Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention, and the mass `(B, H, G, Nk)` of each column.

    The mass of column j in group g is Σ over the group's queries i of exp(s_ij − lse_prev_i).
    """
    logits, within = _logits(q, k, scale), _within(k, key_length)
    out, lse = _softmax_times(logits, within.expand_as(logits), v)
    share = torch.where(within, (logits - lse_prev.unsqueeze(-1).to(logits.dtype)).exp(), 0.0)
    mass = torch.stack([rows.sum(2) for rows in share.split(group_size, dim=2)], dim=2)
    return out, lse, mass


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    group_size: int,
    base: Tensor | None = None,
    sign: int = 1,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """base + sign · softmax over the kept columns of the query's group, times v; and that normaliser.

    An empty group gives the base (or zeros) and lse = -inf.
    """
    kept = kept_mask(indices, counts, k.shape[2]).repeat_interleave(group_size, dim=2)[:, :, : q.shape[2]]
    out, lse = _softmax_times(_logits(q, k, scale), kept, v)
    return (sign * out if base is None else base + sign * out), lse

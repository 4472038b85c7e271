"""Attention by library matrix products over blocks that stay in cache, with a float32 softmax between them.

On a CPU a 16-bit product can only be stored in 16 bits, which would round logits of ±200 by up to 0.5. So
the rounding error is computed too, as a second product that subtracts the rounded logits in its float32
accumulator, and added back: logits to about 16 bits for one product more. Measured on 2 cores, bfloat16, N
4352, D 128, 718 kept columns: 11 times `F.scaled_dot_product_attention`, against 16 times with rounded
logits and 4.6 times with the fused kernel per group. A CPU without 16-bit products takes the fused kernel for
dense and sparse attention, and computes column sums in float32 (`products.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from chipmunk_kernels.backends.torch.fused import fused_attention, fused_on_host
from chipmunk_kernels.backends.torch.products import fused_dtype, product_dtype
from chipmunk_kernels.columns import ColumnSet, group_count
from chipmunk_kernels.layout import empty_like_queries
from chipmunk_kernels.settings import LaunchSettings, choice

MOST_SCRATCH_BYTES = 256 << 20
"""No block takes more, whatever the settings: rows, or columns to be merged after, are split until it
fits."""

LARGEST_EXPONENT = 88.0
"""exp of more than this is not a finite float32."""


@dataclass(frozen=True)
class DenseSettings(LaunchSettings):
    """`scratch_mib` bounds the scratch of one block of queries; `fused` takes PyTorch's fused kernel instead,
    which float32 products get in any case: 160 to 226 ms, not 253 to 274, on two AVX2 cores, 2 heads, N 4160.
    """

    scratch_mib: int = choice(8, 1, 2, 4, 8, 16, 32)
    fused: bool = choice(False, False, True)


@dataclass(frozen=True)
class ColsumSettings(LaunchSettings):
    """`scratch_mib` bounds the scratch memory of one block of queries."""

    scratch_mib: int = choice(8, 1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class SparseSettings(LaunchSettings):
    """`scratch_mib` bounds the scratch of one block of groups; `fused` takes PyTorch's fused CPU kernel over
    the gathered columns, as a CPU without 16-bit products does in any case. On two AVX2 cores, N 4352, 8
    heads, bfloat16, groups of 192: 71 instead of 105 ms at 304 columns, 156 instead of 180 at 718.
    """

    scratch_mib: int = choice(4, 1, 2, 4, 8, 16, 32)
    fused: bool = choice(False, False, True)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, key_length: int | Tensor | None, scale: float, settings: DenseSettings
) -> tuple[Tensor, Tensor]:
    """See `ops.attention.dense_attention`."""
    in_blocks = q.device.type == "cpu" and product_dtype(q.dtype, "cpu") != torch.float32
    if (settings.fused or not in_blocks) and not isinstance(key_length, Tensor) and key_length != 0:
        wide = fused_dtype(q.dtype) if q.device.type == "cpu" else q.dtype
        keys, values = (each[:, :, :key_length].to(wide) for each in (k, v))
        found = fused_attention(q.to(wide), keys, values, scale)
        if found is not None:
            return found[0].to(q.dtype), found[1]
    out, lse = _outputs(q)
    for b, h, rows, attended in _dense_blocks(q, k, v, key_length, scale, 1, settings.scratch_mib):
        out[b, h, rows], lse[b, h, rows] = attended[:2]
    return out, lse


def colsum_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_prev: Tensor,
    group_size: int,
    key_length: int | Tensor | None,
    scale: float,
    settings: ColsumSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.attention.colsum_attention`.

    exp(s_ij − lse_prev_i) = p_ij · exp(lse_i − lse_prev_i): the column sums are one matrix-vector product
    with the weights that the output needs anyway, in float32 and in an order that depends on the shapes
    alone.
    """
    out, lse = _outputs(q)
    mass = lse.new_zeros(*q.shape[:2], group_count(q.shape[2], group_size), k.shape[2])
    for b, h, rows, attended in _dense_blocks(q, k, v, key_length, scale, group_size, settings.scratch_mib):
        out[b, h, rows], lse[b, h, rows], weights = attended
        grown = (lse[b, h, rows] - lse_prev[b, h, rows]).clamp_(max=LARGEST_EXPONENT).nan_to_num_(nan=0.0)
        for start in range(rows.start, rows.stop, group_size):
            own = slice(start - rows.start, min(start + group_size, rows.stop) - rows.start)
            share = mass[b, h, start // group_size, : weights.shape[1]]
            share += grown[own].exp() @ weights[own]
    return out, lse, mass


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: ColumnSet,
    base: Tensor | None,
    sign: int,
    scale: float,
    settings: SparseSettings,
) -> tuple[Tensor, Tensor]:
    """See `ops.attention.sparse_attention`."""
    out, lse = _outputs(q)
    wide = product_dtype(q.dtype, q.device.type)
    fused = q.device.type == "cpu" and (settings.fused or wide == torch.float32)
    if fused:
        wide = fused_dtype(q.dtype)
    size, rows = columns.group_size, q.shape[2]
    whole = rows // size
    # The whole groups of a head are one (G, group_size, D) view; a ragged last group is a view of its own.
    parts = [(slice(0, whole), slice(0, whole * size), size)] if whole else []
    if rows % size:
        parts.append((slice(whole, whole + 1), slice(whole * size, rows), rows % size))
    for b in range(columns.batch):
        for h in range(columns.heads):
            head_k, head_v = k[b, h].to(wide), v[b, h].to(wide)
            for groups, own, length in parts:
                _sparse_head(
                    q[b, h, own].unflatten(0, (-1, length)).to(wide),
                    head_k,
                    head_v,
                    columns.indices[b, h, groups],
                    columns.counts[b, h, groups],
                    None if base is None else base[b, h, own].unflatten(0, (-1, length)).to(wide),
                    sign,
                    scale,
                    out[b, h, own].unflatten(0, (-1, length)),
                    lse[b, h, own].unflatten(0, (-1, length)),
                    settings.scratch_mib << 20,
                    fused,
                )
    return out, lse


def _sparse_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    base: Tensor | None,
    sign: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
    scratch_bytes: int,
    fused: bool,
) -> None:
    """Groups of one head: q, base, out `(G, R, D)`, lse `(G, R)`, k and v `(N, D)`, indices `(G, C)`,
    counts `(G,)`."""
    per_column = 2 * q.shape[2] * q.element_size()
    if not fused:
        per_column += _bytes_per_logit(q.dtype) * q.shape[1]
    at_once = max(1024, MOST_SCRATCH_BYTES // per_column)
    for groups, width, ragged in _similar_groups(counts, indices.shape[1], per_column, scratch_bytes):
        kept = None
        if ragged:
            kept = torch.arange(width, device=q.device) < counts[groups].unsqueeze(1)
        below = None if base is None else base[groups]
        if width == 0:
            out[groups] = 0 if below is None else below.to(out.dtype)
            lse[groups] = float("-inf")
            continue
        chosen = q[groups], k, v, indices[groups, :width], kept, scale, below, sign, fused
        found = _attend_chosen(*chosen) if width <= at_once else _attend_in_parts(*chosen, at_once)
        out[groups], lse[groups] = found[0].to(out.dtype), found[1]


def _similar_groups(
    counts: Tensor, capacity: int, bytes_per_column: int, scratch_bytes: int
) -> Iterator[tuple[slice | Tensor, int, bool]]:
    """Blocks of groups that fit the scratch: which groups, columns to attend, and whether some need a mask.

    Where counts can be read without a sync, groups of like count go together, the fullest first, so that
    ragged counts cost about what their sum does. Elsewhere every group is as wide as the capacity, and
    masked.
    """
    readable = counts.device.type == "cpu"
    widths = sorted(counts.tolist(), reverse=True) if readable else [capacity] * len(counts)
    uniform = widths[0] == widths[-1]
    order = None if uniform else counts.argsort(descending=True, stable=True)
    start = 0
    while start < len(widths):
        width = widths[start]
        stop = min(len(widths), start + max(1, scratch_bytes // max(1, width * bytes_per_column)))
        if width:
            # An empty group has no softmax: it waits for the block of empty groups at the end.
            stop = next((i for i in range(start, stop) if widths[i] == 0), stop)
        # Slices of groups are views; a list of groups is a copy.
        groups = slice(start, stop) if order is None else order[start:stop]
        yield groups, width, not readable or widths[stop - 1] != width
        start = stop


def _attend_chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    kept: Tensor | None,
    scale: float,
    base: Tensor | None,
    sign: int,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """`_attend` over the rows `indices` `(n, C)` of k and v `(N, D)`, `kept` `(n, C)` of them; `fused` rounds
    the output to q's type before it is added to the base."""
    flat, shape = indices.reshape(-1), (*indices.shape, k.shape[1])
    mask = None if kept is None else kept.unsqueeze(1)
    chosen_k, chosen_v = k.index_select(0, flat).view(shape), v.index_select(0, flat).view(shape)
    if not fused:
        return _attend(q, chosen_k, chosen_v, scale, mask, base, sign)[:2]
    out, lse = fused_on_host(q, chosen_k, chosen_v, scale, mask)
    if base is not None:
        out = torch.add(base, out, alpha=sign)
    elif sign != 1:
        out = -out
    return out, lse


def _attend_in_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    kept: Tensor | None,
    scale: float,
    base: Tensor | None,
    sign: int,
    fused: bool,
    at_once: int,
) -> tuple[Tensor, Tensor]:
    """`_attend_chosen`, a part of the columns at a time, merged by their normalisers; out in float32."""
    masks = [None] * len(indices.split(at_once, 1)) if kept is None else list(kept.split(at_once, 1))
    parts = [
        _attend_chosen(q, k, v, part, mask, scale, None, 1, fused)
        for part, mask in zip(indices.split(at_once, 1), masks, strict=True)
    ]
    lse = torch.stack([part_lse for _, part_lse in parts]).logsumexp(0)
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for part_out, part_lse in parts:
        out += part_out * (part_lse - lse).exp().nan_to_num_(nan=0.0).unsqueeze(-1)
    out = sign * out if base is None else base + sign * out
    return out, lse


def _dense_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_length: int | Tensor | None,
    scale: float,
    group_size: int,
    scratch_mib: int,
) -> Iterator[tuple[int, int, slice, tuple[Tensor, Tensor, Tensor]]]:
    """Blocks of queries: batch, head, rows, and what `_attend` gives for them.

    A block is whole groups, or lies within one.
    """
    wide = product_dtype(q.dtype, q.device.type)
    for b in range(q.shape[0]):
        length, kept = k.shape[2], None
        if isinstance(key_length, Tensor) and q.device.type != "cpu":
            kept = (torch.arange(length, device=q.device) < key_length[b]).view(1, 1, -1)
        elif key_length is not None:
            length = int(key_length[b] if isinstance(key_length, Tensor) else key_length)
        for h in range(q.shape[1]):
            k_head, v_head = (each[b, h, :length].to(wide).contiguous() for each in (k, v))
            for rows in _row_blocks(
                q.shape[2], length, group_size, _bytes_per_logit(wide), scratch_mib << 20
            ):
                found = _attend(q[b, h, rows][None].to(wide), k_head[None], v_head[None], scale, kept)
                yield b, h, rows, (found[0][0], found[1][0], found[2][0])


def _bytes_per_logit(wide: torch.dtype) -> int:
    """Scratch bytes per logit at the widest moment: float32 logits, which become the weights,
    and a 16-bit product or weight beside them."""
    return 4 if wide == torch.float32 else 8


def _row_blocks(
    rows: int, keys: int, group_size: int, bytes_per_logit: int, scratch_bytes: int
) -> Iterator[slice]:
    """Slices of `rows` rows whose logits against `keys` keys fit the scratch."""
    per_row = bytes_per_logit * max(1, keys)
    # Products of a few rows waste the matrix units, so long sequences get at least 64 while that is
    # affordable.
    step = max(scratch_bytes // per_row, min(64, MOST_SCRATCH_BYTES // per_row), 1)
    if step >= group_size:
        step -= step % group_size
        yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))
        return
    for first in range(0, rows, group_size):
        last = min(first + group_size, rows)
        yield from (slice(start, min(start + step, last)) for start in range(first, last, step))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    kept: Tensor | None = None,
    base: Tensor | None = None,
    sign: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention of n blocks: q `(n, R, D)`, k and v `(n, C, D)`, kept `(n, 1, C)` or None for all.

    Returns base + sign · output `(n, R, D)` rounded once, lse `(n, R)` and the weights `(n, R, C)`, both
    float32.
    """
    if k.shape[1] == 0:
        out = torch.zeros_like(q) if base is None else base
        lse = torch.full(q.shape[:2], float("-inf"), device=q.device)
        return out, lse, lse.new_zeros(*q.shape[:2], 0)
    logits = _logits(q, k.transpose(1, 2), scale)
    if kept is not None:
        logits.masked_fill_(~kept, float("-inf"))
    # exp(max − lse) is the largest weight: the normaliser without another pass of exponentials.
    largest = logits.amax(-1)
    weights = torch.softmax(logits, -1, out=logits)
    lse = largest.sub_(weights.amax(-1).log_())
    if kept is not None:
        weights.masked_fill_(~kept, 0.0)
        lse.masked_fill_(~kept.any(-1), float("-inf"))
    below = q.new_empty(1, 1, 1) if base is None else base
    out = torch.baddbmm(below, weights.to(q.dtype), v, beta=0 if base is None else 1, alpha=sign)
    return out, lse, weights


def _logits(q: Tensor, kt: Tensor, scale: float) -> Tensor:
    """q kᵀ · scale in float32, of 16-bit inputs the rounded product plus its rounding error."""
    rounded = torch.baddbmm(q.new_empty(1, 1, 1), q, kt, beta=0, alpha=scale)
    if q.dtype == torch.float32:
        return rounded
    logits = rounded.float()
    return logits.add_(rounded.baddbmm_(q, kt, beta=-1, alpha=scale))


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return empty_like_queries(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)

"""Attention operators: dense, dense with column sums, and over selected columns.

Attention tensors are `(B, H, N, D)` with any strides as long as D is contiguous; outputs lie in memory as
q does. Source: arXiv 2506.03275, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chipmunk_kernels import checks, dispatch, layout
from chipmunk_kernels.columns import ColumnSet, group_count
from chipmunk_kernels.ops.operator import operator
from chipmunk_kernels.settings import LaunchSettings


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_length: int | Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
    settings: LaunchSettings | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale) v over all keys, and its normaliser.

    Args:
        q: `(B, H, Nq, D)` in float16, bfloat16 or float32.
        k, v: `(B, H, Nk, D)` in the same dtype.
        key_length: only the first `key_length` keys take part; an int, or int32 `(B,)` on the same device.
        scale: of the logits; 1/√D by default.
        backend: run this one and no other; by default dispatch chooses.
        settings: launch settings of the backend's kernel.

    Returns:
        out `(B, H, Nq, D)` like q, and lse float32 `(B, H, Nq)`: the natural-log log-sum-exp of the
        logits. With no key taking part: zeros and -inf.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or layout.
        RuntimeError: the explicit backend cannot run here.
    """
    checks.attention(q, k, v)
    length, lengths = _key_length(key_length, k)
    chosen = dispatch.encode("dense_attention", q.device, backend, settings)
    return _dense_attention(q, k, v, length, lengths, _scale(scale, q), *chosen)


def colsum_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_prev: Tensor,
    group_size: int,
    *,
    key_length: int | Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
    settings: LaunchSettings | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention that also weighs each column for each group of queries, in one pass.

    Args:
        q, k, v, key_length, scale, backend, settings: as in `dense_attention`.
        lse_prev: float32 `(B, H, Nq)`, the normaliser that weights are taken against: the last full
            step's, which is known before this pass while its own is not.
        group_size: consecutive queries that will share a selection.

    Returns:
        out and lse as `dense_attention` gives them, and column_mass float32 `(B, H, G, Nk)`:
        mass[g, j] = Σ over the queries i of group g of exp(s_ij − lse_prev_i), 0 for keys past `key_length`.

    Raises:
        ValueError, RuntimeError: as in `dense_attention`.
    """
    checks.attention(q, k, v)
    checks.like("lse_prev", lse_prev, q.shape[:3], (torch.float32,), q.device)
    checks.positive("group_size", group_size)
    length, lengths = _key_length(key_length, k)
    chosen = dispatch.encode("colsum_attention", q.device, backend, settings)
    return _colsum_attention(q, k, v, lse_prev, group_size, length, lengths, _scale(scale, q), *chosen)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: ColumnSet,
    *,
    base: Tensor | None = None,
    sign: int = 1,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    settings: LaunchSettings | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """base + sign · softmax over the columns that each query's group keeps, times v.

    Args:
        q, k, v, scale, backend, settings: as in `dense_attention`.
        columns: the keys that each group of queries keeps.
        base: `(B, H, Nq, D)` in q's dtype, any strides with D contiguous; zeros by default.
        sign: +1 or -1.
        return_lse: give the normaliser over the kept columns too.

    Returns:
        out `(B, H, Nq, D)`, or (out, lse) with lse float32 `(B, H, Nq)`. The queries of an empty group get
        the base (or zeros) and -inf.

    Raises:
        ValueError, RuntimeError: as in `dense_attention`.
    """
    checks.attention(q, k, v)
    checks.column_set(columns, q.shape[0], q.shape[1], q.shape[2], q.device)
    if base is not None:
        checks.like("base", base, q.shape, (q.dtype,), q.device)
        checks.contiguous_last("base", base)
    if sign not in (1, -1):
        raise ValueError(f"sign: expected 1 or -1, got {sign}")
    chosen = dispatch.encode("sparse_attention", q.device, backend, settings)
    out, lse = _sparse_attention(
        q, k, v, columns.indices, columns.counts, columns.group_size, base, sign, _scale(scale, q), *chosen
    )
    return (out, lse) if return_lse else out


@operator("dense_attention")
def _dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_length: int,
    key_lengths: Tensor | None,
    scale: float,
    backend: str,
    settings: str,
) -> tuple[Tensor, Tensor]:
    _check_values(q, k, v)
    kernel, launch = _resolve("dense_attention", q, k, backend, settings)
    out, lse = kernel.run(q, k, v, _taking_part(key_length, key_lengths, k), scale, launch)
    return layout.laid_out_like_queries(out, q), lse


@_dense_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_length: int,
    key_lengths: Tensor | None,
    scale: float,
    backend: str,
    settings: str,
) -> tuple[Tensor, Tensor]:
    return layout.empty_like_queries(q), _empty_lse(q)


@operator("colsum_attention")
def _colsum_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_prev: Tensor,
    group_size: int,
    key_length: int,
    key_lengths: Tensor | None,
    scale: float,
    backend: str,
    settings: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_values(q, k, v, lse_prev)
    kernel, launch = _resolve("colsum_attention", q, k, backend, settings, group_size)
    taking_part = _taking_part(key_length, key_lengths, k)
    out, lse, mass = kernel.run(q, k, v, lse_prev.contiguous(), group_size, taking_part, scale, launch)
    return layout.laid_out_like_queries(out, q), lse, mass


@_colsum_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_prev: Tensor,
    group_size: int,
    key_length: int,
    key_lengths: Tensor | None,
    scale: float,
    backend: str,
    settings: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, _ = q.shape
    mass = q.new_empty(batch, heads, group_count(rows, group_size), k.shape[2], dtype=torch.float32)
    return layout.empty_like_queries(q), _empty_lse(q), mass


@operator("sparse_attention")
def _sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    group_size: int,
    base: Tensor | None,
    sign: int,
    scale: float,
    backend: str,
    settings: str,
) -> tuple[Tensor, Tensor]:
    _check_values(q, k, v)
    checks.column_values(indices, counts, group_size, q.shape[2], k.shape[2])
    kernel, launch = _resolve("sparse_attention", q, k, backend, settings, group_size, indices.shape[3])
    columns = ColumnSet(indices.contiguous(), counts.contiguous(), group_size)
    out, lse = kernel.run(q, k, v, columns, base, sign, scale, launch)
    return layout.laid_out_like_queries(out, q), lse


@_sparse_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    group_size: int,
    base: Tensor | None,
    sign: int,
    scale: float,
    backend: str,
    settings: str,
) -> tuple[Tensor, Tensor]:
    return layout.empty_like_queries(q), _empty_lse(q)


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[3] ** -0.5 if scale is None else float(scale)


def _key_length(key_length: int | Tensor | None, k: Tensor) -> tuple[int, Tensor | None]:
    """The key length as an int and as a tensor, of which one counts."""
    keys = k.shape[2]
    if key_length is None:
        return keys, None
    if isinstance(key_length, Tensor):
        checks.like("key_length", key_length, (k.shape[0],), (torch.int32,), k.device)
        return keys, key_length
    if not 0 <= key_length <= keys:
        raise ValueError(f"key_length: expected 0 to {keys}, the number of keys; got {key_length}")
    return int(key_length), None


def _taking_part(key_length: int, key_lengths: Tensor | None, k: Tensor) -> int | Tensor | None:
    """The key length as kernels take it: None for all keys."""
    if key_lengths is not None:
        return key_lengths
    return None if key_length == k.shape[2] else key_length


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def _check_values(q: Tensor, k: Tensor, v: Tensor, lse_prev: Tensor | None = None) -> None:
    if checks.debug():
        for name, x in (("q", q), ("k", k), ("v", v), ("lse_prev", lse_prev)):
            if x is not None:
                checks.values(name, x)


def _resolve(
    operation: str,
    q: Tensor,
    k: Tensor,
    backend: str,
    settings: str,
    group_size: int = 1,
    kept: int | None = None,
) -> tuple[dispatch.Kernel, LaunchSettings]:
    batch, heads, rows, width = q.shape
    return dispatch.resolve(
        operation,
        q.device,
        backend,
        settings,
        rows=rows,
        columns=k.shape[2],
        width=width,
        batch=batch,
        heads=heads,
        dtype=q.dtype,
        group_size=group_size,
        kept=kept,
    )

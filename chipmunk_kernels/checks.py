"""Checks of what a caller passes in: shapes, dtypes and devices always, values in debug mode only.

Reading values waits for the device, so it is off unless `CHIPMUNK_DEBUG=1` or `set_debug(True)`.
Everything here raises ValueError naming the argument, what was expected and what came, before anything is
launched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from chipmunk_kernels.columns import ColumnSet, group_count

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def switched_on(variable: str) -> bool:
    """Whether an environment variable is set, and not to 0."""
    return os.environ.get(variable, "") not in ("", "0")


_debug = switched_on("CHIPMUNK_DEBUG")


def debug() -> bool:
    """Whether values are checked too."""
    return _debug


def set_debug(on: bool) -> bool:
    """Switch the checking of values on or off; returns what it was before."""
    global _debug
    before, _debug = _debug, on
    return before


def floating(name: str, x: Tensor, rank: int, shape: str) -> None:
    """A tensor of `rank` sizable dimensions in one of `FLOATS`; `shape` names them for the message."""
    if x.dim() != rank:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name}: expected float16, bfloat16 or float32, got {x.dtype}")
    if x.numel() == 0:
        raise ValueError(f"{name}: expected at least one element in every dimension, got {tuple(x.shape)}")


def like(
    name: str, x: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """A tensor of exactly this shape, one of these dtypes, on this device."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: expected on {device} like the other arguments, got {x.device}")


def contiguous_last(name: str, x: Tensor) -> None:
    """The last dimension must be contiguous; the others may have any strides."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected a contiguous last dimension, got strides {x.stride()}; call .contiguous()"
        )


def positive(name: str, value: int) -> None:
    """Raise ValueError unless `value` is at least 1."""
    if value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value}")


def attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q `(B, H, Nq, D)`, k and v `(B, H, Nk, D)`: one dtype, one device, D contiguous."""
    floating("q", q, 4, "(B, H, N, D)")
    floating("k", k, 4, "(B, H, N, D)")
    like("k", k, (q.shape[0], q.shape[1], k.shape[2], q.shape[3]), (q.dtype,), q.device)
    like("v", v, k.shape, (q.dtype,), q.device)
    for name, x in (("q", q), ("k", k), ("v", v)):
        contiguous_last(name, x)


def column_set(columns: ColumnSet, batch: int, heads: int, rows: int, device: torch.device) -> None:
    """A column set for `rows` rows of this batch and these heads."""
    groups = group_count(rows, columns.group_size)
    expected, got = (batch, heads, groups), tuple(columns.indices.shape[:3])
    if got != expected:
        raise ValueError(
            f"columns: expected (B, H, G) = {expected} for {rows} rows in groups of {columns.group_size}, "
            f"got {got}"
        )
    if columns.device != device:
        raise ValueError(f"columns: expected on {device} like the other arguments, got {columns.device}")


def values(name: str, x: Tensor, *, nonnegative: bool = False) -> None:
    """Debug mode: no NaN, and nothing below zero where that has no meaning. Syncs with the device."""
    if not _debug:
        return
    bad = x.isnan()
    if bool(bad.any()):
        raise ValueError(f"{name}: {int(bad.sum())} values are NaN, the first at {_first(bad)}")
    if nonnegative and bool((x < 0).any()):
        raise ValueError(f"{name}: expected no negative values, found {float(x.min())} at {_first(x < 0)}")


def column_values(indices: Tensor, counts: Tensor, group_size: int, rows: int, columns: int) -> None:
    """Debug mode: every index and count in range, kept ones ascending. Syncs with the device."""
    if _debug:
        ColumnSet(indices, counts, group_size).validate(rows, columns)


def _first(bad: Tensor) -> tuple[int, ...]:
    return tuple(bad.nonzero()[0].tolist())

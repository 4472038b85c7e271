"""Column selection by count, by share of the score, from a mask: exact, sorted, without a sync.

Every selection may also keep fixed ranges (text tokens), a window around the group's own rows, and random
extras. The extras are the largest integer hashes of (seed, b, h, g, n): no generator state, the same on
every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chipmunk_kernels import checks, dispatch
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.ops.operator import operator
from chipmunk_kernels.settings import LaunchSettings

Ranges = Sequence[tuple[int, int]]
COVERAGE_SLACK = 1e-6
"""Of the goal. Where some columns hold exactly the share, roundings would decide whether one more is needed:
those of float32's 0.6 (4e-8 too large), of a fused multiply-add, of float64's 0.07. All are below it."""


def topk_columns(
    scores: Tensor,
    k: int,
    *,
    group_size: int,
    keep: Ranges = (),
    window: int = 0,
    random: int = 0,
    seed: int = 0,
    key_length: int | None = None,
    backend: str | None = None,
    settings: LaunchSettings | None = None,
) -> ColumnSet:
    """The always-kept columns, the k best of the others by score, and `random` more of the rest.

    Args:
        scores: `(B, H, G, N)` in float16, bfloat16 or float32. Of equal scores the lower index comes
            first; NaN ranks last (debug mode refuses it).
        k: columns kept by score; as many as remain, if fewer do.
        group_size: rows of a group, which the returned set records.
        keep: ranges `(start, stop)` of columns that every group keeps.
        window: also keep the columns within this many positions of the group's own rows; 0 for none.
        random: further columns, drawn with equal chance from the rest.
        seed: of the draw.
        key_length: columns from here on are never kept.
        backend, settings: as in `dense_attention`.

    Returns:
        A column set with room for the always-kept columns + k + random.

    Raises:
        ValueError: an argument of the wrong shape, dtype or range.
        RuntimeError: the explicit backend cannot run here.
    """
    length = _check(scores, group_size, keep, window, random, key_length)
    if k < 0:
        raise ValueError(f"k: expected 0 or more columns, got {k}")
    flat = [edge for span in keep for edge in span]
    capacity = min(length, _always_at_most(keep, window, group_size, length) + k + random)
    chosen = dispatch.encode("topk_columns", scores.device, backend, settings)
    indices, counts = _topk_columns(
        scores, min(k, length), group_size, flat, window, min(random, length), seed, length, capacity, *chosen
    )
    return ColumnSet(indices, counts, group_size)


def coverage_columns(
    scores: Tensor,
    coverage: float,
    *,
    group_size: int,
    max_columns: int | None = None,
    keep: Ranges = (),
    window: int = 0,
    random: int = 0,
    seed: int = 0,
    key_length: int | None = None,
    backend: str | None = None,
    settings: LaunchSettings | None = None,
) -> ColumnSet:
    """The always-kept columns, the fewest best others that reach `coverage`, and `random` more.

    Args:
        scores: `(B, H, G, N)`, none negative; NaN counts as zero and ranks last. Debug mode refuses both.
        coverage: share of the group's total score to reach, in [0, 1]; the always-kept columns' score counts.
            Reached is what falls short by a millionth of it; 1 keeps every column with a score above 0.
            Backends that sum in float32 may err by its rounding besides.
        max_columns: at most so many columns besides the always-kept and the random ones; by default no
            limit, which makes room for every column.
        group_size, keep, window, random, seed, key_length, backend, settings: as in `topk_columns`.

    Returns:
        A column set with ragged counts.

    Raises:
        ValueError, RuntimeError: as in `topk_columns`.
    """
    length = _check(scores, group_size, keep, window, random, key_length)
    if not 0.0 <= coverage <= 1.0:
        raise ValueError(f"coverage: expected a share from 0 to 1, got {coverage}")
    if max_columns is not None and max_columns < 0:
        raise ValueError(f"max_columns: expected 0 or more columns, got {max_columns}")
    share = float(coverage) if coverage == 1.0 else coverage * (1 - COVERAGE_SLACK)
    limit = length if max_columns is None else min(max_columns, length)
    flat = [edge for span in keep for edge in span]
    capacity = min(length, _always_at_most(keep, window, group_size, length) + limit + random)
    chosen = dispatch.encode("coverage_columns", scores.device, backend, settings)
    indices, counts = _coverage_columns(
        scores,
        share,
        group_size,
        limit,
        flat,
        window,
        min(random, length),
        seed,
        length,
        capacity,
        *chosen,
    )
    return ColumnSet(indices, counts, group_size)


def columns_from_mask(
    mask: Tensor,
    *,
    group_size: int,
    capacity: int | None = None,
    backend: str | None = None,
    settings: LaunchSettings | None = None,
) -> ColumnSet:
    """The columns marked in a mask.

    Args:
        mask: bool `(B, H, G, N)`.
        group_size: rows of a group, which the returned set records.
        capacity: room per group; of more marked columns, the first by index are kept. N by default.
        backend, settings: as in `dense_attention`.

    Raises:
        ValueError, RuntimeError: as in `topk_columns`.
    """
    if mask.dim() != 4 or mask.dtype != torch.bool or mask.numel() == 0:
        raise ValueError(
            f"mask: expected a non-empty bool (B, H, G, N), got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    checks.positive("group_size", group_size)
    columns = mask.shape[3]
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity: expected 0 or more columns, got {capacity}")
    room = columns if capacity is None else min(capacity, columns)
    chosen = dispatch.encode("columns_from_mask", mask.device, backend, settings)
    indices, counts = _columns_from_mask(mask, group_size, room, *chosen)
    return ColumnSet(indices, counts, group_size)


@operator("topk_columns")
def _topk_columns(
    scores: Tensor,
    k: int,
    group_size: int,
    keep: list[int],
    window: int,
    random: int,
    seed: int,
    key_length: int,
    capacity: int,
    backend: str,
    settings: str,
) -> tuple[Tensor, Tensor]:
    checks.values("scores", scores)
    kernel, launch = _resolve("topk_columns", scores, group_size, capacity, backend, settings)
    always = _always(scores, group_size, keep, window, key_length)
    return kernel.run(scores, k, always, random, seed, key_length, capacity, launch)


@_topk_columns.register_fake
def _(
    scores: Tensor,
    k: int,
    group_size: int,
    keep: list[int],
    window: int,
    random: int,
    seed: int,
    key_length: int,
    capacity: int,
    backend: str,
    settings: str,
) -> tuple[Tensor, Tensor]:
    return _empty_columns(scores, capacity)


@operator("coverage_columns")
def _coverage_columns(
    scores: Tensor,
    coverage: float,
    group_size: int,
    max_columns: int,
    keep: list[int],
    window: int,
    random: int,
    seed: int,
    key_length: int,
    capacity: int,
    backend: str,
    settings: str,
) -> tuple[Tensor, Tensor]:
    checks.values("scores", scores, nonnegative=True)
    kernel, launch = _resolve("coverage_columns", scores, group_size, capacity, backend, settings)
    always = _always(scores, group_size, keep, window, key_length)
    return kernel.run(scores, coverage, max_columns, always, random, seed, key_length, capacity, launch)


@_coverage_columns.register_fake
def _(
    scores: Tensor,
    coverage: float,
    group_size: int,
    max_columns: int,
    keep: list[int],
    window: int,
    random: int,
    seed: int,
    key_length: int,
    capacity: int,
    backend: str,
    settings: str,
) -> tuple[Tensor, Tensor]:
    return _empty_columns(scores, capacity)


@operator("columns_from_mask")
def _columns_from_mask(
    mask: Tensor, group_size: int, capacity: int, backend: str, settings: str
) -> tuple[Tensor, Tensor]:
    kernel, launch = _resolve("columns_from_mask", mask, group_size, capacity, backend, settings)
    return kernel.run(mask, capacity, launch)


@_columns_from_mask.register_fake
def _(mask: Tensor, group_size: int, capacity: int, backend: str, settings: str) -> tuple[Tensor, Tensor]:
    return _empty_columns(mask, capacity)


def _check(
    scores: Tensor, group_size: int, keep: Ranges, window: int, random: int, key_length: int | None
) -> int:
    """Check what the scored selections share; returns how many leading columns may be kept."""
    checks.floating("scores", scores, 4, "(B, H, G, N)")
    checks.positive("group_size", group_size)
    columns = scores.shape[3]
    for start, stop in keep:
        if not 0 <= start <= stop <= columns:
            raise ValueError(f"keep: expected ranges 0 <= start <= stop <= {columns}, got ({start}, {stop})")
    for name, value in (("window", window), ("random", random)):
        if value < 0:
            raise ValueError(f"{name}: expected 0 or more columns, got {value}")
    if key_length is None:
        return columns
    if not 0 <= key_length <= columns:
        raise ValueError(f"key_length: expected 0 to {columns}, the number of columns; got {key_length}")
    return key_length


def _always_at_most(keep: Ranges, window: int, group_size: int, length: int) -> int:
    """The most that a group can always keep: the ranges' union and a whole window beside it."""
    kept, reached = 0, 0
    for start, stop in sorted(keep):
        kept += max(0, min(stop, length) - max(start, reached))
        reached = max(reached, stop)
    return min(length, kept + (group_size + 2 * window if window else 0))


def _always(scores: Tensor, group_size: int, keep: list[int], window: int, key_length: int) -> Tensor | None:
    """Bool `(G, N)`: the columns that each group keeps whatever their score; None for none at all."""
    if not keep and not window:
        return None
    groups, columns = scores.shape[2:]
    # One padded row a group: its window starts at column g * group_size there, so that all of them are one
    # strided view. Without windows all groups share a row.
    rows = groups if window else 1
    pitch = max(columns + window, groups * group_size + 2 * window)
    padded = torch.zeros(rows, pitch, dtype=torch.bool, device=scores.device)
    if window:
        padded.as_strided((groups, group_size + 2 * window), (pitch + group_size, 1)).fill_(True)
    kept = padded[:, window : window + columns]
    for start, stop in zip(keep[::2], keep[1::2], strict=True):
        kept[:, start:stop] = True
    kept[:, key_length:] = False
    return kept.expand(groups, columns)


def _empty_columns(scores: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    shape = scores.shape[:3]
    return scores.new_empty(*shape, capacity, dtype=torch.int32), scores.new_empty(shape, dtype=torch.int32)


def _resolve(
    operation: str, scores: Tensor, group_size: int, capacity: int, backend: str, settings: str
) -> tuple[dispatch.Kernel, LaunchSettings]:
    batch, heads, groups, columns = scores.shape
    return dispatch.resolve(
        operation,
        scores.device,
        backend,
        settings,
        rows=groups * group_size,
        columns=columns,
        width=1,
        batch=batch,
        heads=heads,
        dtype=torch.float32,
        group_size=group_size,
        kept=capacity,
    )

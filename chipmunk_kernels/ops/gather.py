"""Packing the kept columns of each group into a dense block, and writing such a block back."""

from __future__ import annotations

from torch import Tensor

from chipmunk_kernels import checks, dispatch
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.ops.operator import operator
from chipmunk_kernels.settings import LaunchSettings


def gather_columns(
    x: Tensor,
    columns: ColumnSet,
    *,
    per_group: bool = False,
    backend: str | None = None,
    settings: LaunchSettings | None = None,
) -> Tensor:
    """Pack the columns that each group keeps.

    Args:
        x: with `per_group` False, `(B, H, N, D)`: one table of columns for every group (keys, values). With
            `per_group` True, `(B, H, N, R)`: each column's value for every row ("neuron-major"), of which
            group g owns the rows `[g · group_size, (g + 1) · group_size)`. float16, bfloat16 or float32,
            last dimension contiguous.
        columns: for rows of any number, or for exactly R rows.
        per_group: which of the two.
        backend, settings: as in `dense_attention`.

    Returns:
        `(B, H, G, C, D)`, or `(B, H, G, C, group_size)`, contiguous. Padding slots and rows past R are zero.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or layout.
        RuntimeError: the explicit backend cannot run here.
    """
    checks.floating("x", x, 4, "(B, H, N, D)")
    checks.contiguous_last("x", x)
    rows = x.shape[3] if per_group else columns.groups * columns.group_size
    checks.column_set(columns, x.shape[0], x.shape[1], rows, x.device)
    chosen = dispatch.encode("gather_columns", x.device, backend, settings)
    return _gather_columns(x, columns.indices, columns.counts, columns.group_size, per_group, *chosen)


def scatter_columns(
    packed: Tensor,
    columns: ColumnSet,
    out: Tensor,
    *,
    accumulate: bool = False,
    backend: str | None = None,
    settings: LaunchSettings | None = None,
) -> Tensor:
    """Write packed columns back into each group's own rows: the inverse of a `per_group` gather.

    Args:
        packed: `(B, H, G, C, group_size)`; padding slots and rows past R are not read.
        columns: for R rows.
        out: `(B, H, N, R)` in packed's dtype, last dimension contiguous; changed in place at kept entries
            only.
        accumulate: add instead of assign.
        backend, settings: as in `dense_attention`.

    Returns:
        `out`.

    Raises:
        ValueError, RuntimeError: as in `gather_columns`.
    """
    checks.floating("out", out, 4, "(B, H, N, R)")
    checks.contiguous_last("out", out)
    checks.column_set(columns, out.shape[0], out.shape[1], out.shape[3], out.device)
    shape = (*columns.indices.shape, columns.group_size)
    checks.like("packed", packed, shape, (out.dtype,), out.device)
    chosen = dispatch.encode("scatter_columns", out.device, backend, settings)
    _scatter_columns(packed, columns.indices, columns.counts, columns.group_size, out, accumulate, *chosen)
    return out


@operator("gather_columns")
def _gather_columns(
    x: Tensor,
    indices: Tensor,
    counts: Tensor,
    group_size: int,
    per_group: bool,
    backend: str,
    settings: str,
) -> Tensor:
    rows = x.shape[3] if per_group else indices.shape[2] * group_size
    checks.column_values(indices, counts, group_size, rows, x.shape[2])
    width = group_size if per_group else x.shape[3]
    kernel, launch = _resolve(
        "gather_columns", x, rows, width, group_size, indices.shape[3], backend, settings
    )
    columns = ColumnSet(indices.contiguous(), counts.contiguous(), group_size)
    return kernel.run(x, columns, per_group, launch)


@_gather_columns.register_fake
def _(
    x: Tensor,
    indices: Tensor,
    counts: Tensor,
    group_size: int,
    per_group: bool,
    backend: str,
    settings: str,
) -> Tensor:
    return x.new_empty(*indices.shape, group_size if per_group else x.shape[3])


@operator("scatter_columns", mutates=("out",))
def _scatter_columns(
    packed: Tensor,
    indices: Tensor,
    counts: Tensor,
    group_size: int,
    out: Tensor,
    accumulate: bool,
    backend: str,
    settings: str,
) -> None:
    checks.column_values(indices, counts, group_size, out.shape[3], out.shape[2])
    kernel, launch = _resolve(
        "scatter_columns", out, out.shape[3], group_size, group_size, indices.shape[3], backend, settings
    )
    columns = ColumnSet(indices.contiguous(), counts.contiguous(), group_size)
    kernel.run(packed.contiguous(), columns, out, accumulate, launch)


@_scatter_columns.register_fake
def _(
    packed: Tensor,
    indices: Tensor,
    counts: Tensor,
    group_size: int,
    out: Tensor,
    accumulate: bool,
    backend: str,
    settings: str,
) -> None:
    return None


def _resolve(
    operation: str,
    x: Tensor,
    rows: int,
    width: int,
    group_size: int,
    capacity: int,
    backend: str,
    settings: str,
) -> tuple[dispatch.Kernel, LaunchSettings]:
    return dispatch.resolve(
        operation,
        x.device,
        backend,
        settings,
        rows=rows,
        columns=x.shape[2],
        width=width,
        batch=x.shape[0],
        heads=x.shape[1],
        dtype=x.dtype,
        group_size=group_size,
        kept=capacity,
    )

"""Column-sparse kernels for diffusion transformers.

Everything a caller needs is here: the operations, the column set they share, and the two functions that
put the method into a diffusers model and take it out again. Importing needs torch alone; triton, cupy and
diffusers are imported when something that needs them is used.
"""

from __future__ import annotations

from typing import Any

from chipmunk_kernels.checks import set_debug
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.ops.attention import colsum_attention, dense_attention, sparse_attention
from chipmunk_kernels.ops.gather import gather_columns, scatter_columns
from chipmunk_kernels.ops.mlp import bias_gelu, group_mean, sparse_mlp
from chipmunk_kernels.ops.select import columns_from_mask, coverage_columns, topk_columns
from chipmunk_kernels.problem import Problem

__all__ = [
    "ColumnSet",
    "Problem",
    "apply_chipmunk",
    "bias_gelu",
    "colsum_attention",
    "columns_from_mask",
    "coverage_columns",
    "dense_attention",
    "gather_columns",
    "group_mean",
    "remove_chipmunk",
    "scatter_columns",
    "set_debug",
    "sparse_attention",
    "sparse_mlp",
    "topk_columns",
]


def __getattr__(name: str) -> Any:
    """`apply_chipmunk` and `remove_chipmunk`, which need diffusers, imported on first use."""
    if name in ("apply_chipmunk", "remove_chipmunk"):
        from chipmunk_kernels.integrations import diffusers

        return getattr(diffusers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The portable backend: gathers and library matrix products, block by block. The default on a CPU.

It runs wherever torch does, so on a GPU it is what dispatch falls back to. Scratch memory is bounded by a
launch setting, never by the sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from chipmunk_kernels.backends.torch import attention, bias_gelu, gather, mlp, select
from chipmunk_kernels.registry import Kernel


def unavailable(device: torch.device) -> str | None:
    """Never: torch runs everywhere."""
    return None


def kernels() -> Mapping[str, Kernel]:
    """Operation → kernel."""
    table = (
        ("dense_attention", attention.dense_attention, attention.DenseSettings),
        ("colsum_attention", attention.colsum_attention, attention.ColsumSettings),
        ("sparse_attention", attention.sparse_attention, attention.SparseSettings),
        ("topk_columns", select.topk_columns, select.SelectSettings),
        ("coverage_columns", select.coverage_columns, select.SelectSettings),
        ("columns_from_mask", select.columns_from_mask, select.SelectSettings),
        ("gather_columns", gather.gather_columns, gather.GatherSettings),
        ("scatter_columns", gather.scatter_columns, gather.ScatterSettings),
        ("sparse_mlp", mlp.sparse_mlp, mlp.SparseMlpSettings),
        ("group_mean", mlp.group_mean, mlp.GroupMeanSettings),
        ("bias_gelu", bias_gelu.bias_gelu, bias_gelu.BiasGeluSettings),
    )
    return {name: Kernel(name, "torch", run, settings) for name, run, settings in table}

"""The column-sparse MLP, one token group after another: gather the weight rows, then library products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from chipmunk_kernels.backends.torch.gather import put_rows
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.settings import LaunchSettings


@dataclass(frozen=True)
class SparseMlpSettings(LaunchSettings):
    """Nothing to choose: a group's products are large enough to fill the library kernels."""


@dataclass(frozen=True)
class GroupMeanSettings(LaunchSettings):
    """Nothing to choose."""


def sparse_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2_by_neuron: Tensor,
    columns: ColumnSet,
    activation_cache: Tensor,
    output_cache: Tensor,
    activation: str,
    settings: SparseMlpSettings,
) -> None:
    """See `ops.mlp.sparse_mlp`."""
    size = columns.group_size
    on_host = x.device.type == "cpu"
    kept = columns.kept()[:, 0]
    for b in range(columns.batch):
        for g in range(columns.groups):
            # On the host the counts can be read, and only kept neurons computed; elsewhere padding is masked.
            slots = slice(0, int(columns.counts[b, 0, g]) if on_host else columns.capacity)
            rows = slice(g * size, min((g + 1) * size, x.shape[1]))
            _group(
                x[b, rows],
                w1,
                b1,
                w2_by_neuron,
                columns.indices[b, 0, g, slots],
                None if on_host else kept[b, g],
                activation_cache[b, :, rows],
                output_cache[b, rows],
            )


def group_mean(x: Tensor, group_size: int, settings: GroupMeanSettings) -> Tensor:
    """See `ops.mlp.group_mean`."""
    return torch.stack([rows.float().mean(1) for rows in x.split(group_size, dim=1)], dim=1).to(x.dtype)


def _group(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2_by_neuron: Tensor,
    neurons: Tensor,
    kept: Tensor | None,
    cache: Tensor,
    output: Tensor,
) -> None:
    """One group: x `(R, K)`, neurons `(C,)`, cache `(F, R)` and output `(R, Kout)` changed in place."""
    if len(neurons) == 0:
        return
    bias = None if b1 is None else b1.index_select(0, neurons)
    middle = F.linear(x, w1.index_select(0, neurons), bias)
    # Neuron-major from here on, as the cache is: one transposed copy instead of strided reads and writes.
    fresh = F.gelu(middle, approximate="tanh").t().contiguous()
    change = fresh - cache.index_select(0, neurons)
    if kept is not None:
        change.masked_fill_(~kept.unsqueeze(1), 0)
    put_rows(cache, neurons, kept, fresh)
    delta = change.t()
    chosen = w2_by_neuron.index_select(0, neurons)
    if output.dtype == delta.dtype:
        output.addmm_(delta, chosen)
    else:
        output.add_(delta @ chosen)

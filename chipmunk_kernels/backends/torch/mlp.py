"""The column-sparse MLP, one token group after another: gather the weight rows, then library products.

The gathered weights of a group, 22 MB each at FLUX size, would travel to memory and back. So both products
run over parts of their output, whose gathered weights stay in cache. The first product is neuron-major, as
the cache is: with the weights on the left it is also the faster one (idle 2-core AVX-512 CPU). A CPU without
16-bit products computes in float32 (`products.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from chipmunk_kernels.backends.torch.gather import put_rows
from chipmunk_kernels.backends.torch.products import product_dtype
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.settings import LaunchSettings, choice


@dataclass(frozen=True)
class SparseMlpSettings(LaunchSettings):
    """`scratch_mib` bounds the gathered weights that one product reads."""

    scratch_mib: int = choice(4, 1, 2, 4, 8, 16, 32)


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
    # All that a group gathers, as far as the setting goes; but a part holds 64 rows, however wide.
    most = columns.capacity * max(w1.shape[1], w2_by_neuron.shape[1])
    least = 64 * max(w1.shape[1], columns.capacity)
    wide = product_dtype(x.dtype, x.device.type)
    scratch = x.new_empty(max(least, min(most, (settings.scratch_mib << 20) // wide.itemsize)), dtype=wide)
    for b in range(columns.batch):
        for g in range(columns.groups):
            # On the host the counts can be read, and only kept neurons computed; elsewhere padding is masked.
            slots = slice(0, int(columns.counts[b, 0, g]) if on_host else columns.capacity)
            rows = slice(g * size, min((g + 1) * size, x.shape[1]))
            _group(
                x[b, rows].to(wide),
                w1,
                b1,
                w2_by_neuron,
                columns.indices[b, 0, g, slots],
                None if on_host else kept[b, g],
                activation_cache[b, :, rows],
                output_cache[b, rows],
                scratch,
            )


def group_mean(x: Tensor, group_size: int, settings: GroupMeanSettings) -> Tensor:
    """See `ops.mlp.group_mean`. `Tensor.mean` adds 16-bit elements up in float32."""
    whole = x.shape[1] // group_size * group_size
    means = x[:, :whole].unflatten(1, (-1, group_size)).mean(2)
    if whole == x.shape[1]:
        return means
    return torch.cat([means, x[:, whole:].mean(1, keepdim=True)], dim=1)


def _group(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2_by_neuron: Tensor,
    neurons: Tensor,
    kept: Tensor | None,
    cache: Tensor,
    output: Tensor,
    scratch: Tensor,
) -> None:
    """One group: x `(R, K)`, neurons `(C,)`, cache `(F, R)` and output `(R, Kout)` changed in place."""
    if len(neurons) == 0:
        return
    middle = x.new_empty(len(neurons), len(x))
    for part in _parts(len(neurons), x.shape[1], len(scratch)):
        weights = _gather(w1, neurons[part], scratch)
        if b1 is None:
            torch.mm(weights, x.t(), out=middle[part])
        else:
            bias = b1.index_select(0, neurons[part]).unsqueeze(1).to(x.dtype)
            torch.addmm(bias, weights, x.t(), out=middle[part])
    fresh = F.gelu(middle, approximate="tanh").to(cache.dtype)
    change = fresh.to(x.dtype) - cache.index_select(0, neurons)
    if kept is not None:
        change.masked_fill_(~kept.unsqueeze(1), 0)
    put_rows(cache, neurons, kept, fresh)
    delta = change.t().contiguous()
    for part in _parts(output.shape[1], len(neurons), len(scratch)):
        weights = _gather(w2_by_neuron[:, part], neurons, scratch)
        if output.dtype == delta.dtype:
            output[:, part].addmm_(delta, weights)
        else:
            output[:, part] += delta @ weights


def _gather(table: Tensor, rows: Tensor, scratch: Tensor) -> Tensor:
    """`table[rows]` in the scratch. Memory new to the process costs more to touch than the copy itself.

    Measured: 33 instead of 70 ms for the first product with its gathers, 8 groups of 128 tokens at FLUX size.
    """
    packed = scratch[: len(rows) * table.shape[1]].view(len(rows), table.shape[1])
    if table.dtype != packed.dtype:
        return packed.copy_(table.index_select(0, rows))
    return torch.index_select(table, 0, rows, out=packed)


def _parts(length: int, elements_each: int, scratch_elements: int) -> Iterator[slice]:
    """Slices of `length` that fit the scratch, multiples of 64 so that no product is ragged but the last."""
    step = max(64, scratch_elements // elements_each // 64 * 64)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))

"""Random inputs that hide no bug, and the error budget that decides right from wrong.

Columns are scattered and ragged, with one empty and one full group: identity lists and round counts hide
every gather bug. Outputs that a test allocates beforehand start as NaN, so that what is never written shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from chipmunk_kernels.columns import ColumnSet, group_count

Device = torch.device | str


def generator(seed: int) -> torch.Generator:
    """A CPU generator: the same inputs on every device."""
    return torch.Generator().manual_seed(seed)


def randn(
    *shape: int, dtype: torch.dtype = torch.float32, device: Device = "cpu", seed: int = 0, scale: float = 1.0
) -> Tensor:
    """Normal values of standard deviation `scale`, drawn in float32 and rounded to `dtype`."""
    return (torch.randn(shape, generator=generator(seed)) * scale).to(device=device, dtype=dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Tensor:
    """An output full of NaN."""
    return torch.full(shape, math.nan, dtype=dtype, device=device)


def attention_inputs(
    batch: int = 1,
    heads: int = 2,
    rows: int = 193,
    columns: int | None = None,
    width: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
    strided: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q `(B, H, rows, width)` and k, v `(B, H, columns, width)`.

    `strided` gives the same values as transposed views of `(B, N, H, D)` memory, as a model's projections do.
    """
    columns = rows if columns is None else columns
    tensors = []
    for offset, length in enumerate((rows, columns, columns)):
        x = randn(batch, heads, length, width, dtype=dtype, device=device, seed=seed * 3 + offset)
        tensors.append(x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x)
    return tensors[0], tensors[1], tensors[2]


def scattered_columns(
    batch: int = 1,
    heads: int = 2,
    rows: int = 193,
    columns: int = 193,
    group_size: int = 64,
    density: float = 0.3,
    *,
    uniform: bool = False,
    device: Device = "cpu",
    seed: int = 0,
) -> ColumnSet:
    """Scattered columns in ascending order, about `density` of them.

    Counts vary from group to group, unless `uniform`; with more than one group in all, the first is empty
    then and the last keeps everything. Padding slots hold random valid indices, as the definition allows.
    """
    shape = (batch, heads, group_count(rows, group_size))
    total, rng = math.prod(shape), generator(seed + 1000)
    middle = max(1, min(columns, round(density * columns)))
    if uniform:
        counts = torch.full((total,), middle)
    else:
        counts = torch.randint(max(0, middle // 2), min(columns, 2 * middle) + 1, (total,), generator=rng)
        if total > 1:
            counts[0], counts[-1] = 0, columns
    capacity = int(counts.max())
    order = torch.rand(total, columns, generator=rng).argsort(dim=-1)[:, :capacity]
    slots = torch.arange(capacity).expand(total, capacity)
    ascending = torch.where(slots < counts.unsqueeze(1), order, columns).sort(dim=-1).values
    padding = torch.randint(0, columns, (total, capacity), generator=rng)
    indices = torch.where(slots < counts.unsqueeze(1), ascending, padding)
    return ColumnSet(
        indices.view(*shape, capacity).to(device=device, dtype=torch.int32),
        counts.view(shape).to(device=device, dtype=torch.int32),
        group_size,
    )


@dataclass(frozen=True)
class MlpInputs:
    """One sparse MLP call: x `(B, M, K)`, weights `(F, ...)`, caches `(B, F, M)` and `(B, M, Kout)`."""

    x: Tensor
    w1: Tensor
    b1: Tensor
    w2_by_neuron: Tensor
    columns: ColumnSet
    activation_cache: Tensor
    output_cache: Tensor


def mlp_inputs(
    batch: int = 1,
    tokens: int = 193,
    width: int = 64,
    neurons: int = 256,
    width_out: int | None = None,
    group_size: int = 64,
    density: float = 0.3,
    *,
    uniform: bool = False,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
    seed: int = 0,
) -> MlpInputs:
    """Random weights of the usual size (1/√fan-in), and caches unlike what a fresh computation gives."""
    width_out = width if width_out is None else width_out

    def draw(*shape: int, offset: int, scale: float = 1.0) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed * 7 + offset, scale=scale)

    return MlpInputs(
        x=draw(batch, tokens, width, offset=0),
        w1=draw(neurons, width, offset=1, scale=width**-0.5),
        b1=draw(neurons, offset=2, scale=0.1),
        w2_by_neuron=draw(neurons, width_out, offset=3, scale=neurons**-0.5),
        columns=scattered_columns(
            batch, 1, tokens, neurons, group_size, density, uniform=uniform, device=device, seed=seed
        ),
        activation_cache=draw(batch, neurons, tokens, offset=4, scale=0.3),
        output_cache=draw(batch, tokens, width_out, offset=5),
    )


def max_error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinite where only one is finite, or infinities differ."""
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    difference = torch.where(actual == truth, 0.0, (actual - truth).abs()).nan_to_num(nan=math.inf)
    return float(difference.max()) if difference.numel() else 0.0


def error_budget(peer: Tensor, truth: Tensor, dtype: torch.dtype | None = None) -> float:
    """2 × (the error of an independent computation in the same dtype + a rounding band).

    The band is half a unit in the last place of the largest value, which storing it costs, and eight units of
    float32, since with few values the other computation may be lucky in the order it sums them.
    `dtype` is the one that the computation ran in; by default that of `peer`.
    """
    finite = truth[torch.isfinite(truth)].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    peer_error = max_error(peer, truth)
    assert math.isfinite(peer_error), "the peer is not finite where the truth is: it sets no budget"
    units = torch.finfo(dtype or peer.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
    return 2.0 * (peer_error + units * largest)


def assert_within_budget(
    actual: Tensor, truth: Tensor, peer: Tensor, name: str = "output", dtype: torch.dtype | None = None
) -> None:
    """Fail, naming both numbers, where the error of `actual` exceeds its budget.

    Args:
        actual: what the kernel gave.
        truth: the float64 reference.
        peer: an independent PyTorch computation in the kernel's own dtype (the reference on the same inputs).
        name: what is compared.
        dtype: the dtype that the computation ran in, where it is not the one of `peer`.
    """
    assert truth.dtype == torch.float64, f"the truth must be computed in float64, got {truth.dtype}"
    error, budget = max_error(actual, truth), error_budget(peer, truth, dtype)
    assert error <= budget, f"{name}: error {error:.3e} exceeds its budget {budget:.3e}"

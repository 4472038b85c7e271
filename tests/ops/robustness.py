"""Every operation as a function of its inputs alone, those inputs, and what the reference makes of them.

Tests go through the public operators: what a model calls is what must survive odd sizes, streams, graphs and
compilers. Operations that write into caches get copies, so that one set of inputs serves any number of calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import chipmunk_kernels as ck
from chipmunk_kernels.columns import ColumnSet, group_count
from reference import attention, gather, group_mean, mlp, select
from tests.factories import assert_within_budget, attention_inputs, generator, randn
from tests.triton_attention.cases import check as check_attention

Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]

ATTENTION = ("dense_attention", "colsum_attention", "sparse_attention")
SELECTION = ("topk_columns", "coverage_columns", "columns_from_mask")
MOVES = ("gather_columns", "scatter_columns")
OPERATIONS = (*ATTENTION, *SELECTION, *MOVES, "sparse_mlp", "group_mean", "bias_gelu")
NEURONS = 193
"""Of the MLP: odd, so that no tile divides it."""


def make(
    operation: str,
    rows: int,
    *,
    width: int = 128,
    batch: int = 1,
    heads: int = 2,
    group_size: int = 128,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Inputs of an operation on `rows` rows; as many columns, but for the MLP and its activations."""
    if operation in ATTENTION:
        return _attention(rows, width, batch, heads, group_size, dtype, device, seed)
    if operation in SELECTION:
        scores = randn(batch, heads, group_count(rows, group_size), rows, device=device, seed=seed)
        # Whole numbers: their sums are exact, so that coverage has one answer, and ties abound.
        return {"scores": (scores.abs() * 50).round(), "group_size": group_size}
    return _neurons(rows, width, batch, heads, group_size, dtype, device, seed)


def _attention(
    rows: int,
    width: int,
    batch: int,
    heads: int,
    group_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
) -> Inputs:
    q, k, v = attention_inputs(
        batch, heads, rows, width=width, dtype=dtype, device=device, strided=True, seed=seed
    )
    return {
        "q": q,
        "k": k,
        "v": v,
        "base": randn(batch, heads, rows, width, dtype=dtype, device=device, seed=seed + 7),
        "lse_prev": randn(batch, heads, rows, device=device, seed=seed + 8) * 0.1 + math.log(rows) + 0.5,
        "columns": any_counts(batch, heads, rows, rows, group_size, device, seed),
        "scale": width**-0.5,
    }


def _neurons(
    rows: int,
    width: int,
    batch: int,
    heads: int,
    group_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
) -> Inputs:
    def draw(*shape: int, offset: int, scale: float = 1.0) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed * 9 + offset, scale=scale)

    return {
        "x": draw(batch, rows, width, offset=0),
        "w1": draw(NEURONS, width, offset=1, scale=width**-0.5),
        "b1": draw(NEURONS, offset=2, scale=0.1),
        "w2_by_neuron": draw(NEURONS, width, offset=3, scale=NEURONS**-0.5),
        "columns": any_counts(batch, 1, rows, NEURONS, group_size, device, seed),
        "activations": draw(batch, NEURONS, rows, offset=4, scale=0.3),
        "output": draw(batch, rows, width, offset=5),
        "table": draw(batch, heads, rows, width, offset=6),
        "table_columns": any_counts(batch, heads, rows, rows, group_size, device, seed),
        "group_size": group_size,
    }


def any_counts(
    batch: int, heads: int, rows: int, columns: int, group_size: int, device: torch.device | str, seed: int
) -> ColumnSet:
    """Scattered columns; the groups in turn keep none, one, an odd number, and all of them."""
    shape = (batch, heads, group_count(rows, group_size))
    rng, total = generator(seed + 1000), math.prod(shape)
    kept = [(0, 1, (columns // 3) | 1, columns)[(seed + place) % 4] for place in range(total)]
    counts = torch.tensor(kept).clamp(max=columns)
    order = torch.rand(total, columns, generator=rng).argsort(-1)
    slots = torch.arange(columns).expand(total, columns)
    ascending = torch.where(slots < counts.unsqueeze(1), order, columns).sort(-1).values
    padding = torch.randint(0, columns, (total, columns), generator=rng)
    indices = torch.where(ascending < columns, ascending, padding)
    return ColumnSet(
        indices.view(*shape, columns).to(device, torch.int32),
        counts.view(shape).to(device, torch.int32),
        group_size,
    )


def _dense(i: Inputs, backend: str) -> Outputs:
    return ck.dense_attention(i["q"], i["k"], i["v"], scale=i["scale"], backend=backend)


def _colsum(i: Inputs, backend: str) -> Outputs:
    size = i["columns"].group_size
    return ck.colsum_attention(i["q"], i["k"], i["v"], i["lse_prev"], size, scale=i["scale"], backend=backend)


def _sparse(i: Inputs, backend: str) -> Outputs:
    out = ck.sparse_attention(
        i["q"], i["k"], i["v"], i["columns"],
        base=i["base"], sign=-1, scale=i["scale"], return_lse=True, backend=backend,
    )  # fmt: skip
    assert isinstance(out, tuple)
    return out


def _topk(i: Inputs, backend: str) -> Outputs:
    columns = ck.topk_columns(i["scores"], **selecting(i), k=_half(i), backend=backend)
    return columns.indices, columns.counts


def _coverage(i: Inputs, backend: str) -> Outputs:
    columns = ck.coverage_columns(i["scores"], 0.6, **selecting(i), backend=backend)
    return columns.indices, columns.counts


def _from_mask(i: Inputs, backend: str) -> Outputs:
    columns = ck.columns_from_mask(i["scores"] > 20, group_size=i["group_size"], backend=backend)
    return columns.indices, columns.counts


def selecting(i: Inputs) -> dict[str, Any]:
    """What both scored selections are asked for: leading columns, a window, random extras."""
    columns = i["scores"].shape[3]
    return {
        "group_size": i["group_size"],
        "keep": [(0, min(5, columns))],
        "window": 3,
        "random": min(4, columns),
        "seed": 11,
    }


def _half(i: Inputs) -> int:
    return i["scores"].shape[3] // 2


def _gather(i: Inputs, backend: str) -> Outputs:
    rows = ck.gather_columns(i["table"], i["table_columns"], backend=backend)
    activations = i["activations"].unsqueeze(1)
    return rows, ck.gather_columns(activations, i["columns"], per_group=True, backend=backend)


def _packed(i: Inputs) -> Tensor:
    """One value for each slot: the last elements of x, over and over."""
    shape = (*i["columns"].indices.shape, i["group_size"])
    flat = i["x"].flatten()
    return flat.repeat(-(-math.prod(shape) // flat.numel()))[: math.prod(shape)].view(shape)


def _scatter(i: Inputs, backend: str) -> Outputs:
    packed, outs = _packed(i), []
    for accumulate in (False, True):
        out = i["activations"].unsqueeze(1).clone()
        outs.append(ck.scatter_columns(packed, i["columns"], out, accumulate=accumulate, backend=backend))
    return tuple(outs)


def _mlp(i: Inputs, backend: str) -> Outputs:
    activations, output = i["activations"].clone(), i["output"].clone()
    ck.sparse_mlp(
        i["x"], i["w1"], i["b1"], i["w2_by_neuron"], i["columns"], activations, output, backend=backend
    )
    return activations, output


def _mean(i: Inputs, backend: str) -> Outputs:
    return (ck.group_mean(i["x"], i["group_size"], backend=backend),)


def _bias_gelu(i: Inputs, backend: str) -> Outputs:
    return (ck.bias_gelu(i["activations"].clone(), i["b1"], backend=backend),)


CALLS: dict[str, Callable[[Inputs, str], Outputs]] = {
    "dense_attention": _dense,
    "colsum_attention": _colsum,
    "sparse_attention": _sparse,
    "topk_columns": _topk,
    "coverage_columns": _coverage,
    "columns_from_mask": _from_mask,
    "gather_columns": _gather,
    "scatter_columns": _scatter,
    "sparse_mlp": _mlp,
    "group_mean": _mean,
    "bias_gelu": _bias_gelu,
}


def call(operation: str, i: Inputs, backend: str) -> Outputs:
    """Run the operation on a backend; every output, and none of the inputs changed."""
    return CALLS[operation](i, backend)


def check(operation: str, got: Outputs, i: Inputs) -> None:
    """Compare with the reference: in float64 within the budget of one in the inputs' dtype, or exactly."""
    if operation in SELECTION:
        return _check_selection(operation, got, i)
    if operation in MOVES:
        expected = _moved(operation, i)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0)
        return None
    dtype = i["q" if operation in ATTENTION else "x"].dtype
    exact, peer = (_computed(operation, _cast(i, kind)) for kind in (torch.float64, dtype))
    if operation in ATTENTION:
        return check_attention(got, exact, peer, dtype)
    for number, (ours, true, other) in enumerate(zip(got, exact, peer, strict=True)):
        assert_within_budget(ours, true, other, f"{operation} {number}", dtype)
    return None


def _cast(i: Inputs, dtype: torch.dtype) -> Inputs:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in i.items()
    }


def _computed(operation: str, i: Inputs) -> Outputs:
    columns = i.get("columns")
    lists = () if columns is None else (columns.indices, columns.counts, columns.group_size)
    if operation == "dense_attention":
        return attention.dense_attention(i["q"], i["k"], i["v"], scale=i["scale"])
    if operation == "colsum_attention":
        return attention.colsum_attention(
            i["q"], i["k"], i["v"], i["lse_prev"], columns.group_size, scale=i["scale"]
        )
    if operation == "sparse_attention":
        return attention.sparse_attention(i["q"], i["k"], i["v"], *lists, i["base"], -1, i["scale"])
    if operation == "group_mean":
        return (group_mean.group_mean(i["x"], i["group_size"]),)
    if operation == "bias_gelu":
        return (mlp.bias_gelu(i["activations"], i["b1"]),)
    caches = i["activations"], i["output"]
    return mlp.sparse_mlp(i["x"], i["w1"], i["b1"], i["w2_by_neuron"], *lists, *caches)


def _moved(operation: str, i: Inputs) -> Outputs:
    """On the CPU: the reference goes column by column."""
    columns, activations = i["columns"].to("cpu"), i["activations"].unsqueeze(1).cpu()
    lists = columns.indices, columns.counts, columns.group_size
    if operation == "scatter_columns":
        packed = _packed(i).cpu()
        return tuple(gather.scatter_columns(packed, *lists, activations, add) for add in (False, True))
    table = i["table_columns"].to("cpu")
    return (
        gather.gather_columns(i["table"].cpu(), table.indices, table.counts, table.group_size),
        gather.gather_columns(activations, *lists, per_group=True),
    )


def _check_selection(operation: str, got: Outputs, i: Inputs) -> None:
    scores = i["scores"].cpu()
    if operation == "topk_columns":
        expected = select.topk_columns(scores, **selecting(i), k=_half(i))
    elif operation == "coverage_columns":
        expected = select.coverage_columns(scores, 0.6, **selecting(i))
    else:
        expected = select.columns_from_mask(scores > 20)
    indices, counts = (x.cpu() for x in got)
    assert torch.equal(counts, expected[1])
    for place in torch.cartesian_prod(*(torch.arange(size) for size in counts.shape)).view(-1, 3).tolist():
        b, h, g = place
        count = int(counts[b, h, g])
        assert indices[b, h, g, :count].tolist() == expected[0][b, h, g, :count].tolist(), place
    assert indices.numel() == 0 or 0 <= int(indices.min()) <= int(indices.max()) < scores.shape[3]

"""Inputs for a problem: dense random tensors and scattered columns, made on the device from a seed.

Values are normal, never zeros: data moves power, and zeros run 13 to 40 % faster than what a model produces.
A `Case` is one set of inputs in the order in which every backend's function takes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chipmunk_kernels.columns import ColumnSet, group_count
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings

ACTIVATION = "gelu_tanh"
Options = tuple[tuple[str, int], ...]
"""How an operation is called where its shapes do not say it: (name, value) pairs, which compare and hash."""
OPTIONS = {"gather_columns": ("per_group",), "topk_columns": ("always_kept", "random")}
"""What there is: a gather of each group's own rows; leading columns that a selection always keeps, and random
ones on top."""
MUTATED = {"scatter_columns": ("out",), "sparse_mlp": ("activation_cache", "output_cache")}
"""Inputs that an operation writes in place, restored before every sample."""


@dataclass(frozen=True, eq=False)
class Case:
    """One call's inputs.

    Attributes:
        problem: what they were made for.
        inputs: name → value, in the order of the backend functions, settings left out.
        pristine: copies of the inputs that the operation mutates.
        options: how it is called.
    """

    problem: Problem
    inputs: dict[str, Any]
    pristine: dict[str, Tensor] = field(default_factory=dict)
    options: Options = ()

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return next(value.device for value in self.inputs.values() if isinstance(value, Tensor))

    def reset(self) -> None:
        """Restore what the last call wrote: without it an MLP's second call has a delta of only zeros."""
        for name, value in self.pristine.items():
            self.inputs[name].copy_(value)

    def run(self, kernel: Kernel, settings: LaunchSettings) -> dict[str, Tensor]:
        """Call the kernel and name what it gives or writes."""
        result = kernel.run(*self.inputs.values(), settings)
        return named_outputs(self.problem.operation, result, self.inputs)


@dataclass(eq=False)
class KernelWork:
    """A candidate on a case, as a timer takes it."""

    case: Case
    kernel: Kernel
    settings: LaunchSettings

    def reset(self) -> None:
        self.case.reset()

    def call(self) -> Any:
        return self.kernel.run(*self.case.inputs.values(), self.settings)


def named_outputs(operation: str, result: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What a backend function returned or wrote in place, by name."""
    if operation in MUTATED:
        return {name: inputs[name] for name in MUTATED[operation]}
    names = {
        "dense_attention": ("out", "lse"),
        "colsum_attention": ("out", "lse", "mass"),
        "sparse_attention": ("out", "lse"),
        "topk_columns": ("indices", "counts"),
        "gather_columns": ("packed",),
        "group_mean": ("means",),
    }[operation]
    values = result if isinstance(result, (tuple, list)) else (result,)
    return dict(zip(names, values, strict=True))


def make_case(
    problem: Problem, device: torch.device | str, seed: int, *, ragged: bool = False, options: Options = ()
) -> Case:
    """Inputs of `problem` on `device`. The same seed gives the same inputs on the same kind of device.

    `ragged` varies the counts from group to group, with one empty and one full group, as verification wants;
    otherwise every group keeps the problem's density, as timing wants. A ragged selection also has
    a few always-kept columns and random extras whatever its `options`.
    """
    draw = _Draw(problem, torch.device(device), seed, ragged, dict(options))
    inputs = _MAKERS[problem.operation](problem, draw)
    mutated = MUTATED.get(problem.operation, ())
    return Case(problem, inputs, {name: inputs[name].clone() for name in mutated}, options)


def scattered_columns(
    problem: Problem, device: torch.device, generator: torch.Generator, *, ragged: bool = False
) -> ColumnSet:
    """Columns scattered over the whole width: one from each of as many strata as are kept, by chance.

    Strata keep it ascending and distinct without sorting a permutation per group. With `ragged`, counts run
    from none to all, and strata follow each group's own count.
    """
    shape = (problem.batch, problem.heads, group_count(problem.rows, problem.group_size))
    kept = problem.kept_columns
    counts = torch.full(shape, kept, dtype=torch.int32, device=device)
    if ragged and counts.numel() > 1:
        high = min(problem.columns, 2 * kept)
        counts = torch.randint(1, high + 1, shape, generator=generator, device=device, dtype=torch.int32)
        counts.view(-1)[0], counts.view(-1)[-1] = 0, problem.columns
    indices = torch.empty(*shape, int(counts.max()), dtype=torch.int32, device=device)
    # Head by head: the 64-bit intermediates of all heads at once would take 50 GB at HunyuanVideo size.
    for plane, own in zip(indices.flatten(0, 1), counts.flatten(0, 1), strict=True):
        plane.copy_(_one_of_each_stratum(own, plane.shape[-1], problem.columns, generator))
    return ColumnSet(indices, counts, problem.group_size)


def _one_of_each_stratum(counts: Tensor, capacity: int, columns: int, generator: torch.Generator) -> Tensor:
    """`(G, capacity)`: row g takes one column of each of its `counts[g]` strata, then any valid ones."""
    slots = torch.arange(capacity, device=counts.device)
    strata = counts.clamp(min=1).unsqueeze(-1)
    start, stop = (slots * columns) // strata, ((slots + 1) * columns) // strata
    jitter = torch.rand(len(counts), capacity, generator=generator, device=counts.device)
    return torch.minimum(start + (jitter * (stop - start)).long(), stop - 1) % columns


class _Draw:
    """Random tensors for one case, all from one generator on the device."""

    def __init__(
        self, problem: Problem, device: torch.device, seed: int, ragged: bool, options: dict[str, int]
    ) -> None:
        self._problem, self._device, self.ragged, self.options = problem, device, ragged, options
        self._generator = torch.Generator(device).manual_seed(seed)
        self._dtype = getattr(torch, problem.dtype)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self._dtype
        value = torch.randn(shape, generator=self._generator, device=self._device, dtype=dtype)
        return value.mul_(scale) if scale != 1.0 else value

    def columns(self) -> ColumnSet:
        return scattered_columns(self._problem, self._device, self._generator, ragged=self.ragged)


def _qkv(problem: Problem, draw: _Draw) -> dict[str, Any]:
    q = draw.normal(problem.batch, problem.heads, problem.rows, problem.width)
    k = draw.normal(problem.batch, problem.heads, problem.columns, problem.width)
    v = draw.normal(problem.batch, problem.heads, problem.columns, problem.width)
    return {"q": q, "k": k, "v": v}


def _dense_attention(problem: Problem, draw: _Draw) -> dict[str, Any]:
    return {**_qkv(problem, draw), "key_length": None, "scale": problem.width**-0.5}


def _colsum_attention(problem: Problem, draw: _Draw) -> dict[str, Any]:
    # Normal q and k give normal logits, whose log-sum-exp is log(columns) + 1/2; a step before it was near.
    lse = draw.normal(problem.batch, problem.heads, problem.rows, scale=0.1, dtype=torch.float32)
    return {
        **_qkv(problem, draw),
        "lse_prev": lse + math.log(problem.columns) + 0.5,
        "group_size": problem.group_size,
        "key_length": None,
        "scale": problem.width**-0.5,
    }


def _sparse_attention(problem: Problem, draw: _Draw) -> dict[str, Any]:
    qkv = _qkv(problem, draw)
    base = draw.normal(*qkv["q"].shape, scale=0.1)
    return {**qkv, "columns": draw.columns(), "base": base, "sign": 1, "scale": problem.width**-0.5}


def _topk_columns(problem: Problem, draw: _Draw) -> dict[str, Any]:
    scores = draw.normal(problem.batch, problem.heads, problem.groups, problem.columns)
    wanted = {"always_kept": 5, "random": 3 if problem.columns > 8 else 0} if draw.ragged else draw.options
    # At most an eighth each, so that the same problem made small still chooses by score.
    most = max(5, problem.columns // 8)
    always_kept = min(wanted.get("always_kept", 0), most, problem.columns)
    random = min(wanted.get("random", 0), most, problem.columns - always_kept)
    k = min(problem.kept_columns, problem.columns - always_kept - random)
    always = None
    if always_kept:
        always = torch.zeros(problem.groups, problem.columns, dtype=torch.bool, device=scores.device)
        always[:, :always_kept] = True
    return {
        "scores": scores,
        "k": k,
        "always": always,
        "random": random,
        "seed": 7,
        "key_length": problem.columns,
        "capacity": always_kept + k + random,
    }


def _gather_columns(problem: Problem, draw: _Draw) -> dict[str, Any]:
    per_group = bool(draw.options.get("per_group"))
    width = problem.rows if per_group else problem.width
    x = draw.normal(problem.batch, problem.heads, problem.columns, width)
    return {"x": x, "columns": draw.columns(), "per_group": per_group}


def _scatter_columns(problem: Problem, draw: _Draw) -> dict[str, Any]:
    columns = draw.columns()
    packed = draw.normal(*columns.indices.shape, problem.group_size)
    out = draw.normal(problem.batch, problem.heads, problem.columns, problem.rows)
    return {"packed": packed, "columns": columns, "out": out, "accumulate": False}


def _sparse_mlp(problem: Problem, draw: _Draw) -> dict[str, Any]:
    tokens, neurons, width = problem.rows, problem.columns, problem.width
    return {
        "x": draw.normal(problem.batch, tokens, width),
        "w1": draw.normal(neurons, width, scale=width**-0.5),
        "b1": draw.normal(neurons, scale=0.1),
        "w2_by_neuron": draw.normal(neurons, width, scale=neurons**-0.5),
        "columns": draw.columns(),
        "activation_cache": draw.normal(problem.batch, neurons, tokens, scale=0.3),
        "output_cache": draw.normal(problem.batch, tokens, width),
        "activation": ACTIVATION,
    }


def _group_mean(problem: Problem, draw: _Draw) -> dict[str, Any]:
    return {"x": draw.normal(problem.batch, problem.rows, problem.width), "group_size": problem.group_size}


_MAKERS: dict[str, Callable[[Problem, _Draw], dict[str, Any]]] = {
    "dense_attention": _dense_attention,
    "colsum_attention": _colsum_attention,
    "sparse_attention": _sparse_attention,
    "topk_columns": _topk_columns,
    "gather_columns": _gather_columns,
    "scatter_columns": _scatter_columns,
    "sparse_mlp": _sparse_mlp,
    "group_mean": _group_mean,
}

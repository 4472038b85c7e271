"""What a candidate is compared with, and how fast the hardware could be.

The baseline is the dense PyTorch computation that a model would otherwise run, on the same inputs; its name
goes into the evidence. `work_of` counts the arithmetic and the compulsory memory traffic of a problem, for
the share of the ideal time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from chipmunk_kernels.problem import Problem
from tuner.problem import Case, Options

ATTENTION = ("dense_attention", "colsum_attention", "sparse_attention")
COMPILED = (*ATTENTION, "sparse_mlp")
"""Operations with a dense baseline that torch.compile makes."""
CROSSED = ("sparse_attention", "sparse_mlp")
"""Operations whose time grows with density until the dense baseline is the faster."""


@dataclass(eq=False)
class Baseline:
    """A dense computation as a timer takes it; `name` says what it is."""

    name: str
    function: Callable[[], Any]

    def reset(self) -> None:
        """Nothing to restore: a baseline writes only what it allocated."""

    def call(self) -> Any:
        return self.function()


@dataclass
class Survey:
    """The dense computations that run on a case.

    Attributes:
        found: those that do, at least one.
        failed: name → why, of those that do not.
    """

    found: list[Baseline] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def baselines(case: Case, only: str | None = None) -> list[Baseline]:
    """The dense library calls worth timing for a case, or the one named `only`; the fastest is the baseline.
    Never empty."""
    return survey(case, only=only).found


def survey(case: Case, *, compiled: bool = False, only: str | None = None) -> Survey:
    """Every dense computation that could be the fastest, each run once: what cannot run here is named.

    Args:
        case: the inputs.
        compiled: on CUDA also what torch.compile makes: FlexAttention, and the MLP with its activation fused.
            Seconds of compiling for each shape; on an H200 they were 0.7 and 1.0 times as fast as the
            libraries, so a search does without.
        only: the name of the one to run, where an earlier survey of this shape found the fastest.
    """
    if case.device.type != "cuda":
        return Survey([_plain(case)])
    result = Survey()
    candidates = [*_libraries(case), *(_compiled(case) if compiled else [])]
    for candidate in [each for each in candidates if only in (None, each.name)]:
        reason = _why_not(candidate)
        if reason is None:
            result.found.append(candidate)
        else:
            result.failed[candidate.name] = reason
    return result if result.found else Survey([_plain(case)], result.failed)


def _plain(case: Case) -> Baseline:
    """What a model would call: of attention, whichever library PyTorch chooses."""
    if case.problem.operation not in ATTENTION:
        return _SINGLE[case.problem.operation](case)
    q, k, v = (case.inputs[name] for name in "qkv")
    return Baseline("F.scaled_dot_product_attention", lambda: F.scaled_dot_product_attention(q, k, v))


def _libraries(case: Case) -> list[Baseline]:
    """Of attention every library by itself: PyTorch's choice is not always the fastest."""
    if case.problem.operation not in ATTENTION:
        return [_plain(case)]
    q, k, v = (case.inputs[name] for name in "qkv")
    return [
        Baseline(f"F.scaled_dot_product_attention ({label})", _sdpa_with(backend, q, k, v))
        for label, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION))
    ]


def _compiled(case: Case) -> list[Baseline]:
    if case.problem.operation in ATTENTION:
        return [_flex_attention(case)]
    if case.problem.operation == "sparse_mlp":
        eager = _mlp(case)
        return [Baseline(f"torch.compile of {eager.name}", _compile(eager.function))]
    return []


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # Static shapes are what a model compiles to; a fallback to eager would be another baseline's time.
    return torch.compile(function, fullgraph=True, dynamic=False)


def _sdpa_with(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def _flex_attention(case: Case) -> Baseline:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (case.inputs[name] for name in "qkv")
    return Baseline("FlexAttention", functools.partial(_compile(flex_attention), q, k, v))


def _why_not(candidate: Baseline) -> str | None:
    """Why a baseline cannot run, or None. A compiler may raise anything: no baseline may end a run."""
    try:
        candidate.call()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:300]
    return None


def _mlp(case: Case) -> Baseline:
    x, w1, b1 = (case.inputs[name] for name in ("x", "w1", "b1"))
    w2 = case.inputs["w2_by_neuron"].t().contiguous()

    def call() -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2)

    return Baseline("F.linear, F.gelu(tanh), F.linear", call)


def _topk(case: Case) -> Baseline:
    scores, k = case.inputs["scores"], case.inputs["k"]
    return Baseline("torch.topk (sorted)", lambda: torch.topk(scores, k, dim=-1, sorted=True))


def _gather(case: Case) -> Baseline:
    x, columns = case.inputs["x"], case.inputs["columns"]
    if case.inputs["per_group"]:
        ragged = columns.groups * columns.group_size - x.shape[3]
        table = F.pad(x, (0, ragged)).unflatten(3, (columns.groups, columns.group_size)).transpose(2, 3)
    else:
        table = x.unsqueeze(2).expand(-1, -1, columns.groups, -1, -1)
    index = columns.indices.long().unsqueeze(-1).expand(*columns.indices.shape, table.shape[-1])
    return Baseline("torch.gather", lambda: torch.gather(table, 3, index))


def _scatter(case: Case) -> Baseline:
    packed, columns, out = (case.inputs[name] for name in ("packed", "columns", "out"))
    batch, heads, width, _ = out.shape
    groups, group_size = columns.groups, columns.group_size
    # A ragged last group needs room for whole groups; the operation itself stops at the last row.
    buffer = torch.zeros(batch, heads, width, groups, group_size, dtype=out.dtype, device=out.device)
    by_group = buffer.permute(0, 1, 3, 2, 4)
    index = columns.indices.long().unsqueeze(-1).expand(packed.shape)
    return Baseline("Tensor.scatter_", lambda: by_group.scatter_(3, index, packed))


def _group_mean(case: Case) -> Baseline:
    x, group_size = case.inputs["x"], case.inputs["group_size"]
    whole = x.shape[1] // group_size * group_size
    grouped = x[:, :whole].unflatten(1, (-1, group_size)) if whole else None
    rest = x[:, whole:]

    def call() -> list[Tensor]:
        means = [grouped.mean(2)] if grouped is not None else []
        return [*means, rest.mean(1)] if rest.shape[1] else means

    return Baseline("Tensor.mean", call)


_SINGLE: dict[str, Callable[[Case], Baseline]] = {
    "topk_columns": _topk,
    "gather_columns": _gather,
    "scatter_columns": _scatter,
    "sparse_mlp": _mlp,
    "group_mean": _group_mean,
}


@dataclass(frozen=True)
class Work:
    """Arithmetic and compulsory memory traffic of one call."""

    flops: float
    bytes: float

    def ideal_ms(self, peak_tflops: float, bandwidth_gbs: float) -> float:
        """The roofline: the longer of computing and moving at the measured ceilings."""
        return max(self.flops / (peak_tflops * 1e9), self.bytes / (bandwidth_gbs * 1e6))


def work_of(problem: Problem, options: Options = ()) -> Work:
    """Operations on matrix units, and each input read and output written once; gathered columns once per use
    only where they are written out packed, or where each group has its own."""
    size = getattr(torch, problem.dtype).itemsize
    planes = problem.batch * problem.heads
    slots = planes * problem.groups * problem.kept_columns
    rows, columns = planes * problem.rows * problem.width, planes * problem.columns * problem.width
    touched = min(problem.columns, problem.groups * problem.kept_columns) * planes
    if problem.operation == "sparse_attention":
        flops = 4.0 * planes * problem.rows * problem.kept_columns * problem.width
        return Work(flops, size * (3 * rows + 2 * touched * problem.width) + 4 * slots)
    if problem.operation in ATTENTION:
        mass = 4 * planes * problem.groups * problem.columns if problem.operation == "colsum_attention" else 0
        flops = 4.0 * planes * problem.rows * problem.columns * problem.width
        return Work(flops, size * 2 * (rows + columns) + mass)
    if problem.operation == "sparse_mlp":
        flops = 4.0 * problem.batch * problem.rows * problem.kept_columns * problem.width
        cache = 2 * slots * problem.group_size
        return Work(flops, size * (3 * rows + cache + 2 * touched * problem.width) + 4 * slots)
    if problem.operation == "topk_columns":
        return Work(0.0, size * planes * problem.groups * problem.columns + 4 * slots)
    if problem.operation == "gather_columns" and dict(options).get("per_group"):
        return Work(0.0, size * 2 * slots * problem.group_size + 4 * slots)
    if problem.operation == "gather_columns":
        return Work(0.0, size * (touched + slots) * problem.width + 4 * slots)
    if problem.operation == "scatter_columns":
        return Work(0.0, size * 2 * slots * problem.group_size + 4 * slots)
    return Work(0.0, size * (rows + planes * problem.groups * problem.width))

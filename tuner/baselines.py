"""What a candidate is compared with, and how fast the hardware could be.

The baseline is the dense PyTorch computation that a model would otherwise run, on the same inputs; its name
goes into the evidence. `work_of` counts the arithmetic and the compulsory memory traffic of a problem, for
the share of the ideal time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from chipmunk_kernels.problem import Problem
from tuner.problem import Case

ATTENTION = ("dense_attention", "colsum_attention", "sparse_attention")
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


def baselines(case: Case) -> list[Baseline]:
    """The dense computations worth timing for a case; the fastest is the baseline. Never empty."""
    operation = case.problem.operation
    return _attention(case) if operation in ATTENTION else [_SINGLE[operation](case)]


def _attention(case: Case) -> list[Baseline]:
    """On CUDA each library that can serve these inputs; elsewhere what PyTorch chooses."""
    q, k, v = (case.inputs[name] for name in "qkv")
    plain = Baseline("F.scaled_dot_product_attention", lambda: F.scaled_dot_product_attention(q, k, v))
    if q.device.type != "cuda":
        return [plain]
    served = []
    for label, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        candidate = Baseline(f"F.scaled_dot_product_attention ({label})", _sdpa_with(backend, q, k, v))
        if _works(candidate):
            served.append(candidate)
    return served or [plain]


def _sdpa_with(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def _works(candidate: Baseline) -> bool:
    try:
        candidate.call()
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


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
    index = columns.indices.long().unsqueeze(-1).expand(*columns.indices.shape, x.shape[-1])
    table = x.unsqueeze(2).expand(-1, -1, columns.groups, -1, -1)
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


def work_of(problem: Problem) -> Work:
    """Operations on matrix units, and each input read and output written once; gathered columns once per use
    only where they are written out packed."""
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
    if problem.operation == "gather_columns":
        return Work(0.0, size * (touched + slots) * problem.width + 4 * slots)
    if problem.operation == "scatter_columns":
        return Work(0.0, size * 2 * slots * problem.group_size + 4 * slots)
    return Work(0.0, size * (rows + planes * problem.groups * problem.width))

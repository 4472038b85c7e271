"""Is a candidate right? A gate that every candidate passes before it is timed.

The truth is `reference/` in float64; the budget is twice the error of the same reference computed in the
kernel's own dtype, plus a rounding band. Two cases are checked, on fresh random inputs and with uninitialised
memory filled with NaN (integers: the largest value):

- a small problem of the same structure (dtype, width, group size) whose groups keep from no column to all of
  them, compared everywhere: dropping one column shows where few are kept;
- the very problem at full size, with sampled groups compared (first, last and ragged, two by chance), since a
  float64 reference of all of it would cost minutes. Every output value must be finite there.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from chipmunk_kernels.columns import ColumnSet, group_count
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings
from reference import attention, gather, group_mean, mlp, select
from tuner.problem import Case, Options, make_case

Outputs = dict[str, Tensor]
Place = tuple[int, int, int]
EXACT = ("topk_columns", "gather_columns", "scatter_columns")
"""Operations that only choose or move: not one bit may differ."""
FLOAT32_UNITS = 16
"""Of rounding for float32: PyTorch's attention on a CPU takes exponentials that are good to 20."""


@dataclass(frozen=True)
class Check:
    """The outcome of a verification: the worst output by error over budget, and where it was.

    Attributes:
        error: largest absolute difference from the float64 truth.
        budget: what was allowed.
        where: which output of which case.
        reason: why it failed for another cause than the error, or None.
        seconds: that building and verifying took, where somebody counted.
    """

    error: float
    budget: float
    where: str
    reason: str | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.reason is None and self.error <= self.budget

    def explain(self) -> str:
        return self.reason or f"{self.where}: error {self.error:.3e}, budget {self.budget:.3e}"


def verify(
    kernel: Kernel,
    settings: LaunchSettings,
    problem: Problem,
    device: torch.device,
    seed: int,
    options: Options = (),
) -> Check:
    """Run both cases. Whatever the kernel raises goes to the caller."""
    small = verify_small(kernel, settings, problem, device, seed, options)
    if not small.ok:
        return small
    case = make_case(problem, device, seed + 1, options=options)
    return worst([small, Sampled(case, seed + 1).check(kernel, settings)])


def shrunken(problem: Problem) -> Problem:
    """The same structure at a size whose reference takes milliseconds: three groups, the last one ragged."""
    group = compared_rows(problem)
    return replace(
        problem,
        batch=min(2, problem.batch + 1),
        heads=min(2, problem.heads),
        rows=min(problem.rows, 2 * group + max(1, group // 3)),
        columns=min(problem.columns, 611),
        density=min(1.0, max(problem.density, 0.02)) if problem.columns > 611 else problem.density,
    )


def compared_rows(problem: Problem) -> int:
    """Rows compared together: a group, or a tile of rows where a problem has no groups."""
    return problem.group_size if problem.group_size > 1 else 128


def verify_small(
    kernel: Kernel,
    settings: LaunchSettings,
    problem: Problem,
    device: torch.device,
    seed: int,
    options: Options = (),
) -> Check:
    """The small case alone, compared everywhere."""
    problem = shrunken(problem)
    case = make_case(problem, device, seed, ragged=True, options=options)
    truth, peer = _expected_small(problem, str(device), seed, options)
    with PoisonedMemory():
        outputs = _comparable(case, case.run(kernel, settings))
    synchronize(device)
    return _compare(outputs, truth, peer, problem, "small case")


@functools.lru_cache(maxsize=16)
def _expected_small(
    problem: Problem, device: str, seed: int, options: Options = ()
) -> tuple[Outputs, Outputs]:
    """Truth and peer, shared by every candidate of a problem: they depend on inputs alone."""
    case = make_case(problem, torch.device(device), seed, ragged=True, options=options)
    return _truth_and_peer(problem.operation, case.inputs)


class Sampled:
    """A case at full size, of which some groups are compared. Candidates share the truth of each.

    Args:
        case: the inputs.
        seed: of the choice of groups.
    """

    def __init__(self, case: Case, seed: int) -> None:
        self._case = case
        self._places = _places(case.problem, seed)
        self._expected: dict[Place, tuple[Outputs, Outputs]] = {}

    def check(self, kernel: Kernel, settings: LaunchSettings) -> Check:
        """Run the kernel on poisoned outputs and compare. Whatever it raises goes to the caller."""
        case, problem = self._case, self._case.problem
        case.reset()
        with PoisonedMemory():
            outputs = case.run(kernel, settings)
        synchronize(case.device)
        broken = _unsound(case, outputs)
        if broken is not None:
            return Check(math.inf, 0.0, "full size", f"full size: {broken}")
        checks = []
        for place in self._places:
            truth, peer = self._expected_at(place)
            part = {name: _sliced(name, value, place, case) for name, value in outputs.items()}
            checks.append(
                _compare(_comparable(case, part), truth, peer, problem, f"full size, group {place}")
            )
        return worst(checks)

    def _expected_at(self, place: Place) -> tuple[Outputs, Outputs]:
        if place not in self._expected:
            case = self._case
            inputs = {name: _sliced(name, value, place, case) for name, value in _before(case).items()}
            if case.problem.operation == "topk_columns":
                inputs["place"] = place
            self._expected[place] = _truth_and_peer(case.problem.operation, inputs)
        return self._expected[place]


def _places(problem: Problem, seed: int) -> list[Place]:
    """(b, h, g): the first, the last (ragged) one, and two more."""
    chance = random.Random(seed)
    extents = (problem.batch, problem.heads, group_count(problem.rows, compared_rows(problem)))
    drawn = [tuple(chance.randrange(extent) for extent in extents) for _ in range(2)]
    corners = [(0, 0, 0), tuple(extent - 1 for extent in extents)]
    return [(b, h, g) for b, h, g in dict.fromkeys([*corners, *drawn])]


def _before(case: Case) -> dict[str, Any]:
    """The inputs as they were before the kernel wrote into some of them."""
    return {**case.inputs, **case.pristine}


def _sliced(name: str, value: Any, place: Place, case: Case) -> Any:
    """One group's part of an input or output, keeping every dimension."""
    slices = _slices(name, place, case)
    if isinstance(value, ColumnSet):
        return ColumnSet(
            value.indices[slices].contiguous(), value.counts[slices].contiguous(), value.group_size
        )
    return value[slices] if isinstance(value, Tensor) and slices else value


def _slices(name: str, place: Place, case: Case) -> tuple[slice, ...]:
    problem = case.problem
    b, h, g = (slice(i, i + 1) for i in place)
    size = compared_rows(problem)
    rows = slice(place[2] * size, min((place[2] + 1) * size, problem.rows))
    every = slice(None)
    if name in ("columns", "scores", "indices", "counts", "packed", "mass"):
        return b, h, g
    if (name, problem.operation) == ("x", "gather_columns"):
        return (b, h, every, rows) if case.inputs["per_group"] else (b, h)
    if name in ("k", "v"):
        return b, h
    if name in ("q", "base", "lse", "lse_prev") or (name == "out" and problem.operation != "scatter_columns"):
        return b, h, rows
    if name == "out":
        return b, h, every, rows
    if name in ("x", "output_cache"):
        return b, rows
    if name == "activation_cache":
        return b, every, rows
    if name == "means":
        return b, g
    return ()


def _truth_and_peer(operation: str, inputs: Mapping[str, Any]) -> tuple[Outputs, Outputs]:
    """The reference in float64 and in the kernel's dtype. Where no bit may differ there is no need of a peer,
    and the reference, which walks column by column, is quicker beside the interpreter than on a GPU."""
    if operation in EXACT:
        return _reference(operation, _on_cpu(inputs)), {}
    return _reference(operation, _as_float64(inputs)), _reference(operation, inputs)


def _reference(operation: str, inputs: Mapping[str, Any]) -> Outputs:
    """The reference's outputs, named as `named_outputs` names a kernel's."""
    i = dict(inputs)
    columns = i.pop("columns", None)
    chosen = {} if columns is None else _parts(columns)
    if operation == "dense_attention":
        out, lse = attention.dense_attention(**i)
        return {"out": out, "lse": lse}
    if operation == "colsum_attention":
        out, lse, mass = attention.colsum_attention(**i)
        return {"out": out, "lse": lse, "mass": mass}
    if operation == "sparse_attention":
        out, lse = attention.sparse_attention(**i, **chosen)
        return {"out": out, "lse": lse}
    if operation == "topk_columns":
        return {"kept": _topk_mask(i)}
    if operation == "gather_columns":
        return {"packed": gather.gather_columns(**i, **chosen)}
    if operation == "scatter_columns":
        return {"out": gather.scatter_columns(**i, **chosen)}
    if operation == "sparse_mlp":
        cache, out = mlp.sparse_mlp(**i, **chosen)
        return {"activation_cache": cache, "output_cache": out}
    return {"means": group_mean.group_mean(i["x"], i["group_size"])}


def _parts(columns: ColumnSet) -> dict[str, Any]:
    return {"indices": columns.indices, "counts": columns.counts, "group_size": columns.group_size}


def _topk_mask(inputs: dict[str, Any]) -> Tensor:
    """The reference's selection, for always-kept columns that lead the row, as cases have them.

    The draw of extras depends on where a group stands: with a `place`, scores are that one group's.
    """
    scores, always, place = inputs["scores"], inputs["always"], inputs.get("place")
    indices, counts = select.topk_columns(
        scores,
        inputs["k"],
        group_size=1,
        keep=[] if always is None else [(0, int(always[0].sum()))],
        random=0 if place else inputs["random"],
        seed=inputs["seed"],
        key_length=inputs["key_length"],
    )
    kept = _mask(indices, counts, scores.shape[-1])
    if place and inputs["random"]:
        b, h, g = place
        rest = (~kept[0, 0, 0, : inputs["key_length"]]).nonzero()[:, 0].tolist()
        hashes = {n: select.extras_hash(inputs["seed"], b, h, g, n) for n in rest}
        kept[0, 0, 0, sorted(rest, key=lambda n: (-hashes[n], n))[: inputs["random"]]] = True
    return kept


def _comparable(case: Case, outputs: Outputs) -> Outputs:
    """Outputs as the reference gives them: a selection as a mask, for its padding slots may hold anything."""
    if case.problem.operation == "topk_columns":
        return {"kept": _mask(outputs["indices"], outputs["counts"], case.problem.columns)}
    return outputs


def _mask(indices: Tensor, counts: Tensor, columns: int) -> Tensor:
    return ColumnSet(indices.to(torch.int32), counts.to(torch.int32), 1).to_mask(columns)


def _unsound(case: Case, outputs: Outputs) -> str | None:
    """What is wrong with a full-size output that sampled groups might miss, or None."""
    if case.problem.operation == "topk_columns":
        found = ColumnSet(outputs["indices"], outputs["counts"], case.problem.group_size)
        try:
            found.validate(case.problem.rows, case.problem.columns)
        except ValueError as error:
            return str(error)
        return None
    for name, value in outputs.items():
        bad = ~torch.isfinite(value)
        if name == "lse" and "columns" in case.inputs:  # a group without columns has -inf there
            bad &= ~_of_empty_groups(case)
        if bool(bad.any()):
            return f"{name}: {int(bad.sum())} values are not finite"
    return None


def _of_empty_groups(case: Case) -> Tensor:
    """Bool `(B, H, rows)`: which rows belong to a group that keeps nothing."""
    columns = case.inputs["columns"]
    return (columns.counts == 0).repeat_interleave(columns.group_size, dim=2)[:, :, : case.problem.rows]


def _compare(outputs: Outputs, truth: Outputs, peer: Outputs, problem: Problem, case_name: str) -> Check:
    checks = []
    for name, expected in truth.items():
        where = f"{case_name}, {name}"
        if outputs[name].shape != expected.shape:
            got, wanted = tuple(outputs[name].shape), tuple(expected.shape)
            return Check(math.inf, 0.0, where, f"{where}: expected shape {wanted}, got {got}")
        exact = problem.operation in EXACT
        budget = 0.0 if exact else error_budget(peer[name], expected, outputs[name].dtype)
        checks.append(Check(max_error(outputs[name], expected), budget, where))
    return worst(checks)


def max_error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinite where only one is finite, or infinities differ."""
    actual, truth = actual.double(), truth.to(actual.device).double()
    difference = torch.where(actual == truth, 0.0, (actual - truth).abs()).nan_to_num(nan=math.inf)
    return float(difference.max()) if difference.numel() else 0.0


def error_budget(peer: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """2 × (error of the peer in the kernel's dtype + rounding of the largest value in the output's `dtype`).

    Every kernel gives its log-sum-exp in float32: the rounding band of bfloat16 would hide an error of 2 %.
    """
    largest = float(truth.where(torch.isfinite(truth), 0.0).abs().max()) if truth.numel() else 0.0
    units = FLOAT32_UNITS if dtype == torch.float32 else 1
    return 2.0 * (max_error(peer, truth) + units * torch.finfo(dtype).eps * largest)


def worst(checks: list[Check]) -> Check:
    """The check with the largest error over budget; of those that failed, if any did."""
    failed = [check for check in checks if not check.ok]
    return max(
        failed or checks, key=lambda check: check.error / check.budget if check.budget else check.error
    )


def _on_cpu(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.to("cpu") if isinstance(value, (Tensor, ColumnSet)) else value
        for name, value in inputs.items()
    }


def _as_float64(inputs: Mapping[str, Any]) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: convert(value) for name, value in inputs.items()}


def synchronize(device: torch.device) -> None:
    """A kernel that failed says so at the next synchronisation: make that here, not in somebody else's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PoisonedMemory(TorchFunctionMode):
    """Fill what `torch.empty` and its kin hand out with NaN (integers: the largest value).

    What a kernel never writes then shows. A mode rather than PyTorch's own switch, which comes with
    deterministic algorithms: the kernel would not be the one that is timed.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _UNINITIALISED:
            return result
        return result.fill_(math.nan if result.is_floating_point() else _largest(result.dtype))


_UNINITIALISED = (
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    Tensor.new_empty,
    Tensor.new_empty_strided,
)


def _largest(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max

"""Workloads: named lists of the problems that a real model produces, read from `suites/workloads/*.yaml`.

Beside its shapes a problem may carry `options`, how the operation is called where shapes do not say it, and a
`bar`, what a kernel has to reach there.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chipmunk_kernels.problem import OPERATIONS, Problem
from chipmunk_kernels.registry import BACKENDS
from tuner.problem import OPTIONS, Options

FOLDER = Path(__file__).resolve().parent.parent / "suites" / "workloads"


class WorkloadError(ValueError):
    """A workload or operation that there is not, or a workload file that cannot be used."""


MEASURES = {"speedup": "at least", "time_of_dense": "at most", "share_of_copy": "at least"}
"""What a bar can be set on: dense time over kernel time, kernel time over dense time, and the time of a plain
copy that moves the compulsory bytes over kernel time."""


@dataclass(frozen=True)
class Bar:
    """What a kernel has to reach on a problem.

    Attributes:
        measure: one of `MEASURES`.
        value: at least or at most, as the measure has it.
        backend: whose kernel has to; None for whichever is best.
        dense: label of the problem whose dense baseline counts; None for the problem's own.
        also: labels of problems where it may be reached instead: the same shapes in another group size.
    """

    measure: str
    value: float
    backend: str | None = None
    dense: str | None = None
    also: tuple[str, ...] = ()

    def met_by(self, value: float) -> bool:
        """Whether a measured value reaches the bar."""
        return value >= self.value if MEASURES[self.measure] == "at least" else value <= self.value


@dataclass(frozen=True)
class LabelledProblem:
    """A problem and how people call it.

    Attributes:
        label: its name in tables.
        problem: its shapes.
        options: how it is called, as `tuner.problem.make_case` takes them.
        bars: what has to be reached, often nothing.
    """

    label: str
    problem: Problem
    options: Options = ()
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class Workload:
    """A named list of problems.

    Attributes:
        name: the file's stem.
        description: one line: which model, at which size.
        problems: with a label each.
        policies: names of the built-in policies that belong to the model; a profile carries them.
        limits: (`extra_mib` or `launch_us`, the most that any kernel may take): memory of a call beyond its
            results and column list, and host time of a launch.
    """

    name: str
    description: str
    problems: tuple[LabelledProblem, ...]
    policies: tuple[str, ...] = ()
    limits: tuple[tuple[str, float], ...] = ()

    def select(self, operations: Iterable[str]) -> tuple[LabelledProblem, ...]:
        """The problems of these operations; of all if none is named. Raises WorkloadError if unknown."""
        wanted = list(operations)
        for operation in wanted:
            if operation not in OPERATIONS:
                raise WorkloadError(unknown("operation", operation, OPERATIONS))
        found = tuple(item for item in self.problems if not wanted or item.problem.operation in wanted)
        if not found:
            has = ", ".join(sorted({item.problem.operation for item in self.problems}))
            raise WorkloadError(f"workload {self.name} has no problem of {', '.join(wanted)}; it has {has}")
        return found


def names() -> list[str]:
    """Every workload there is."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_workload(name: str, native_dtype: str = "bfloat16") -> Workload:
    """A workload by name, or by the path of a YAML file. `dtype: auto` in it means `native_dtype`.

    Raises:
        WorkloadError: no such workload (the nearest name is suggested), or a file that cannot be used.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise WorkloadError(unknown("workload", name, names()))
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _workload(path.stem, document, native_dtype)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise WorkloadError(f"{path}: not a usable workload: {error}") from error


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that there is not, with the nearest one that there is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    suggestion = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{suggestion} (there are: {', '.join(known)})"


def _workload(name: str, document: dict, native_dtype: str) -> Workload:
    if not isinstance(document, dict) or not document.get("problems"):
        raise ValueError("expected a mapping with a list 'problems'")
    problems = tuple(_problem(item, native_dtype) for item in document["problems"])
    labels = {item.label for item in problems}
    for bar in (bar for item in problems for bar in item.bars):
        for label in ({bar.dense} | set(bar.also)) - {None} - labels:
            raise ValueError(f"bar: no problem is labelled {label!r}")
    limits = {str(key): float(value) for key, value in (document.get("limits") or {}).items()}
    if not set(limits) <= {"extra_mib", "launch_us"}:
        raise ValueError(f"limits: expected extra_mib and launch_us, got {sorted(limits)}")
    return Workload(
        document.get("name", name),
        " ".join(str(document.get("description", "")).split()),
        problems,
        tuple(document.get("policies") or ()),
        tuple(limits.items()),
    )


def _problem(item: dict, native_dtype: str) -> LabelledProblem:
    fields = dict(item)
    label, bar = fields.pop("label", None), fields.pop("bar", None)
    options = dict(fields.pop("options", None) or {})
    if fields.get("dtype") == "auto":
        fields["dtype"] = native_dtype
    problem = Problem.from_mapping(fields)
    known = OPTIONS.get(problem.operation, ())
    if not set(options) <= set(known):
        raise ValueError(f"options: expected among {list(known)} for {problem.operation}, got {options}")
    return LabelledProblem(label or problem.key, problem, tuple(sorted(options.items())), _bars(bar))


def _bars(values: dict[str, Any] | None) -> tuple[Bar, ...]:
    """`{speedup: 4.0}`, `{speedup: {triton: 10.8}}`, `{time_of_dense: 0.03, dense: LABEL}` or
    `{speedup: 4.0, also: [LABEL]}`."""
    fields = dict(values or {})
    dense, also = fields.pop("dense", None), fields.pop("also", None) or []
    if not isinstance(also, list):
        raise ValueError(f"bar: also: expected a list of labels, got {also!r}")
    bars = []
    for measure, value in fields.items():
        if measure not in MEASURES:
            raise ValueError(f"bar: expected one of {', '.join(MEASURES)}; got {measure!r}")
        by_backend = value if isinstance(value, dict) else {None: value}
        if not set(by_backend) <= {None, *BACKENDS}:
            raise ValueError(f"bar: expected backends among {', '.join(BACKENDS)}; got {list(by_backend)}")
        bars += [
            Bar(measure, float(number), backend, dense, tuple(also)) for backend, number in by_backend.items()
        ]
    return tuple(bars)

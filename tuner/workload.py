"""Workloads: named lists of the problems that a real model produces, read from `suites/workloads/*.yaml`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from chipmunk_kernels.problem import OPERATIONS, Problem

FOLDER = Path(__file__).resolve().parent.parent / "suites" / "workloads"


class WorkloadError(ValueError):
    """A workload or operation that there is not, or a workload file that cannot be used."""


@dataclass(frozen=True)
class LabelledProblem:
    """A problem and how people call it."""

    label: str
    problem: Problem


@dataclass(frozen=True)
class Workload:
    """A named list of problems.

    Attributes:
        name: the file's stem.
        description: one line: which model, at which size.
        problems: with a label each.
        policies: names of the built-in policies that belong to the model; a profile carries them.
    """

    name: str
    description: str
    problems: tuple[LabelledProblem, ...]
    policies: tuple[str, ...] = ()

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
    problems = []
    for item in document["problems"]:
        fields = dict(item)
        label = fields.pop("label", None)
        if fields.get("dtype") == "auto":
            fields["dtype"] = native_dtype
        problem = Problem.from_mapping(fields)
        problems.append(LabelledProblem(label or problem.key, problem))
    return Workload(
        document.get("name", name),
        " ".join(str(document.get("description", "")).split()),
        tuple(problems),
        tuple(document.get("policies") or ()),
    )

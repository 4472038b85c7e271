"""Every backend on every problem of a workload, within a number of seconds, the important ones first."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from chipmunk_kernels.problem import Problem
from suites.benchmarks.bars.tasks import DENSE, Row, Task, chosen, dense_shape, measure, prepare
from tuner.baselines import COMPILED, work_of
from tuner.build import InlineBuilder, PoolBuilder
from tuner.space import why_not
from tuner.store import Outcome
from tuner.verify import Check, shrunken
from tuner.workload import LabelledProblem

ORDER = ("cupy_hopper", "triton_hopper", "triton", "cupy", "torch")
"""Those with bars of their own first."""
HOPELESS_FLOPS, HOPELESS_BYTES = 1e12, 2e9
"""Beyond either, the torch backend on a GPU, which gathers into memory, would take longer than all others."""
MAX_WORKERS = 14
MEASURE_LIMIT_S = 40.0
"""Ten times what the largest problem takes; a kernel that hangs must not eat the time of all others."""
PREPARE_SHARE = 0.5
"""Of the seconds: what is not compiled and verified by then is not reached."""


@dataclass(frozen=True)
class Plan:
    """What to measure, and how.

    Attributes:
        items: the problems, the important ones first.
        backends: whose kernels.
        device: where.
        seconds: for all of it.
        profile: path of tuned settings, None for what dispatch finds.
        seed: of the inputs.
        compiled: compare with what torch.compile makes, too.
        known: all problems of the workload, for bars that count on another problem's baseline.
    """

    items: Sequence[LabelledProblem]
    backends: Sequence[str]
    device: torch.device
    seconds: float
    profile: str | None = None
    seed: int = 0
    compiled: bool = True
    known: Sequence[LabelledProblem] = ()


def run(plan: Plan, clock: Callable[[], float] = time.monotonic) -> Iterator[Row]:
    """A row for every problem and backend, each as soon as there is one; what cannot run has its reason."""
    started = clock()
    tasks: list[Task] = []
    for task in _tasks(plan):
        row = _refused(task)
        if row is None:
            tasks.append(task)
        else:
            yield row
    checks = _prepared(tasks, plan.device, started + PREPARE_SHARE * plan.seconds, clock)
    builder = _builder(measure, plan.device, 1)
    try:
        for task in tasks:
            row = _stopped(task, checks, clock() >= started + plan.seconds)
            yield row or _measured(task, builder)
    finally:
        builder.close()


def hopeless(problem: Problem, backend: str, device: torch.device) -> str | None:
    """Why a backend is not worth its time on a problem of this size, or None."""
    work = work_of(problem)
    if backend != "torch" or device.type == "cpu":
        return None
    if work.flops <= HOPELESS_FLOPS and work.bytes <= HOPELESS_BYTES:
        return None
    return "too large for the torch backend, which gathers into memory"


def _tasks(plan: Plan) -> Iterator[Task]:
    """Every backend on every problem, and the dense baselines that other problems' bars count on."""
    needed = {bar.dense for item in plan.items for bar in item.bars} - {None}
    for item in plan.items:
        for backend in sorted(plan.backends, key=ORDER.index):
            yield _task(plan, item, backend)
        if item.label in needed:
            yield _task(plan, item, DENSE)
            needed.remove(item.label)
    for item in plan.known:
        if item.label in needed:
            yield _task(plan, item, DENSE)


def _task(plan: Plan, item: LabelledProblem, backend: str) -> Task:
    return Task(item, backend, str(plan.device), plan.profile, plan.seed, compiled=plan.compiled)


def _refused(task: Task) -> Row | None:
    """The row of a task that cannot or need not run, or None."""
    problem, device = task.item.problem, torch.device(task.device)
    if task.backend == DENSE:
        return None
    reason = hopeless(problem, task.backend, device)
    if reason is not None:
        return Row(task.item, task.backend, "left out", reason)
    reason = why_not(problem, task.backend, device)
    return None if reason is None else Row(task.item, task.backend, "missing", reason)


def _prepared(
    tasks: Sequence[Task], device: torch.device, deadline: float, clock: Callable[[], float]
) -> dict[Any, Check | Outcome]:
    """What compiling and verifying on small cases gave, by `_same_build`: nothing where time was up."""
    wanted: dict[Any, Task] = {}
    for task in tasks:
        for each in _builds(task):
            wanted.setdefault(_same_build(each), each)
    keys = list(wanted)
    width = min(MAX_WORKERS, max(1, (os.cpu_count() or 2) - 2), max(1, len(keys)))
    builder = _builder(prepare, device, width)
    found: dict[Any, Check | Outcome] = {}
    limit_s = max(10.0, 0.8 * (deadline - clock()))
    try:
        for index, answer in builder.run([wanted[key] for key in keys], limit_s):
            found[keys[index]] = answer
            if clock() >= deadline:
                break
    finally:
        builder.close()
    return found


def _builds(task: Task) -> Iterator[Task]:
    """The task's kernel, and the baselines of its problem that torch.compile makes: ready on disk later."""
    if task.backend != DENSE:
        yield task
    if task.compiled and task.device.startswith("cuda") and task.item.problem.operation in COMPILED:
        yield replace(task, backend=DENSE)


def _same_build(task: Task) -> Any:
    """Equal for tasks of one compiled kernel on one small case: one of them stands for all."""
    problem = task.item.problem
    if task.backend == DENSE:
        return DENSE, dense_shape(problem)
    _, settings = chosen(task)
    return task.backend, settings, shrunken(problem), task.item.options


def _stopped(task: Task, checks: dict[Any, Check | Outcome], late: bool) -> Row | None:
    """The row of a task that must not or cannot be measured any more, or None."""
    if task.backend != DENSE:
        answer = checks.get(_same_build(task))
        if answer is None:
            return Row(task.item, task.backend, "not reached", "not compiled and verified within the seconds")
        if isinstance(answer, Outcome):
            return _failed(task, answer)
        if not answer.ok:
            return Row(task.item, task.backend, "wrong", answer.explain(), check=answer)
    if late:
        return Row(task.item, task.backend, "not reached", "the seconds were up; see --seconds")
    return None


def _measured(task: Task, builder: Any) -> Row:
    ((_, answer),) = builder.run([task], MEASURE_LIMIT_S)
    return _failed(task, answer) if isinstance(answer, Outcome) else answer


def _failed(task: Task, outcome: Outcome) -> Row:
    return Row(task.item, task.backend, outcome.status, outcome.reason)


def _builder(function: Callable[[Task], Any], device: torch.device, width: int) -> Any:
    """Worker processes on a GPU, where a kernel may hang or fault; on a CPU this process."""
    return InlineBuilder(function) if device.type == "cpu" else PoolBuilder(width, function)

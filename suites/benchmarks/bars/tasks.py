"""One kernel on one problem: verified, then timed against the best dense baseline, round by round.

`prepare` and `measure` run in worker processes, so that a kernel that hangs or faults takes nothing with it:
`prepare` side by side (it compiles), `measure` alone on the device. A worker keeps the inputs and the
baseline of the problem in hand for the next backend.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from chipmunk_kernels import dispatch, profiles
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings
from suites.benchmarks.bars.costs import extra_mib, launch_us, smallest
from suites.benchmarks.bench import make_timer
from tuner.baselines import ATTENTION, CROSSED, Baseline, Survey, survey, work_of
from tuner.hardware import detect
from tuner.measure import Timer, TimingPolicy, Work, interleave, sm_clock_of
from tuner.measure import measure as measure_one
from tuner.problem import Case, KernelWork, Options, make_case
from tuner.statistics import Interval, median_interval, paired_ratio
from tuner.verify import Check, Sampled, synchronize, verify_small
from tuner.workload import LabelledProblem

DENSE = "dense"
"""The name of the baseline among the backends: a task with it times nothing else."""
COPY = "copy"
MOVES = ("gather_columns", "scatter_columns")
"""Operations that a plain copy is timed beside."""
SCREENING = TimingPolicy(warm_up_s=0.02, min_samples=2, max_samples=7, max_seconds=0.1)
FAR_BEHIND = 1.5
"""A baseline that much slower in a first sample is out: over a video, a second one takes half a second."""
WARM_UP_S = 0.1
LONG_MS = 5.0
SETTLING = TimingPolicy(warm_up_s=0.3, min_samples=1, max_samples=1)
ALONE = TimingPolicy(warm_up_s=0.0, min_samples=6, max_samples=12, target_width=0.0, max_seconds=0.4)
"""A device takes tens of milliseconds to follow power with its clock: calls of at least `LONG_MS` are timed
by themselves, too, after as many as that takes."""


@dataclass(frozen=True)
class Task:
    """One backend on one problem, in plain values that travel to another process.

    Attributes:
        item: the problem.
        backend: whose kernel, or `DENSE`.
        device: where.
        profile: path of the tuned settings, None for those that dispatch finds.
        seed: of the inputs.
        max_seconds: for the timed rounds.
        compiled: compare with what torch.compile makes, too.
    """

    item: LabelledProblem
    backend: str
    device: str
    profile: str | None = None
    seed: int = 0
    max_seconds: float = 1.5
    compiled: bool = True


@dataclass(frozen=True)
class Row:
    """What became of a task.

    Attributes:
        item: the problem.
        backend: whose kernel.
        status: `ok`, or why there is no timing: `wrong`, `missing`, `left out`, `not reached`, or a status of
            `tuner.store`.
        reason: one line; empty for `ok`.
        settings: the kernel's launch settings.
        tuned: they are not the defaults.
        time: of one call in ms.
        dense: of the fastest dense baseline in the same rounds, in ms.
        dense_name: which baseline that was.
        dense_failed: baselines that could not run, and why.
        speedup: dense over kernel, by rounds.
        copy: of a plain copy of as many bytes in the same rounds, in ms; only beside what moves columns.
        share_of_copy: copy over kernel, by rounds.
        check: the worst error against float64 at full size.
        extra_mib: memory of a call beyond inputs and results; None where it cannot be told.
        launch_us: host time of one call, at its fastest; None where nothing is launched.
        torch_launch_us: of a launch of torch's own in the same batches: whether the host was slow.
        clock_mhz: SM clock while the kernel was sampled, None where nothing watches it.
        dense_clock_mhz: the same of the baseline.
        alone: of calls that follow only each other, in ms; None for short ones and where no clock is watched.
        alone_clock_mhz: SM clock of those.
    """

    item: LabelledProblem
    backend: str
    status: str = "ok"
    reason: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False
    time: Interval | None = None
    dense: Interval | None = None
    dense_name: str = ""
    dense_failed: dict[str, str] = field(default_factory=dict)
    speedup: Interval | None = None
    copy: Interval | None = None
    share_of_copy: Interval | None = None
    check: Check | None = None
    extra_mib: float | None = None
    launch_us: float | None = None
    torch_launch_us: float | None = None
    clock_mhz: float | None = None
    dense_clock_mhz: float | None = None
    alone: Interval | None = None
    alone_clock_mhz: float | None = None


def chosen(task: Task) -> tuple[Kernel, LaunchSettings]:
    """The backend's kernel with its tuned settings where the profile has some, else its defaults.

    Raises:
        RuntimeError: the backend cannot run the problem here; the message says why.
        ProfileError: the profile cannot be read.
    """
    device = torch.device(task.device)
    profile = profiles.find(device, task.profile)
    return dispatch.select(task.item.problem, device, backend=task.backend, profile=profile)


def prepare(task: Task) -> Check:
    """Compile a kernel and verify it on a small case; of a baseline, compile what torch.compile makes."""
    problem, options, device = task.item.problem, task.item.options, torch.device(task.device)
    if task.backend == DENSE:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the workers are the threads
        survey(make_case(problem, device, task.seed, options=options), compiled=task.compiled)
        return Check(0.0, 0.0, "dense baselines")
    kernel, settings = chosen(task)
    check = verify_small(kernel, settings, problem, device, task.seed + 1, options)
    # Triton compiles anew for sizes that 16 divides and for sizes of 1: have that done here, too.
    for shape in (replace(problem, heads=min(problem.heads, 2)), smallest(problem)) if check.ok else ():
        make_case(shape, device, task.seed, options=options).run(kernel, settings)
        synchronize(device)
    return check


def measure(task: Task) -> Row:
    """Verify some groups at full size, time kernel and baseline in turn, and count what a call costs."""
    subject = _subject(task.item.problem, task.item.options, task.device, task.seed, task.compiled)
    dense_name, failed = subject.baseline.name, subject.survey.failed
    works: dict[str, Any] = {DENSE: subject.baseline}
    if task.backend == DENSE:
        samples, _ = interleave(works, subject.timer, max_rounds=7, max_seconds=task.max_seconds)
        dense = median_interval(samples[DENSE])
        return Row(task.item, DENSE, dense=dense, dense_name=dense_name, dense_failed=failed)
    kernel, settings = chosen(task)
    tuned = settings != kernel.settings()
    check = subject.sampled.check(kernel, settings)
    if not check.ok:
        return Row(task.item, task.backend, "wrong", check.explain(), settings.as_dict(), tuned, check=check)
    works[task.backend] = KernelWork(subject.case, kernel, settings)
    if subject.copy is not None:
        works[COPY] = subject.copy
    samples, _ = interleave(works, subject.timer, max_seconds=task.max_seconds, warm_up_s=WARM_UP_S)
    time = median_interval(samples[task.backend])
    clock_mhz, dense_clock_mhz = (
        sm_clock_of(subject.timer, works[name], len(samples[name])) for name in (task.backend, DENSE)
    )
    alone, alone_clock_mhz = None, None
    if clock_mhz is not None and time.median >= LONG_MS:
        alone, alone_clock_mhz = time_alone(works[task.backend], subject.timer)
    launch = launch_us(subject.case, kernel, settings)
    return Row(
        task.item,
        task.backend,
        settings=settings.as_dict(),
        tuned=tuned,
        time=time,
        dense=median_interval(samples[DENSE]),
        dense_name=dense_name,
        dense_failed=failed,
        speedup=paired_ratio(samples[DENSE], samples[task.backend]),
        copy=median_interval(samples[COPY]) if COPY in samples else None,
        share_of_copy=paired_ratio(samples[COPY], samples[task.backend]) if COPY in samples else None,
        check=check,
        extra_mib=extra_mib(subject.case, kernel, settings),
        launch_us=launch.us if launch else None,
        torch_launch_us=launch.torch_us if launch else None,
        clock_mhz=clock_mhz,
        dense_clock_mhz=dense_clock_mhz,
        alone=alone,
        alone_clock_mhz=alone_clock_mhz,
    )


def time_alone(work: Work, timer: Timer) -> tuple[Interval, float | None]:
    """Time and SM clock of calls that follow only each other.

    A kernel that takes less power than the baseline runs at a higher clock by itself, as it does in a model
    that calls it far more often than dense attention; between calls of the baseline it runs at that one's.
    """
    measure_one(work, timer, SETTLING)
    found = measure_one(work, timer, ALONE)
    return found.interval, sm_clock_of(timer, work, len(found.samples_ms))


@dataclass(frozen=True, eq=False)
class _Subject:
    """A problem in hand: inputs, groups to compare, dense baselines and the fastest of them, a plain copy."""

    case: Case
    sampled: Sampled
    survey: Survey
    baseline: Baseline
    copy: Baseline | None
    timer: Timer


@functools.lru_cache(maxsize=1)
def _subject(problem: Problem, options: Options, device: str, seed: int, compiled: bool) -> _Subject:
    timer = _timer(device)
    case = make_case(problem, device, seed, options=options)
    shape = dense_shape(problem)
    found = survey(case, compiled=compiled, only=_fastest_known.get(shape))
    baseline = _fastest(found.found, timer)
    _fastest_known[shape] = baseline.name
    return _Subject(case, Sampled(case, seed), found, baseline, plain_copy(case), timer)


def plain_copy(case: Case) -> Baseline | None:
    """`Tensor.copy_` of as many bytes as the problem must move, half of them read, half written.

    Of the problem's own size: FLUX's gathers move 57 MB in some 19 us on an H200. Starting and draining are a
    part of that which the far larger copy behind the measured ceiling does not feel.
    """
    problem = case.problem
    if problem.operation not in MOVES:
        return None
    dtype = getattr(torch, problem.dtype)
    elements = max(1, round(work_of(problem, case.options).bytes / (2 * dtype.itemsize)))
    source = torch.randn(elements, dtype=dtype, device=case.device)
    target = torch.empty_like(source)
    return Baseline("Tensor.copy_", lambda: target.copy_(source))


_fastest_known: dict[Hashable, str] = {}
"""Dense shape → name of its fastest baseline: densities and group sizes of one shape share it."""


def dense_shape(problem: Problem) -> Hashable:
    """Equal for problems that stand in for one dense computation."""
    kind = "attention" if problem.operation in ATTENTION else problem.operation
    sizes = (problem.batch, problem.heads, problem.rows, problem.columns, problem.width)
    kept = (
        () if problem.operation in CROSSED or kind == "attention" else (problem.density, problem.group_size)
    )
    return kind, problem.dtype, sizes, kept


def _fastest(found: list[Baseline], timer: Timer) -> Baseline:
    """Each has run once already, so that a first sample compiles nothing."""
    first = {baseline: timer.sample(baseline) for baseline in found}
    near = [baseline for baseline in found if first[baseline] <= FAR_BEHIND * min(first.values())]
    if len(near) == 1:
        return near[0]
    return min(near, key=lambda baseline: measure_one(baseline, timer, SCREENING).median_ms)


@functools.cache
def _timer(device: str) -> Timer:
    return make_timer(torch.device(device), detect(torch.device(device)))

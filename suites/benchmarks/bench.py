"""One problem with both contenders, timed by the tuner's timers and recorded by pytest-benchmark.

pytest-benchmark reads a clock before and after a call. That would count a GPU kernel's launch and not its
run, and find the caches warm. So the clock here stands still except for what a tuner's timer measured
(`CpuTimer`: wall clock after sweeping the cache; `CudaTimer`: events after clearing the L2, the host hidden).

The dense baseline is timed just before the operation, not interleaved with it: good for watching a kernel
from night to night, while a close verdict between two candidates is the tuner's business.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chipmunk_kernels import dispatch, profiles, registry
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings
from tuner.baselines import Baseline, survey, work_of
from tuner.bench import watch
from tuner.hardware import Ceilings, Hardware
from tuner.measure import CpuTimer, CudaTimer, Timer, TimingPolicy, Work, measure
from tuner.problem import Case, KernelWork, make_case
from tuner.space import unavailable_reason
from tuner.workload import LabelledProblem

DISPATCH = "dispatch"
"""In the place of a backend's name: whatever dispatch runs."""
QUICK = TimingPolicy(warm_up_s=0.02, min_samples=3, max_samples=7, max_seconds=1.0)
WARM_UP_S = 0.1
SEED = 0


class SampleClock:
    """Advances by exactly what a timer measured. `seconds` is the clock that pytest-benchmark reads."""

    def __init__(self) -> None:
        self._elapsed_s = 0.0

    def seconds(self) -> float:
        """Sum of all samples so far."""
        return self._elapsed_s

    def sample(self, timer: Timer, work: Work) -> None:
        """Run the work once under the timer."""
        self._elapsed_s += timer.sample(work) * 1e-3


CLOCK = SampleClock()


@dataclass(frozen=True, eq=False)
class Machine:
    """What all benchmarks of a session share."""

    device: torch.device
    hardware: Hardware
    ceilings: Ceilings
    timer: Timer


@dataclass(frozen=True, eq=False)
class Choice:
    """The kernel and launch settings of a problem, and the profile that they come from."""

    kernel: Kernel
    settings: LaunchSettings
    profile: profiles.Profile


def choose(problem: Problem, device: torch.device, backend: str | None) -> Choice:
    """What dispatch runs for the problem, or what `backend` would.

    Raises:
        RuntimeError: the backend asked for cannot run the problem here; the message says why.
    """
    profile, named = profiles.find(device), None if backend == DISPATCH else backend
    kernel, settings = dispatch.select(problem, device, backend=named, profile=profile)
    return Choice(kernel, settings, profile)


def backends(asked: Sequence[str], device: torch.device) -> list[str]:
    """The contenders that `--backend` names: what dispatch runs if it names none, `all` for every backend
    that this device has.

    Raises:
        ValueError: no such backend.
    """
    known = (DISPATCH, *registry.BACKENDS, "all")
    for name in asked:
        if name not in known:
            raise ValueError(f"--backend: expected among {', '.join(known)}; got {name!r}")
    if "all" in asked:
        return [name for name in registry.BACKENDS if unavailable_reason(name, device) is None]
    return list(dict.fromkeys(asked)) or [DISPATCH]


def make_timer(device: torch.device, hardware: Hardware) -> Timer:
    """The tuner's timer for the device."""
    if device.type == "cuda":
        return CudaTimer(device, hardware.cache_bytes, watch(device))
    return CpuTimer(hardware.cache_bytes)


class Bench:
    """One problem: its inputs, and the fastest dense baseline, for every kernel that is benchmarked."""

    def __init__(self, item: LabelledProblem, machine: Machine) -> None:
        self.label, self.problem, self.machine = item.label, item.problem, machine
        self.case: Case = make_case(item.problem, machine.device, SEED, options=item.options)
        self.baseline = self._fastest_baseline()
        self._baseline_ms: float | None = None

    def time_baseline(self, benchmark: Any) -> None:
        """Record the dense baseline."""
        self._baseline_ms = self._record(benchmark, self.baseline)
        benchmark.extra_info |= {"baseline": self.baseline.name}

    def time_operation(self, benchmark: Any, choice: Choice) -> None:
        """Record the operation, with its speedup over the baseline of this very session."""
        median_ms = self._record(benchmark, KernelWork(self.case, choice.kernel, choice.settings))
        if median_ms is None:  # --benchmark-disable: it ran, nothing was timed
            return
        baseline_ms = self._baseline_ms or measure(self.baseline, self.machine.timer, QUICK).median_ms
        ideal_ms, profile = self._ideal_ms(), choice.profile
        benchmark.extra_info |= {
            "backend": choice.kernel.backend,
            "settings": choice.settings.as_dict(),
            "profile": profile.rung,
            "median_ms": median_ms,
            "baseline": self.baseline.name,
            "baseline_ms": baseline_ms,
            "speedup": baseline_ms / median_ms,
            "ideal_ms": ideal_ms,
            "share_of_ideal": ideal_ms / median_ms,
            "dense_is_better": dispatch.dense_is_better(self.problem, self.machine.device, profile),
        }

    def _record(self, benchmark: Any, work: Work) -> float | None:
        """Let pytest-benchmark take its rounds. Returns the median in ms, None when it is disabled."""
        timer = self.machine.timer
        benchmark.group = f"{self.problem.operation}: {self.label}"
        benchmark.extra_info |= {"problem": self.problem.key, "timing": timer.name}
        rounds = self._rounds(benchmark, work) if benchmark.enabled else 1
        benchmark.pedantic(CLOCK.sample, args=(timer, work), rounds=rounds, iterations=1)
        return benchmark.stats.stats.median * 1e3 if benchmark.enabled else None

    def _rounds(self, benchmark: Any, work: Work) -> int:
        """Warm up in time; then as many rounds as fit `--benchmark-max-time`, or `--benchmark-min-rounds`.

        A round costs what it takes, cache clearing included, not what it measures. The first call may compile
        for seconds and says nothing about the next.
        """
        self.machine.timer.sample(work)
        started, samples = time.perf_counter(), 0
        while samples == 0 or time.perf_counter() - started < WARM_UP_S:
            self.machine.timer.sample(work)
            samples += 1
        cost_s = (time.perf_counter() - started) / samples
        return max(benchmark._min_rounds, int(benchmark._max_time / cost_s))

    def _fastest_baseline(self) -> Baseline:
        found = survey(self.case, compiled=True).found
        if len(found) == 1:
            return found[0]
        return min(found, key=lambda baseline: measure(baseline, self.machine.timer, QUICK).median_ms)

    def _ideal_ms(self) -> float:
        """The roofline of the problem at this machine's measured ceilings."""
        ceilings = self.machine.ceilings
        return work_of(self.problem, self.case.options).ideal_ms(
            ceilings.peak_tflops[self.problem.dtype], ceilings.bandwidth_gbs
        )

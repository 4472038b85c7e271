"""A clock, a timer and a kernel that do what a test says, so that the tuner's logic runs in no time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice
from reference.group_mean import group_mean
from tuner.bench import Bench
from tuner.build import Builder, InlineBuilder, Task, check
from tuner.hardware import Ceilings, Hardware
from tuner.measure import TimingPolicy, Work
from tuner.problem import KernelWork
from tuner.verify import Check

PROBLEM = Problem("group_mean", rows=70, columns=8, width=8, group_size=32, dtype="float32")
POLICY = TimingPolicy(warm_up_s=0.0, min_samples=6, max_samples=20, target_width=0.05, max_seconds=60.0)


@dataclass
class Clock:
    """Seconds that pass only when a fake timer says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class ScriptedWork:
    """Work whose n-th sample takes `milliseconds(n)`."""

    milliseconds: Callable[[int], float]
    calls: int = 0
    resets: int = 0

    def reset(self) -> None:
        self.resets += 1

    def call(self) -> float:
        self.calls += 1
        return self.milliseconds(self.calls - 1)


@dataclass
class FakeTimer:
    """Asks the work, or for a kernel its `speed` setting, how long it takes; moves the clock on by that.

    `taken` lists what was sampled, in order.
    """

    clock: Clock = field(default_factory=Clock)
    drift: Callable[[int], float] = lambda n: 1.0
    taken: list[Any] = field(default_factory=list)
    name: str = "fake timer"

    def sample(self, work: Work) -> float:
        work.reset()
        if isinstance(work, KernelWork):
            ms = float(work.settings.as_dict()["speed"])
            work.call()
        else:
            result = work.call()
            ms = result if isinstance(result, float) else 10.0
        ms *= self.drift(len(self.taken))
        self.taken.append(work)
        self.clock.now += ms / 1e3
        return ms


@dataclass(frozen=True)
class FakeSettings(LaunchSettings):
    """`speed` is the kernel's time in ms; `fault` is what goes wrong with it."""

    speed: int = choice(8, 8, 4, 2, 6)
    fault: str = choice("none", "none", "wrong", "unwritten", "raise", "memory", "compile")

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        return "a speed of 6 never fits" if self.speed == 6 else None


class CompilationError(Exception):
    """Stands for the class of that name which Triton raises."""


def fake_run(x: Tensor, group_size: int, settings: FakeSettings) -> Tensor:
    """The group mean, unless a fault is asked for."""
    if settings.fault == "raise":
        raise RuntimeError("launch failed")
    if settings.fault == "memory":
        raise torch.OutOfMemoryError("no room for it")
    if settings.fault == "compile":
        raise CompilationError("def kernel(): ...\nline 3: this is not a kernel")
    if settings.fault == "unwritten":
        return torch.empty(x.shape[0], -(-x.shape[1] // group_size), x.shape[2])
    means = group_mean(x, group_size)
    if settings.fault == "wrong":
        means[:, -1] *= 1.01
    return means


KERNEL = Kernel("group_mean", "torch", fake_run, FakeSettings)


def fake_kernels(backend: str) -> Mapping[str, Kernel]:
    """Stands for `registry.kernels`."""
    return {"group_mean": KERNEL} if backend == "torch" else {}


def fake_bench(timer: FakeTimer, builder: Builder | None = None) -> Bench:
    """A CPU with ceilings too low to make anything invalid."""
    hardware = Hardware("fake processor", "cpu", "fake64", 1.0, 1 << 20, 2)
    ceilings = Ceilings(1e3, {"float32": 1.0})
    toolchain = {"torch": "1", "triton": "none"}
    return Bench(
        torch.device("cpu"), hardware, ceilings, toolchain, timer, POLICY, builder or InlineBuilder(check)
    )


def misbehave(task: Task) -> Check:
    """A worker's function that dies, hangs, raises or answers, by the backend named in the task."""
    import os
    import signal
    import time

    if task.backend == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task.backend == "hangs":
        time.sleep(60)
    if task.backend == "raises":
        raise MemoryError("too much")
    return Check(0.0, 1.0, task.backend)

"""What a call costs besides its time on the device: memory beyond its results, and time of the host."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch

from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings
from tuner.problem import MUTATED, Case, make_case
from tuner.verify import compared_rows

BATCHES, LAUNCHES = 24, 50
"""Launches back to back stay far below the 1024 that the driver queues: more, and the host waits for the
device. Short batches, since one undisturbed is enough."""
LEAST_BATCHES, MOST_S = 6, 0.3
"""Of a call that takes long there are fewer batches: none of 400 us is worth half a second."""
PAUSE_S = 0.005
"""Between batches, each of which takes a millisecond: what disturbs a host lasts longer than that."""
WARM_UP = 5
"""Launches before a batch that do not count: after a pause the first find caches and clocks cold."""


@dataclass(frozen=True)
class LaunchCost:
    """Time of the host for one call, in us, each the minimum over batches.

    Attributes:
        us: of the call in question.
        torch_us: of `torch.add(a, b, out=c)` on a few numbers, in batches between those of the call. Nothing
            of it is ours: where it is twice what it is elsewhere, the host is twice as slow.
    """

    us: float
    torch_us: float


def extra_mib(case: Case, kernel: Kernel, settings: LaunchSettings) -> float | None:
    """Peak memory of a second call beyond its inputs and its results, in MiB. None on a CPU, whose allocator
    keeps no record."""
    if case.device.type != "cuda":
        return None
    case.reset()
    torch.cuda.synchronize(case.device)
    torch.cuda.reset_peak_memory_stats(case.device)
    before = torch.cuda.memory_allocated(case.device)
    outputs = case.run(kernel, settings)
    torch.cuda.synchronize(case.device)
    peak = torch.cuda.max_memory_allocated(case.device) - before
    mutated = MUTATED.get(case.problem.operation, ())
    results = sum(value.nbytes for name, value in outputs.items() if name not in mutated)
    return (peak - results) / 2**20


def launch_us(case: Case, kernel: Kernel, settings: LaunchSettings) -> LaunchCost | None:
    """Host time of one call on a problem that leaves the device nearly idle.

    None on a CPU, and where the kernel cannot run so small a problem with these settings.
    """
    device = case.device
    if device.type != "cuda":
        return None
    try:
        small = make_case(smallest(case.problem), device, 0, options=case.options)
        arguments = (*small.inputs.values(), settings)
        kernel.run(*arguments)
        torch.cuda.synchronize(device)
    except RuntimeError:
        return None
    return launch_cost(lambda: kernel.run(*arguments), device)


def launch_cost(call: Callable[[], object], device: torch.device) -> LaunchCost:
    """Host time of a call that launches on a CUDA device, and of a launch of torch's own beside it, on the
    core that is quickest just now."""
    a, b, out = (torch.zeros(8, device=device) for _ in range(3))

    def add() -> None:
        torch.add(a, b, out=out)

    def drain() -> None:
        torch.cuda.synchronize(device)

    with quickest_core(add, drain):
        return LaunchCost(*fastest_us([call, add], drain, pause=time.sleep))


@contextmanager
def quickest_core(
    call: Callable[[], object], drain: Callable[[], None], clock: Callable[[], float] = time.perf_counter
) -> Iterator[None]:
    """Within, this thread runs on the core on which a batch of `call` took the least time; on any, where the
    system does not tell cores apart. What starts threads must have been called before: they would stay there.

    They are not alike while others use a machine too: of 32 on the host of an H200, 26 took 12.5 to 16.1 us
    for one launch of ours and 5.6 to 7.8 for torch's `add`, the other six 19.2 to 20.7 and 8.2 to 8.5.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    took: dict[int, float] = {}
    try:
        with suppress(OSError):  # a sandbox may forbid it
            for core in sorted(allowed):
                os.sched_setaffinity(0, {core})
                took[core] = _batch_s(call, clock)
                drain()
            os.sched_setaffinity(0, {min(took, key=took.__getitem__)})
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, allowed)


def fastest_us(
    calls: Sequence[Callable[[], object]],
    drain: Callable[[], None],
    pause: Callable[[float], None],
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """The least time of each call in us, a batch's mean: batches of all calls in turn, spread in time.

    The minimum, not the median, as `timeit` documents: other processes, interrupts and clocks only ever add
    to what a call costs, so the least is nearest to what the code itself takes. Medians of launches of one
    kind were 11 us in one minute and 24 in another.

    Args:
        calls: each has been called before, and compiles nothing.
        drain: waits for what was launched, so that no batch finds the device's queue filled.
        pause: sleeps for some seconds.
        clock: seconds.
    """
    fastest = [float("inf")] * len(calls)
    began = clock()
    for batch in range(BATCHES):
        if batch >= LEAST_BATCHES and clock() - began > MOST_S:
            break
        pause(PAUSE_S)
        for number, call in enumerate(calls):
            fastest[number] = min(fastest[number], _batch_s(call, clock) / LAUNCHES * 1e6)
            drain()
    return fastest


def _batch_s(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of a batch; collecting garbage, which is not the call's, waits until it is over."""
    for _ in range(WARM_UP):
        call()
    collects = gc.isenabled()
    gc.disable()
    try:
        started = clock()
        for _ in range(LAUNCHES):
            call()
        return clock() - started
    finally:
        if collects:
            gc.enable()


def smallest(problem: Problem) -> Problem:
    """One group of one head, of the same width, dtype and group size: compiled as the problem is."""
    return replace(
        problem,
        batch=1,
        heads=1,
        rows=compared_rows(problem),
        columns=min(problem.columns, 256),
        density=max(problem.density, 0.25),
    )

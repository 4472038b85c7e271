"""What a call costs besides its time on the device: memory beyond its results, and time of the host."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import torch

from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings
from tuner.problem import MUTATED, Case, make_case
from tuner.verify import compared_rows

LAUNCHES, BATCHES = 100, 7
"""Launches back to back stay below the 1024 that the driver queues: more, and the host waits for the
device."""


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


def launch_us(case: Case, kernel: Kernel, settings: LaunchSettings) -> float | None:
    """Median host time of one call in µs, many in a row on a problem that leaves the device nearly idle.

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
    batches = []
    for _ in range(BATCHES):
        started = time.perf_counter()
        for _ in range(LAUNCHES):
            kernel.run(*arguments)
        batches.append((time.perf_counter() - started) / LAUNCHES)
        torch.cuda.synchronize(device)
    return median(batches) * 1e6


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

"""A device with everything that is needed to measure on it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from chipmunk_kernels.problem import Problem
from tuner.baselines import work_of
from tuner.build import Builder, InlineBuilder, PoolBuilder, check
from tuner.hardware import Ceilings, Hardware, detect, measure_ceilings, toolchain
from tuner.measure import CPU_POLICY, CUDA_POLICY, Clocked, CpuTimer, CudaTimer, Timer, TimingPolicy
from tuner.problem import Options
from tuner.store import Store

ROOFLINE_MARGIN = {"cuda": 1.25, "cpu": 2.0}
"""How much faster than the measured ceilings a timing may be before it is invalid: those of a CPU that others
use, too, vary a lot."""

MAX_WORKERS = 12

_log = logging.getLogger(__name__)


@dataclass
class Bench:
    """The device with what is needed to measure on it.

    Attributes:
        device: where kernels run.
        hardware: its facts.
        ceilings: its measured ceilings.
        toolchain: versions.
        timer: how a sample is taken.
        policy: how many.
        builder: how candidates are built and verified.
    """

    device: torch.device
    hardware: Hardware
    ceilings: Ceilings
    toolchain: dict[str, str]
    timer: Timer
    policy: TimingPolicy
    builder: Builder

    def ideal_ms(self, problem: Problem, options: Options = ()) -> float:
        """The roofline time of a problem at the measured ceilings."""
        work = work_of(problem, options)
        return work.ideal_ms(self.ceilings.peak_tflops[problem.dtype], self.ceilings.bandwidth_gbs)

    def room_for(self, problem: Problem) -> int:
        """How many processes can hold this problem at once, in six tenths of the device's memory."""
        # Inputs and outputs once; float64 copies, masks and what a second density needs make it three times.
        wanted = 3 * work_of(problem).bytes + (1 << 30)
        return max(1, int(0.6 * self.hardware.memory_gib * 2**30 / wanted))


def open_bench(device: torch.device, dtypes: Iterable[str], store: Store) -> Bench:
    """Detect the device, measure its ceilings unless they are recorded, and check that its timer is
    honest."""
    hardware, versions = detect(device), toolchain()
    dtypes = sorted(set(dtypes))
    fact = f"ceilings {hardware.name} torch {versions['torch']} {' '.join(dtypes)}"
    recorded = store.fact(fact)
    ceilings = Ceilings(**recorded) if recorded else measure_ceilings(device, dtypes)
    store.save_fact(fact, ceilings.as_dict())
    timer: Timer
    builder: Builder
    if device.type == "cuda":
        timer = CudaTimer(device, hardware.cache_bytes, watch(device))
        honesty = timer.honesty()
        if not 1.9 < honesty < 2.1:
            _log.warning("the timer reads %.2f for a spin twice as long: do not trust these times", honesty)
        builder = PoolBuilder(max(1, min(MAX_WORKERS, (os.cpu_count() or 2) - 2)), check)
        return Bench(device, hardware, ceilings, versions, timer, CUDA_POLICY, builder)
    return Bench(
        device, hardware, ceilings, versions, CpuTimer(hardware.cache_bytes), CPU_POLICY, InlineBuilder(check)
    )


def watch(device: torch.device) -> Clocked | None:
    """What watches the SM clock; None where Triton, which it is written in, is missing or cannot compile."""
    try:
        from tuner.sm_clock import SmClock

        return SmClock(device)
    except Exception as error:  # of Triton's many kinds; no tuning should end for want of a clock
        _log.warning("SM clocks are not recorded: %s: %s", type(error).__name__, error)
        return None

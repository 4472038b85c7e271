"""Timings that can be trusted: cold caches, the host kept out, warm clocks, every sample kept.

A *timer* gives one sample of one call; the *policy* says how many to take and when to stop, and is part of
the result. `measure` times one thing, dropping it early when it clearly cannot win; `interleave` times
several things round by round, so that whatever drifts drifts for all. Neither knows a device: on a CPU,
and in tests with a fake timer, the same code runs.
"""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from tuner.statistics import FEWEST, Interval, median_interval, paired_ratio

Clock = Callable[[], float]


class Work(Protocol):
    """Something to time: `reset` restores mutated inputs outside the timed window, `call` is timed."""

    def reset(self) -> None: ...

    def call(self) -> Any: ...


class Clocked(Protocol):
    """Tells the mean SM clock between two calls that enqueue stamps: `tuner.sm_clock.SmClock`, or a fake."""

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def mhz(self) -> float | None: ...


class Timer(Protocol):
    """Gives one sample in milliseconds. `name` says how it was taken and goes into the record."""

    @property
    def name(self) -> str: ...

    def sample(self, work: Work) -> float: ...


@dataclass(frozen=True)
class TimingPolicy:
    """How many samples, and when to stop. Part of a trial's identity: timings under two policies never mix.

    Attributes:
        warm_up_s: seconds of real load before the first sample: clocks settle in time, not in calls.
        min_samples: never fewer, unless racing drops the candidate.
        max_samples: rule `samples`: stop after as many.
        target_width: rule `interval`: stop once the interval is narrower than this fraction of the median.
        max_seconds: rule `time`: stop when the measurement has taken as long.
        race_factor: rule `racing`: drop what is slower than the incumbent by this factor in each of the first
            `race_samples` samples.
        race_samples: see `race_factor`.
    """

    warm_up_s: float = 0.1
    min_samples: int = 6
    max_samples: int = 30
    target_width: float = 0.02
    max_seconds: float = 1.0
    race_factor: float = 1.25
    race_samples: int = 2

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


CUDA_POLICY = TimingPolicy()
# One call may take most of a second on a CPU, and its clock has no 100 ms ramp.
CPU_POLICY = TimingPolicy(warm_up_s=0.02, min_samples=3, max_samples=12, target_width=0.05, max_seconds=1.5)


@dataclass(frozen=True)
class Measurement:
    """Every sample of one measurement, in milliseconds, and the rule that ended it."""

    samples_ms: tuple[float, ...]
    stopped_by: str
    timer: str

    @property
    def interval(self) -> Interval:
        return median_interval(self.samples_ms)

    @property
    def median_ms(self) -> float:
        return self.interval.median

    @property
    def raced_out(self) -> bool:
        return self.stopped_by == "racing"


def measure(
    work: Work,
    timer: Timer,
    policy: TimingPolicy,
    *,
    incumbent_ms: float = math.inf,
    clock: Clock = time.perf_counter,
) -> Measurement:
    """Warm up, then sample until a rule of the policy fires; the rule is recorded."""
    started = clock()
    _warm_up([work], timer, policy.warm_up_s, clock)
    samples: list[float] = []
    stopped_by = None
    while stopped_by is None:
        samples.append(timer.sample(work))
        stopped_by = _stop(samples, policy, incumbent_ms, clock() - started)
    return Measurement(tuple(samples), stopped_by, timer.name)


def _warm_up(works: Iterable[Work], timer: Timer, seconds: float, clock: Clock) -> None:
    """Once each, which may compile and does not count; then on in turn until the time is up."""
    works = list(works)
    for work in works:
        timer.sample(work)
    started = clock()
    while clock() - started < seconds:
        for work in works:
            timer.sample(work)


def _stop(samples: list[float], policy: TimingPolicy, incumbent_ms: float, elapsed_s: float) -> str | None:
    if len(samples) >= policy.race_samples and min(samples) > policy.race_factor * incumbent_ms:
        return "racing"
    if len(samples) < policy.min_samples:
        # A single call that exceeds the whole cap must not be repeated until the minimum is reached.
        return "time" if elapsed_s > 4 * policy.max_seconds else None
    if median_interval(samples).relative_width <= policy.target_width:
        return "interval"
    if len(samples) >= policy.max_samples:
        return "samples"
    return "time" if elapsed_s >= policy.max_seconds else None


def interleave(
    works: Mapping[str, Work],
    timer: Timer,
    *,
    min_rounds: int = 6,
    max_rounds: int = 25,
    max_seconds: float = 10.0,
    target_width: float = 0.02,
    warm_up_s: float = 0.0,
    clock: Clock = time.perf_counter,
) -> tuple[dict[str, list[float]], str]:
    """Samples of all works, one each a round, and the rule that ended it: `interval`, `samples` or `time`.

    The order rotates from round to round and every other round runs backwards, so that no work of three or
    more always follows the same one. Two alternate: the clock is then what the other leaves, and code is as
    cold as in a model (which costs 2 to 3 % of an MLP's 127 us on an H200). The rule `interval` asks that the
    ratio of each work to the first be known to that width.
    `time` may end it below `min_rounds`, but below `FEWEST` rounds only after three times `max_seconds`: one
    problem on an overloaded machine must not eat the time of all others.
    """
    names = list(works)
    samples: dict[str, list[float]] = {name: [] for name in names}
    _warm_up(works.values(), timer, warm_up_s, clock)
    started = clock()
    for completed in range(1, max_rounds + 1):
        for name in _order(names, completed - 1):
            samples[name].append(timer.sample(works[name]))
        elapsed = clock() - started
        if completed >= min_rounds and _settled(samples, names, target_width):
            return samples, "interval"
        if elapsed >= max_seconds and (completed >= FEWEST or elapsed >= 3 * max_seconds):
            return samples, "time"
    return samples, "samples"


def _order(names: list[str], round_number: int) -> list[str]:
    shift = round_number % len(names)
    rotated = names[shift:] + names[:shift]
    return rotated if round_number % 2 == 0 else rotated[::-1]


def _settled(samples: dict[str, list[float]], names: list[str], target_width: float) -> bool:
    first = samples[names[0]]
    return all(paired_ratio(samples[name], first).relative_width <= target_width for name in names[1:])


class CpuTimer:
    """`perf_counter` around the call, after walking through more memory than the last-level cache holds.

    Args:
        cache_bytes: size of the last-level cache.
    """

    def __init__(self, cache_bytes: int) -> None:
        # Twice the cache evicts it; more than 256 MiB would cost more than the kernels being timed.
        self._sweep = torch.zeros(min(max(2 * cache_bytes, 1 << 22), 1 << 28) // 8, dtype=torch.int64)
        self.name = f"cpu wall clock, cold cache (sweep of {self._sweep.nbytes >> 20} MiB), eager"

    def sample(self, work: Work) -> float:
        work.reset()
        self._sweep.add_(1)
        started = time.perf_counter()
        work.call()
        return (time.perf_counter() - started) * 1e3


class CudaTimer:
    """CUDA events around the call, with a cold L2 and the host's enqueue hidden.

    Before each sample the L2 is cleared by overwriting three times its size. A spin kernel ahead of the clear
    keeps the device busy for longer than the host needs to enqueue the call, so the device never waits for it
    inside the timed window; nothing synchronises between the clear and the start event.

    Args:
        device: whose current stream is timed.
        l2_bytes: size of its L2.
        sm_clock: watches the SM clock beside every sample, for `sm_clock_of`.
    """

    def __init__(self, device: torch.device, l2_bytes: int, sm_clock: Clocked | None = None) -> None:
        self._device = device
        self._sm_clock = sm_clock
        self._mhz: weakref.WeakKeyDictionary[Work, list[float | None]] = weakref.WeakKeyDictionary()
        self._clear = torch.empty(max(3 * l2_bytes, 1 << 25), dtype=torch.int8, device=device)
        self._cycles_per_ms = self._calibrate()
        self._enqueue_ms: weakref.WeakKeyDictionary[Work, float] = weakref.WeakKeyDictionary()
        self.name = f"cuda events, cold L2 (clear of {self._clear.nbytes >> 20} MiB), eager, enqueue hidden"

    def sample(self, work: Work) -> float:
        with torch.cuda.device(self._device):
            work.reset()
            hidden_ms = self._enqueue_ms.get(work, 2.0)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(int(hidden_ms * self._cycles_per_ms))
            self._clear.zero_()
            before = time.perf_counter()
            if self._sm_clock is not None:
                self._sm_clock.begin()
            start.record()
            work.call()
            end.record()
            enqueue_ms = (time.perf_counter() - before) * 1e3
            if self._sm_clock is not None:
                self._sm_clock.end()
                self._mhz.setdefault(work, []).append(self._sm_clock.mhz())
            end.synchronize()
        # The first call compiles; from the second on, twice the last enqueue time is ample and wastes little.
        self._enqueue_ms[work] = min(max(2.0 * enqueue_ms, 0.05), 5.0)
        return float(start.elapsed_time(end))

    def sm_clock_of(self, work: Work, samples: int) -> float | None:
        """Median SM clock in MHz of this work's last samples; None where it is not watched or cannot be told.

        The last only: what came before them, as warm-up or beside other work, had clocks of its own.
        """
        found = [mhz for mhz in self._mhz.get(work, [])[-samples:] if mhz is not None]
        return statistics.median(found) if found else None

    def honesty(self) -> float:
        """A spin of twice the cycles over one of the cycles, both timed: 2.0 where the timer is honest."""
        self._spin_ms(2_000_000)
        return self._spin_ms(4_000_000) / self._spin_ms(2_000_000)

    def _calibrate(self) -> float:
        for _ in range(3):
            self._spin_ms(1_000_000)
        return 1_000_000 / self._spin_ms(1_000_000)

    def _spin_ms(self, cycles: int) -> float:
        with torch.cuda.device(self._device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end))


def sm_clock_of(timer: Timer, work: Work, samples: int) -> float | None:
    """Median SM clock in MHz of the last samples of `work`; None where the timer watches none."""
    return timer.sm_clock_of(work, samples) if isinstance(timer, CudaTimer) else None

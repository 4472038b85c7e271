"""When sampling stops and why, in which order things are sampled, and what a CUDA sample consists of."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from tests.tuner.fakes import Clock, FakeTimer, ScriptedWork
from tuner.bench import watch
from tuner.measure import CpuTimer, CudaTimer, TimingPolicy, interleave, measure, sm_clock_of
from tuner.sm_clock import SmClock, clock_mhz

POLICY = TimingPolicy(
    warm_up_s=0.0, min_samples=6, max_samples=20, target_width=0.02, max_seconds=10.0, race_samples=2
)


def steady(ms: float) -> ScriptedWork:
    return ScriptedWork(lambda n: ms)


def noisy(ms: float) -> ScriptedWork:
    return ScriptedWork(lambda n: ms * (1.0 + 0.5 * (n % 3)))


@pytest.mark.parametrize(
    ("work", "incumbent_ms", "rule", "samples"),
    [
        (steady(5.0), float("inf"), "interval", 6),
        (noisy(5.0), float("inf"), "samples", 20),
        (noisy(2000.0), float("inf"), "time", 6),
        (steady(5.0), 1.0, "racing", 2),
        (steady(5.0), 4.5, "interval", 6),
    ],
)
def test_the_rule_that_ends_a_measurement_is_recorded(
    work: ScriptedWork, incumbent_ms: float, rule: str, samples: int
) -> None:
    timer = FakeTimer()
    found = measure(work, timer, POLICY, incumbent_ms=incumbent_ms, clock=timer.clock)
    assert (found.stopped_by, len(found.samples_ms)) == (rule, samples)
    assert found.raced_out == (rule == "racing")


def test_a_call_longer_than_the_cap_is_not_repeated_to_the_minimum() -> None:
    timer = FakeTimer()
    found = measure(steady(60_000.0), timer, POLICY, clock=timer.clock)
    assert found.stopped_by == "time" and len(found.samples_ms) < POLICY.min_samples


def test_racing_spares_a_candidate_with_one_good_sample() -> None:
    work = ScriptedWork(lambda n: 50.0 if n in (0, 1) else 1.0)  # the first call only warms up
    timer = FakeTimer()
    found = measure(work, timer, POLICY, incumbent_ms=1.0, clock=timer.clock)
    assert not found.raced_out and found.median_ms == 1.0


def test_warming_up_takes_time_not_calls_and_its_samples_do_not_count() -> None:
    policy = TimingPolicy(warm_up_s=0.1, min_samples=6, target_width=0.02)
    work = ScriptedWork(lambda n: 900.0 if n == 0 else 40.0 if n < 4 else 10.0)  # the first call compiles
    timer = FakeTimer()
    found = measure(work, timer, policy, clock=timer.clock)
    assert set(found.samples_ms) == {10.0}
    assert work.resets == work.calls == 1 + 3 + 6


def test_every_work_is_sampled_once_a_round_in_changing_order() -> None:
    works = {name: noisy(5.0) for name in "abc"}
    timer = FakeTimer()
    samples, rule = interleave(works, timer, min_rounds=6, max_rounds=6, target_width=-1.0, clock=timer.clock)
    assert rule == "samples" and {len(found) for found in samples.values()} == {6}
    names = {id(work): name for name, work in works.items()}
    order = "".join(names[id(work)] for work in timer.taken[3:])  # the first three warm up
    assert order == "abc" + "acb" + "cab" + "cba" + "bca" + "bac"


def test_drift_that_all_share_does_not_hide_a_difference() -> None:
    timer = FakeTimer(drift=lambda n: 1.0 + 0.02 * n)
    samples, _ = interleave({"a": steady(10.0), "b": steady(20.0)}, timer, clock=timer.clock)
    ratios = [b / a for a, b in zip(samples["a"], samples["b"], strict=True)]
    assert all(1.9 < ratio < 2.1 for ratio in ratios)


def test_rounds_end_in_time_but_not_below_three_unless_they_take_for_ever() -> None:
    timer = FakeTimer()
    samples, rule = interleave({"a": noisy(9e3), "b": noisy(9e3)}, timer, max_seconds=1.0, clock=timer.clock)
    assert rule == "time" and len(samples["a"]) == 1  # 18 s a round are far beyond any reason
    samples, rule = interleave({"a": noisy(400), "b": noisy(400)}, timer, max_seconds=1.0, clock=timer.clock)
    assert rule == "time" and len(samples["a"]) == 3


def test_the_cpu_timer_reads_a_sleep_and_restores_inputs_first() -> None:
    import time

    events: list[str] = []

    class Sleep:
        def reset(self) -> None:
            events.append("reset")

        def call(self) -> None:
            events.append("call")
            time.sleep(0.02)

    timer = CpuTimer(cache_bytes=1 << 20)
    assert 20.0 <= timer.sample(Sleep()) < 1000.0
    assert events == ["reset", "call"]


class FakeCuda:
    """Stands for `torch.cuda`: a device clock that only launches and spins move; every act is noted."""

    CYCLES_PER_MS = 1_500_000.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.device_ms = 0.0
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at = 0.0

            def record(self) -> None:
                fake.log.append("record")
                self.at = fake.device_ms

            def synchronize(self) -> None:
                fake.log.append("synchronize")

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "_sleep", self.spin, raising=False)
        empty = torch.empty
        monkeypatch.setattr(
            torch, "empty", lambda *shape, device, **kw: self.Memory(empty(*shape, **kw), self)
        )

    class Memory:
        def __init__(self, tensor: torch.Tensor, cuda: FakeCuda) -> None:
            self.nbytes, self._cuda = tensor.nbytes, cuda

        def zero_(self) -> None:
            self._cuda.log.append("clear")

    def spin(self, cycles: int) -> None:
        self.log.append("spin")
        self.device_ms += cycles / self.CYCLES_PER_MS

    def launch(self, ms: float) -> float:
        self.log.append("launch")
        self.device_ms += ms
        return ms


def test_a_cuda_sample_hides_the_enqueue_clears_the_cache_and_times_the_call_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    timer = CudaTimer(torch.device("cuda"), l2_bytes=50 << 20)
    cuda.log.clear()
    work = ScriptedWork(lambda n: cuda.launch(3.5))
    assert timer.sample(work) == pytest.approx(3.5)
    assert cuda.log == ["spin", "clear", "record", "launch", "record", "synchronize"]
    assert work.resets == 1
    assert "150 MiB" in timer.name


def test_the_cuda_timer_knows_its_own_honesty(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    timer = CudaTimer(torch.device("cuda"), l2_bytes=50 << 20)
    assert timer.honesty() == pytest.approx(2.0)


class ScriptedClock:
    """Gives these clocks, one a sample, and notes in the device's log when it was asked to stamp."""

    def __init__(self, log: list[str], *mhz: float | None) -> None:
        self._log, self._mhz = log, list(mhz)

    def begin(self) -> None:
        self._log.append("begin")

    def end(self) -> None:
        self._log.append("end")

    def mhz(self) -> float | None:
        return self._mhz.pop(0)


def test_the_clock_is_stamped_outside_of_the_timed_window_and_its_median_kept_by_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    clock = ScriptedClock(cuda.log, 1500.0, None, 1700.0, 1200.0)
    timer = CudaTimer(torch.device("cuda"), 50 << 20, clock)
    cuda.log.clear()
    work, other = ScriptedWork(lambda n: cuda.launch(1.0)), ScriptedWork(lambda n: cuda.launch(1.0))
    assert sm_clock_of(timer, work, 3) is None
    for _ in range(3):
        timer.sample(work)
    timer.sample(other)
    assert cuda.log[:8] == ["spin", "clear", "begin", "record", "launch", "record", "end", "synchronize"]
    assert sm_clock_of(timer, work, 3) == 1600.0  # what could not be told does not count
    assert sm_clock_of(timer, work, 2) == 1700.0  # nor does what was sampled before
    assert sm_clock_of(timer, other, 1) == 1200.0


def test_a_machine_whose_triton_cannot_compile_is_tuned_without_clocks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: SmClock, device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(SmClock, "__init__", broken)
    assert watch(torch.device("cuda")) is None
    assert "Failed to find C compiler" in caplog.text


def test_a_clock_is_cycles_over_time_on_one_multiprocessor() -> None:
    assert clock_mhz([1_000, 5_000, 7], [151_000, 105_000, 7]) == pytest.approx(1500.0)
    assert clock_mhz([1_000, 5_000, 7], [151_000, 105_000, 8]) is None
    assert clock_mhz([1_000, 5_000, 7], [151_000, 5_000, 7]) is None  # the nanoseconds did not advance
    assert clock_mhz([1_000, 5_000, 7], [900, 105_000, 7]) is None


@pytest.mark.gpu
def test_the_cuda_timer_is_honest_on_a_real_device() -> None:
    device = torch.device("cuda", 0)
    timer = CudaTimer(device, 50 << 20, watch(device))
    assert timer.honesty() == pytest.approx(2.0, rel=0.05)
    x = torch.randn(4096, 4096, device="cuda")
    matmul = ScriptedWork(lambda n: float((x @ x).shape[0]))
    assert 0.05 < timer.sample(matmul) < 1000
    # A spin of known cycles, timed by events and by stamps around it.
    spin = ScriptedWork(lambda n: float(torch.cuda._sleep(10_000_000) is None))
    ms = [timer.sample(spin) for _ in range(5)]
    clock = sm_clock_of(timer, spin, len(ms))
    assert clock == pytest.approx(1e4 / sorted(ms)[2], rel=0.03)


def test_the_fake_clock_stands_still_by_itself() -> None:
    assert Clock()() == 0.0

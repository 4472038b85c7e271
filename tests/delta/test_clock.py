"""The step clock: branches, and every sign of a new generation."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chipmunk_kernels.delta.clock import UNNAMED_BRANCHES, StepClock, Tick

SHAPE = ("shape",)


def test_counts_steps_per_branch() -> None:
    clock = StepClock()
    ticks = [clock.tick(SHAPE, branch=b, timestep=t) for t in (9.0, 5.0, 1.0) for b in ("cond", "uncond")]
    assert [(t.branch, t.step) for t in ticks] == [(b, s) for s in range(3) for b in ("cond", "uncond")]
    assert [t.fresh for t in ticks] == [True] + 5 * [False]


def test_reset_begins_anew() -> None:
    clock = StepClock()
    clock.tick(SHAPE, branch="cond", timestep=9.0)
    clock.tick(SHAPE, branch="cond", timestep=8.0)
    clock.reset()
    assert clock.tick(SHAPE, branch="cond", timestep=7.0) == Tick("cond", 0, True)


def test_a_rising_timestep_begins_a_generation() -> None:
    clock = StepClock()
    for timestep in (9.0, 7.0, 5.0):
        clock.tick(SHAPE, branch="cond", timestep=timestep)
    clock.tick(SHAPE, branch="uncond", timestep=5.0)
    assert clock.tick(SHAPE, branch="cond", timestep=9.0) == Tick("cond", 0, True)
    assert clock.tick(SHAPE, branch="uncond", timestep=9.0) == Tick("uncond", 0, False)


def test_another_signature_begins_a_generation() -> None:
    clock = StepClock()
    clock.tick(SHAPE, branch="cond")
    clock.tick(SHAPE, branch="cond")
    assert clock.tick(("other",), branch="cond") == Tick("cond", 0, True)


def test_branches_may_differ_in_signature() -> None:
    """Prompts of the two guidance branches may differ in length."""
    clock = StepClock()
    for step in range(3):
        assert clock.tick(("short",), branch="cond").step == step
        assert clock.tick(("long",), branch="uncond") == Tick("uncond", step, False)


def test_another_marker_begins_a_generation_without_a_timestep() -> None:
    clock, first, second = StepClock(), object(), object()
    clock.tick(SHAPE, branch="cond", marker=first)
    assert clock.tick(SHAPE, branch="cond", marker=first).step == 1
    assert clock.tick(SHAPE, branch="cond", marker=second) == Tick("cond", 0, True)
    assert clock.tick(SHAPE, branch="cond", marker=None).fresh


def test_unnamed_forwards_at_one_timestep_are_branches() -> None:
    clock = StepClock()
    ticks = [clock.tick(SHAPE, timestep=t) for t in (9.0, 9.0, 5.0, 5.0, 1.0, 1.0)]
    assert [t.step for t in ticks] == [0, 0, 1, 1, 2, 2]
    assert ticks[0].branch == ticks[2].branch != ticks[1].branch == ticks[3].branch
    again = clock.tick(SHAPE, timestep=9.0)
    assert again.fresh and again.step == 0 and again.branch == ticks[0].branch


def test_a_timing_loop_does_not_make_branches_without_end() -> None:
    clock = StepClock()
    assert len({clock.tick(SHAPE, timestep=1.0).branch for _ in range(20)}) == UNNAMED_BRANCHES


def test_unnamed_without_timesteps_is_one_branch() -> None:
    clock = StepClock()
    assert [clock.tick(SHAPE).step for _ in range(3)] == [0, 1, 2]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 3))
def test_generations_of_any_length_without_an_end_signal(lengths: list[int], branches: int) -> None:
    """Cut short or not: each generation starts high, so it is noticed, unless both have a single step."""
    clock = StepClock()
    for generation, length in enumerate(lengths):
        for step in range(length):
            for branch in range(branches):
                tick = clock.tick(SHAPE, branch=branch, timestep=100.0 + generation - step)
                assert tick.step == step

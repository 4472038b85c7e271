"""A whole tuning session on a fake kernel: what is tried, recorded, skipped, resumed and concluded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from chipmunk_kernels import registry
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.profiles import Entry, Profile
from tests.tuner.fakes import KERNEL, PROBLEM, FakeSettings, FakeTimer, fake_bench, fake_kernels
from tests.tuner.world import FITTING, ITEM, RIGHT, World, last
from tuner import evaluate, tuning
from tuner.build import DeviceLost, PoolBuilder, check
from tuner.hardware import Ceilings
from tuner.measure import CpuTimer
from tuner.search import Progress, Study, best_of_others
from tuner.session import Session
from tuner.space import Candidate, Space
from tuner.store import Outcome, Store
from tuner.tuning import Settings
from tuner.verify import Check
from tuner.workload import LabelledProblem


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(registry, "kernels", fake_kernels)
    return World(tmp_path)


def test_the_fastest_right_candidate_wins_and_every_other_is_recorded_with_its_reason(world: World) -> None:
    result = world.run()
    assert result.entry is not None
    assert result.entry.settings == {"speed": 2, "fault": "none"}
    assert result.counts == {"ok": 3, "wrong": 6, "error": 3, "out_of_resources": 3, "compile_error": 3}
    session = world.session()
    records = world.store.records(session.identity(ITEM))
    assert len(records) == FITTING
    by_fault = {r.identity.settings["fault"]: r.outcome for r in records}
    assert "error" in by_fault["wrong"].reason and by_fault["wrong"].error is not None
    assert "launch failed" in by_fault["raise"].reason
    assert "line 3" in by_fault["compile"].reason
    assert by_fault["none"].samples_ms


def test_the_default_comes_first_and_misfits_and_repeats_never_come(world: World) -> None:
    world.run()
    tried = world.tried()
    assert tried[0] == "8 none"
    assert len(tried) == len(set(tried)) == FITTING
    assert not any(name.startswith("6") for name in tried)


def test_evidence_says_how_the_numbers_came_about(world: World) -> None:
    entry = world.run().entry
    assert entry is not None
    evidence = entry.evidence
    assert evidence["verdict"] in ("faster", "tie", "dense is better")
    assert evidence["time"]["median_ms"] == 2.0 and evidence["time"]["samples"] >= 6
    assert evidence["dense_baseline"]["name"] == "Tensor.mean"
    assert evidence["speedup"]["median"] == pytest.approx(evidence["dense_baseline"]["median_ms"] / 2.0)
    assert evidence["runner_up"]["settings"] == {"speed": 4, "fault": "none"}
    assert evidence["over_default"]["median"] == pytest.approx(4.0)
    assert evidence["correctness"]["error"] <= evidence["correctness"]["budget"]
    assert evidence["timing"]["timer"] == "fake timer"
    assert evidence["search"]["stopped_by"] == "exhausted"
    assert {"noise_floor", "ideal", "toolchain", "kernel_source", "date"} <= set(evidence)
    assert Entry.from_mapping(entry.as_dict()) == entry


@pytest.mark.parametrize("persistent", [False, True])
def test_trials_limit_the_search_and_a_resumed_one_goes_on_where_it_ended(
    world: World, persistent: bool
) -> None:
    world.persistent = persistent
    world.run(trials=5)
    first = world.tried()
    result = world.run(trials=9)
    second = world.tried()
    assert (len(first), len(second)) == (5, 4)
    assert not set(first) & set(second)
    assert sum(result.counts.values()) == 9


def test_a_finished_problem_is_taken_from_the_store(world: World) -> None:
    first = world.run()
    again = world.run()
    assert again.reused and world.tried() == []
    assert again.entry == first.entry


def test_fresh_forgets(world: World) -> None:
    world.run()
    world.session().forget(ITEM)
    assert not world.run().reused
    assert len(world.tried()) == FITTING


@pytest.mark.parametrize("persistent", [False, True])
def test_a_kill_between_trials_loses_and_repeats_nothing(world: World, persistent: bool) -> None:
    world.persistent = persistent
    session = world.session()

    def kill(candidate: Candidate, outcome: Outcome) -> None:
        if len(world.builder.tasks) == 6:
            raise KeyboardInterrupt

    session.on_trial = kill
    with pytest.raises(KeyboardInterrupt):
        list(session.run((ITEM,)))
    before = world.tried()
    result = world.run()
    assert sorted([*before, *world.tried()]) == sorted(set(before) | set(world.tried()))
    assert len(before) + len(world.tried()) == FITTING
    assert sum(result.counts.values()) == FITTING


def test_edited_sources_outdate_what_is_recorded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run()
    monkeypatch.setattr(evaluate, "kernel_hash", lambda kernel: "edited")
    monkeypatch.setattr(tuning, "kernels_hash", lambda kernels: "edited")
    assert not world.run().reused
    assert len(world.tried()) == FITTING


def test_a_known_winner_of_a_like_problem_is_tried_second(world: World) -> None:
    like = dataclasses.replace(PROBLEM, rows=99)
    known = Profile(entries=(Entry(like, "torch", {"speed": 2, "fault": "none"}),))
    list(world.session(known=known, trials=2).run((ITEM,)))
    assert world.tried() == ["8 none", "2 none"]


def test_what_a_kernel_recommends_is_tried_after_the_default(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def presets(cls: type[FakeSettings]) -> tuple[FakeSettings, ...]:
        return FakeSettings(speed=6), FakeSettings(speed=2)  # the first fits nowhere

    monkeypatch.setattr(FakeSettings, "presets", classmethod(presets))
    world.run(trials=2)
    assert world.tried() == ["8 none", "2 none"]


def test_an_unknown_or_unfitting_winner_is_passed_over(world: World) -> None:
    strange = ({"speed": 6, "fault": "none"}, {"no": "such"}, {"speed": 3, "fault": "none"})
    known = Profile(entries=tuple(Entry(PROBLEM, "torch", settings) for settings in strange))
    list(world.session(known=known, trials=3).run((ITEM,)))
    assert len(world.tried()) == 3


def test_no_right_candidate_is_a_result_with_reasons(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(KERNEL, run=lambda x, size, settings: KERNEL.run(x, size, settings) * 2)
    monkeypatch.setattr(
        registry, "kernels", lambda backend: {"group_mean": wrong} if backend == "torch" else {}
    )
    result = world.run()
    assert result.entry is None and "wrong" in result.note


def test_a_candidate_that_fails_on_other_inputs_does_not_win(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = tuning.verify

    def picky(kernel: registry.Kernel, settings: FakeSettings, *rest: object) -> Check:
        if settings.speed == 2:
            return Check(1.0, 0.5, "small case, means")
        return verify(kernel, settings, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tuning, "verify", picky)
    result = world.run()
    assert result.entry is not None and result.entry.settings["speed"] == 4


def test_faster_than_the_roofline_is_invalid_not_a_win(world: World) -> None:
    session = world.session()
    bench = fake_bench(world.timer, world.builder)
    slow = dataclasses.replace(bench.ceilings, bandwidth_gbs=1e-6)  # one byte a microsecond
    bench.ceilings = slow
    session = Session(bench, world.store, None, Settings(), Profile.empty(), world.timer.clock)
    (result,) = last(session.run((ITEM,)))
    assert result.entry is None and result.counts["invalid"] == RIGHT
    outcomes = [record.outcome for record in world.store.records(session.identity(ITEM))]
    assert any("beats the roofline" in outcome.reason for outcome in outcomes)


def test_a_search_that_ran_out_of_time_goes_on_next_time(world: World) -> None:
    world.run(budget_s=0.1)
    first = world.tried()
    result = world.run(budget_s=1000.0)
    assert not result.reused and len(first) + len(world.tried()) == FITTING


def test_a_lost_device_ends_the_process_but_not_the_record(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "device_alive", lambda device: False)
    session = world.session()
    with pytest.raises(DeviceLost, match="launch failed"):
        list(session.run((ITEM,)))
    statuses = [record.outcome.status for record in world.store.records(session.identity(ITEM))]
    assert statuses[-1] == "error"


def test_nothing_to_run_says_why(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "kernels", lambda backend: {})
    result = world.run()
    assert result.entry is None and "no group_mean kernel" in result.note


def test_a_space_knows_its_size_and_its_misfits(world: World) -> None:
    space = Space(PROBLEM, registry.torch.device("cpu"))
    assert (space.size, len(space.candidates), len(space.defaults())) == (24, FITTING, 1)
    assert dict(space.misfits) == {"a speed of 6 never fits": 6}
    assert set(space.refused) == {"triton", "triton_hopper", "cupy", "cupy_hopper"}
    assert space.find("torch", {"speed": 6, "fault": "none"}) is None
    assert space.find("triton", {}) is None


def test_on_a_gpu_torch_takes_part_with_its_defaults_only(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = registry.torch.device("cuda")
    triton = dataclasses.replace(KERNEL, backend="triton")
    both = {"torch": {"group_mean": KERNEL}, "triton": {"group_mean": triton}}
    monkeypatch.setattr(registry, "kernels", lambda backend: both.get(backend, {}))
    monkeypatch.setattr(registry, "unavailable", lambda backend, device: None)
    space = Space(PROBLEM, cuda)
    keys = [candidate.kernel.backend for candidate in space.candidates.values()]
    assert keys.count("torch") == 1 and keys.count("triton") == FITTING
    assert [candidate.kernel.backend for candidate in space.defaults()] == ["torch", "triton"]

    study = Study(space, "both", None, seed=0)
    study.enqueue(space.defaults())
    proposed: list[Candidate] = []
    while (candidate := study.propose({c.key for c in proposed})) is not None:
        study.tell(candidate, Outcome("ok", median_ms=1.0))
        proposed.append(candidate)
    assert len(proposed) == len({c.key for c in proposed}) == FITTING + 1


def test_large_problems_get_fewer_workers(world: World) -> None:
    bench = fake_bench(world.timer)
    bench.hardware = dataclasses.replace(bench.hardware, memory_gib=141.0)
    small = Problem("sparse_attention", rows=4352, columns=4352, width=128, heads=24, density=0.165)
    large = Problem("colsum_attention", rows=119056, columns=119056, width=128, heads=24, group_size=192)
    assert bench.room_for(small) > 12
    assert 1 <= bench.room_for(large) <= 4


@pytest.mark.slow
def test_a_session_with_worker_processes_finds_and_records_the_same_way(tmp_path: Path) -> None:
    """The real torch backend, as on a GPU, where kernels are built beside the process that measures."""
    problem = Problem(
        "topk_columns", rows=64, columns=64, width=1, dtype="float32", group_size=64, density=0.2
    )
    store, timer = Store(tmp_path / "trials.db"), CpuTimer(1 << 20)
    bench = fake_bench(FakeTimer(), PoolBuilder(2, check))
    bench.timer = timer
    session = Session(bench, store, None, Settings(trials=3, budget_s=60.0), Profile.empty())
    try:
        (result,) = last(session.run((LabelledProblem("columns", problem),)))
    finally:
        bench.builder.close()
    assert result.entry is not None and result.counts == {"ok": 3}
    assert len(store.records(session.identity(LabelledProblem("any", problem)))) == 3


def test_calls_that_shapes_do_not_describe_are_searched_apart(tmp_path: Path) -> None:
    """A gather of each group's own rows beside one of a table: one problem to a profile, two to a store."""
    problem = Problem("gather_columns", rows=64, columns=64, width=64, group_size=64, density=0.2)
    items = (
        LabelledProblem("table", problem),
        LabelledProblem("own rows", problem, options=(("per_group", 1),)),
    )
    store = Store(tmp_path / "trials.db")
    bench = fake_bench(FakeTimer())
    bench.timer, bench.ceilings = CpuTimer(1 << 20), Ceilings(1e3, {"bfloat16": 1.0})
    session = Session(bench, store, None, Settings(trials=1, budget_s=60.0), Profile.empty())
    results = last(session.run(items))
    assert all(result.entry is not None and not result.reused for result in results)
    for item in items:
        (record,) = store.records(session.identity(item))
        assert record.identity.problem.get("per_group") == dict(item.options).get("per_group")
    assert session.forget(items[1]) == 1 and len(store.records(session.identity(items[0]))) == 1


def test_the_best_settings_of_each_other_backend_are_kept() -> None:
    """By the search's own timings, whatever failed left out."""
    every = [
        Candidate(dataclasses.replace(KERNEL, backend=backend), FakeSettings(speed=speed))
        for backend in ("torch", "triton", "cupy")
        for speed in (2, 4, 8)
    ]
    space = Space.__new__(Space)
    space.candidates = {candidate.key: candidate for candidate in every}
    times = [9.0, 8.0, None, 3.0, None, 2.0, 1.0, None, None]
    outcomes = {
        candidate.key: Outcome("wrong") if time is None else Outcome("ok", median_ms=time)
        for candidate, time in zip(every, times, strict=True)
    }
    best = best_of_others(space, Progress(outcomes), "cupy")
    assert best == {"triton": every[5].settings.as_dict(), "torch": every[1].settings.as_dict()}

"""How a session deals its time: a first round for every problem whatever it costs, then searches."""

from __future__ import annotations

from pathlib import Path

import pytest

from chipmunk_kernels import registry
from chipmunk_kernels.problem import Problem
from tests.tuner.fakes import FakeSettings, FakeTimer, fake_kernels
from tests.tuner.world import FITTING, World, last
from tuner.baselines import Baseline
from tuner.measure import Work
from tuner.problem import KernelWork
from tuner.space import Candidate
from tuner.store import Outcome
from tuner.tuning import Result
from tuner.workload import LabelledProblem


def item(rows: int) -> LabelledProblem:
    problem = Problem("group_mean", rows, 8, 8, dtype="float32", group_size=32)
    return LabelledProblem(f"{rows} rows", problem)


ITEMS = (item(900), item(70), item(80), item(90))
"""The largest first, as a workload may have it."""
SORTED = ["70 rows", "80 rows", "90 rows", "900 rows"]


class SlowTimer(FakeTimer):
    """A second for each sample of a kernel, and a thousand on the large problem."""

    def sample(self, work: Work) -> float:
        if isinstance(work, KernelWork):
            self.clock.now += 1000.0 if work.case.problem.rows == 900 else 1.0
        return super().sample(work)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    def presets(cls: type[FakeSettings]) -> tuple[FakeSettings, ...]:
        return (FakeSettings(speed=4),)

    monkeypatch.setattr(registry, "kernels", fake_kernels)
    monkeypatch.setattr(FakeSettings, "presets", classmethod(presets))
    made = World(tmp_path)
    made.timer = SlowTimer()
    return made


class Diary:
    """Runs a session and notes which problems were visited in which round, and what each visit tried."""

    def __init__(self, world: World, budget_s: float, **settings: object) -> None:
        self.visits: list[tuple[str, str, list[str]]] = []
        self.results: list[Result] = []
        session = world.session(budget_s=budget_s, **settings)  # type: ignore[arg-type]
        rounds: list[str] = []
        session.on_round = lambda name, problems: rounds.append(name)
        session.on_problem = lambda label: self.visits.append((rounds[-1], label, []))
        session.on_trial = self._trial
        for result in session.run(ITEMS):
            self.results.append(result)
        self.last = {result.item.label: result for result in last(self.results)}

    def _trial(self, candidate: Candidate, outcome: Outcome) -> None:
        settings = candidate.settings.as_dict()
        self.visits[-1][2].append(f"{settings['speed']} {settings['fault']}")

    def visited(self, name: str) -> list[str]:
        return [label for kind, label, _ in self.visits if kind == name]

    def tried(self, name: str) -> dict[str, list[str]]:
        return {label: trials for kind, label, trials in self.visits if kind == name}

    def stopped_by(self) -> dict[str, str]:
        found = {label: result.entry for label, result in self.last.items()}
        return {
            label: entry.evidence["search"]["stopped_by"] if entry else "" for label, entry in found.items()
        }


def test_a_budget_that_lasts_for_nothing_gives_every_problem_its_first_round(world: World) -> None:
    """The large and slow one at the end, too: default and recommendation tried, finals held, an entry."""
    diary = Diary(world, budget_s=0.1)
    assert diary.visited("first round") == SORTED and diary.visited("search") == []
    assert diary.tried("first round") == {label: ["8 none", "4 none"] for label in SORTED}
    assert diary.stopped_by() == dict.fromkeys(SORTED, "first round")
    assert all(result.entry and result.entry.settings["speed"] == 4 for result in diary.results)


def test_no_search_begins_before_every_first_round_is_done(world: World) -> None:
    diary = Diary(world, budget_s=1e6)
    assert [kind for kind, _, _ in diary.visits] == ["first round"] * 4 + ["search"] * 4
    assert diary.stopped_by() == dict.fromkeys(SORTED, "exhausted")
    assert all(sum(result.counts.values()) == FITTING for result in diary.last.values())
    assert all(result.entry and result.entry.settings["speed"] == 2 for result in diary.last.values())


def test_what_a_search_overdraws_later_searches_lack_and_no_first_round(world: World) -> None:
    """Some first rounds' cost is known from a run without a search; a little more than that is left over."""
    started = world.timer.clock.now
    Diary(world, budget_s=0.1)
    first_rounds_s = world.timer.clock.now - started
    for each in ITEMS:
        world.session().forget(each)
    diary = Diary(world, budget_s=first_rounds_s + 8.0)
    assert diary.visited("first round") == SORTED
    searched = diary.visited("search")
    assert 0 < len(searched) < 4 and searched == SORTED[: len(searched)]
    stopped_by = diary.stopped_by()
    assert [label for label in SORTED if stopped_by[label] == "time"] == searched
    assert all(result.entry for result in diary.last.values())

    again = Diary(world, budget_s=1e6)
    assert list(again.tried("first round").values()) == [[], *[["2 none"]] * 3], "only what others won with"
    assert again.visited("search")[0] not in searched, "who has been searched least comes first"


def test_shares_are_equal_and_what_is_left_over_goes_on(world: World) -> None:
    """With time for all the small ones' candidates, all that they leave goes to the large one."""
    Diary(world, budget_s=0.1)
    diary = Diary(world, budget_s=4 * 1000.0)
    stopped_by = diary.stopped_by()
    assert [stopped_by[label] for label in SORTED] == ["exhausted"] * 3 + ["time"]
    assert len(diary.tried("search")["900 rows"]) >= 1


def test_trials_limit_both_rounds_together(world: World) -> None:
    diary = Diary(world, budget_s=1e6, trials=1)
    assert diary.tried("first round") == {label: ["8 none"] for label in SORTED}
    assert diary.visited("search") == [] and set(diary.stopped_by().values()) == {"trials"}
    more = Diary(world, budget_s=1e6, trials=5)
    assert {label: len(tried) for label, tried in more.tried("search").items()} == dict.fromkeys(SORTED, 3)


def test_winners_that_came_up_since_are_tried_first_in_a_search(world: World) -> None:
    diary = Diary(world, budget_s=1e6)
    tried = diary.tried("search")
    assert all(tried[label][0] == "2 none" for label in SORTED[1:])


def test_a_search_that_finds_nothing_faster_leaves_the_verdict(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No baseline is timed again, and the entry says what has been tried by now."""
    fastest = classmethod(lambda cls: (FakeSettings(speed=2),))
    monkeypatch.setattr(FakeSettings, "presets", fastest)
    rounds: list[int] = []
    session = world.session(budget_s=1e6)
    session.on_round = lambda name, problems: rounds.append(len(world.timer.taken))
    before, after = session.run((item(70),))
    assert any(isinstance(work, Baseline) for work in world.timer.taken[: rounds[1]])
    assert not any(isinstance(work, Baseline) for work in world.timer.taken[rounds[1] :])
    assert before.entry and after.entry and before.entry.settings == after.entry.settings
    assert before.entry.evidence["speedup"] == after.entry.evidence["speedup"]
    assert after.entry.evidence["search"]["stopped_by"] == "exhausted"
    assert sum(after.counts.values()) == FITTING > sum(before.counts.values())
    (reused,) = world.session().run((item(70),))
    assert reused.reused and reused.entry == after.entry


def test_trials_recorded_after_the_verdict_are_judged_by_the_next_run(world: World) -> None:
    """A kill in the second round: the faster candidate is on record, the entry knows nothing of it."""
    session = world.session(budget_s=1e6)

    def kill(candidate: Candidate, outcome: Outcome) -> None:
        if candidate.settings == FakeSettings(speed=2):
            raise KeyboardInterrupt

    session.on_trial = kill
    run = session.run((item(70),))
    first = next(run)
    assert first.entry and first.entry.settings["speed"] == 4
    with pytest.raises(KeyboardInterrupt):
        next(run)
    before = world.tried()
    (result,) = last(world.session(budget_s=0.1).run((item(70),)))
    assert result.entry and result.entry.settings["speed"] == 2 and not result.reused
    assert world.tried() == before, "no trial of the first round was repeated"


def test_a_problem_that_fails_in_its_search_keeps_its_entry(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("tuner.tuning.Tuning.search_on", fail)
    before, after = world.session(budget_s=1e6).run((item(70),))
    assert after.entry == before.entry and "out of memory" in after.note

"""One store on disk and a session for each run of the command, on a fake kernel with a fake clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from chipmunk_kernels.profiles import Profile
from tests.tuner.fakes import PROBLEM, FakeTimer, fake_bench
from tuner.build import Answer, InlineBuilder, Task, check
from tuner.search import open_storage
from tuner.session import Session
from tuner.store import Store
from tuner.tuning import Result, Settings
from tuner.workload import LabelledProblem

ITEM = LabelledProblem("a problem", PROBLEM)
# 4 speeds × 6 faults, of which the 6 of speed 6 never fit.
FITTING, RIGHT = 18, 3


class NoteTaker(InlineBuilder):
    """Builds as usual and notes what was built."""

    def __init__(self) -> None:
        super().__init__(check)
        self.tasks: list[Task] = []

    def run(self, tasks: Sequence[Task], limit_s: float) -> Iterator[tuple[int, Answer]]:
        self.tasks += tasks
        return super().run(tasks, limit_s)


def last(results: Iterable[Result]) -> list[Result]:
    """The result that stands for each problem, in the order in which they were first visited."""
    return list({result.item: result for result in results}.values())


class World:
    """One store on disk, and a session for each run of the command."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "trials.db"
        self.store = Store(self.path)
        # Optuna's tables cost a quarter of a second a session: for the tests that are about them only.
        self.persistent = False
        self.timer, self.builder = FakeTimer(), NoteTaker()

    def session(self, known: Profile | None = None, **settings: object) -> Session:
        bench = fake_bench(self.timer, self.builder)
        values = Settings(**{"budget_s": 1000.0, **settings})  # type: ignore[arg-type]
        storage = open_storage(self.path) if self.persistent else None
        return Session(bench, self.store, storage, values, known or Profile.empty(), self.timer.clock)

    def run(self, **settings: object) -> Result:
        self.builder.tasks.clear()
        return last(self.session(**settings).run((ITEM,)))[0]  # type: ignore[arg-type]

    def tried(self) -> list[str]:
        return [f"{task.settings['speed']} {task.settings['fault']}" for task in self.builder.tasks]

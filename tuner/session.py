"""One run of the tuner: every problem of a workload, from candidates to a profile entry.

Two rounds share the time. In the first every problem gets what is known beforehand tried, and an entry,
whatever that takes: a profile with holes where the large problems should be is worth less than a search.
What is left is dealt to those problems in equal shares for a search. What one does not use, later ones get;
what one overdraws, later searches lack, and no first round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import optuna
import torch

from chipmunk_kernels.profiles import Entry, Profile
from tuner.bench import Bench
from tuner.build import DeviceLost, device_alive
from tuner.errors import failure
from tuner.space import Candidate
from tuner.store import Identity, Outcome, Store
from tuner.tuning import FINALS_SHARE, SEARCH_SHARE, Result, Settings, Tuning
from tuner.workload import LabelledProblem


class Session:
    """Tunes problems one after the other.

    Args:
        bench: the device.
        store: where outcomes are recorded.
        study_storage: Optuna's storage, None for memory.
        settings: see there.
        known: a profile whose entries are tried as transferred winners.
        clock: monotonic seconds.

    Attributes:
        on_round: called with a round's name and the number of its problems.
        on_problem: called with the label of the problem that is next.
        on_trial: called with every candidate that was tried, once it is recorded.
    """

    def __init__(
        self,
        bench: Bench,
        store: Store,
        study_storage: optuna.storages.BaseStorage | None,
        settings: Settings,
        known: Profile,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bench, self._store, self._study_storage = bench, store, study_storage
        self._settings, self._clock = settings, clock
        self._winners: list[Entry] = list(known.entries)
        self.on_round: Callable[[str, int], None] = lambda name, problems: None
        self.on_problem: Callable[[str], None] = lambda label: None
        self.on_trial: Callable[[Candidate, Outcome], None] = lambda candidate, outcome: None

    def run(self, items: tuple[LabelledProblem, ...]) -> Iterator[Result]:
        """Tune each problem: a result of each after its first round, and another, which replaces it, of each
        that is searched on. Each is yielded as soon as there is one."""
        deadline = self._clock() + self._settings.budget_s
        # Small problems first: what wins there is known when the large ones' expensive turn comes.
        ordered = sorted(items, key=lambda item: self._bench.ideal_ms(item.problem, item.options))
        share = 1.0 - SEARCH_SHARE[self._bench.hardware.kind]
        finals_s = FINALS_SHARE * max(1.0, share * self._settings.budget_s / max(1, len(items)))
        searched: list[tuple[Tuning, Result]] = []
        self.on_round("first round", len(ordered))
        for item in ordered:
            self.on_problem(item.label)
            tuning = self._tuning(item)
            result = self._visit(tuning.first_round, finals_s)
            if isinstance(result, str):
                yield Result(item, note=f"could not be tuned: {result}")
                continue
            yield result
            if not tuning.done:
                searched.append((tuning, result))
        # Least tried first: a short run that is repeated comes to search all of them.
        searched.sort(key=lambda pair: pair[0].tried)
        yield from self._search(searched, deadline)

    def _search(self, searched: list[tuple[Tuning, Result]], deadline: float) -> Iterator[Result]:
        """The second round: equal shares of what is left of the time."""
        self.on_round("search", len(searched))
        for number, (tuning, result) in enumerate(searched):
            left = deadline - self._clock()
            if left <= 0:
                return
            self.on_problem(tuning.item.label)
            found = self._visit(tuning.search_on, left / (len(searched) - number))
            if isinstance(found, str):
                found = replace(result, note=f"the search ended early: {found}")
            yield found

    def _visit(self, visit: Callable[[Sequence[Entry], float], Result], seconds: float) -> Result | str:
        """What a visit to a problem gives, or why it failed. A later problem may learn from its winner."""
        if self._bench.device.type == "cuda":
            # What the last problem left cached here would be missing to the workers.
            torch.cuda.empty_cache()
        try:
            result = visit(self._winners, seconds)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, DeviceLost) or not device_alive(str(self._bench.device)):
                raise
            return failure(error).reason
        if result.entry is not None:
            others = [entry for entry in self._winners if entry.problem != result.entry.problem]
            self._winners = [result.entry, *others]
        return result

    def _tuning(self, item: LabelledProblem) -> Tuning:
        identity = self.identity(item)
        tuning = Tuning(
            item, self._bench, self._store, self._study_storage, self._settings, identity, self._clock
        )
        tuning.on_trial = self.on_trial
        return tuning

    def forget(self, item: LabelledProblem) -> int:
        """Drop what is recorded of a problem on this device; returns how many trials that were."""
        return self._store.forget(self.identity(item))

    def identity(self, item: LabelledProblem) -> Identity:
        """What makes recorded timings of this problem apply to this run."""
        hardware = self._bench.hardware
        return Identity(
            problem={**item.problem.as_dict(), **dict(item.options)},
            device={"name": hardware.name, "arch": hardware.arch},
            toolchain=self._bench.toolchain,
            timing={"timer": self._bench.timer.name, **self._bench.policy.as_dict()},
        )

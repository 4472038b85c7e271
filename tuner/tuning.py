"""One problem's tuning in two visits: a first round that gives an entry, and a search that may better it.

The first round tries what is known beforehand: every backend's defaults, what kernels recommend, winners of
like problems. Finals of both visits are held on what is verified twice, on inputs of two seeds.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import optuna

from chipmunk_kernels.profiles import Entry
from tuner.baselines import Baseline, baselines
from tuner.bench import Bench
from tuner.errors import failure
from tuner.evaluate import Evaluator
from tuner.evidence import evidence, search_evidence
from tuner.finals import find_crossover, run_finals
from tuner.measure import measure
from tuner.problem import Case, make_case
from tuner.search import Progress, Study, best_of_others, search
from tuner.sources import kernels_hash
from tuner.space import Candidate, Space
from tuner.store import Identity, Outcome, Store
from tuner.verify import Check, verify
from tuner.workload import LabelledProblem

SEARCH_SHARE = {"cpu": 0.5, "cuda": 0.75}
"""Of a problem's time. Where kernels are compiled the search is what takes long."""
FINALS_SHARE = 0.6
"""Of what the search leaves."""
FIRST_FINALISTS = 2
"""Of a first round, the default besides: its few candidates leave little to luck, and verifying one more on
other inputs takes seconds over a video."""
TRANSFERS = 6
"""Settings of like problems that are tried: each is built and verified, over a video for seconds."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How to run: what the command line says.

    Attributes:
        seed: of inputs and sampler.
        trials: candidates per problem, None for as many as time allows.
        budget_s: seconds for the whole run.
        finalists: how many candidates reach the finals, the default besides.
    """

    seed: int = 0
    trials: int | None = None
    budget_s: float = 120.0
    finalists: int = 2


@dataclass
class Result:
    """What became of one problem.

    Attributes:
        item: the problem and its label.
        entry: for the profile; None where nothing that is right could be timed.
        share: of the ideal time.
        counts: how many candidates had which status.
        note: why there is no entry, or what is to be known about it.
        reused: the entry comes from an earlier run.
    """

    item: LabelledProblem
    entry: Entry | None = None
    share: float | None = None
    counts: dict[str, int] = field(default_factory=dict)
    note: str = ""
    reused: bool = False


class Tuning:
    """A problem with what is known of its candidates. Holds no tensors between visits: a video's fill the
    device.

    Args:
        item: the problem.
        bench: the device.
        store: where outcomes are recorded.
        study_storage: Optuna's storage, None for memory.
        settings: see there.
        identity: what makes recorded timings of this problem apply to this run.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        item: LabelledProblem,
        bench: Bench,
        store: Store,
        study_storage: optuna.storages.BaseStorage | None,
        settings: Settings,
        identity: Identity,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.item, self._bench, self._store, self._study_storage = item, bench, store, study_storage
        self._settings, self._identity, self._clock = settings, identity, clock
        self._space = Space(item.problem, bench.device, bench.hardware.shared_memory_bytes)
        self._key = f"{identity.context} {kernels_hash(self._space.kernels)}"
        self._evaluator = Evaluator(bench, store, identity, settings.seed + 1, clock)
        self._progress = Progress()
        self._entry: Entry | None = None
        self._checks: dict[str, Check] = {}
        self._judged: set[str] = set()
        self._dense: str | None = None
        self.on_trial: Callable[[Candidate, Outcome], None] = lambda candidate, outcome: None

    @property
    def tried(self) -> int:
        """Candidates with a record, earlier runs included."""
        return len(self._progress.outcomes)

    @property
    def done(self) -> bool:
        """Whether a search has nothing to add: all tried, or as many as are asked for."""
        return self._progress.stopped_by in ("exhausted", "trials")

    def first_round(self, known: Sequence[Entry], finals_s: float) -> Result:
        """Try defaults, recommendations and the winners of like problems among `known`, whatever that takes,
        then hold finals of about `finals_s` seconds.

        The entry of an earlier run stands where it has seen all of these and all that is recorded.
        """
        self._progress.stopped_by = "exhausted"
        if not self._space.candidates:
            return Result(self.item, note="nothing can run it here: " + _reasons(self._space))
        self._progress.outcomes = self._evaluator.recorded(self._space)
        miss = None if self._progress.outcomes else self._store.explain(self._identity)
        if miss:
            _log.warning("%s: recorded trials do not apply: %s", self.item.label, miss)
        first = [*self._defaults(), *self._space.presets(), *self._transferred(known)]
        earlier = self._store.verdict(self._key)
        if earlier is not None and self._stands(earlier, first):
            self._entry = self._with_others(Entry.from_mapping(earlier))
            self._judged = _judged(self._entry, self._space)
            return self._result(reused=True)
        self._study.enqueue(first)
        case = self._case()
        self._search(case, known_only=True)
        return self._conclude(case, finals_s, min(FIRST_FINALISTS, self._settings.finalists))

    def search_on(self, known: Sequence[Entry], seconds: float) -> Result:
        """Search for about `seconds`, winners of like problems that have come up since the first round ahead,
        then finals where a new candidate looks faster than the entry's."""
        started = self._clock()
        self._study.enqueue(self._transferred(known))
        case = self._case()
        self._search(case, deadline=started + SEARCH_SHARE[self._bench.hardware.kind] * seconds)
        if self._entry is not None and not self._is_challenged(self._entry):
            entry = self._with_others(self._entry)
            entry = replace(entry, evidence={**entry.evidence, "search": search_evidence(self._progress)})
            return self._concluded(entry)
        left = max(started + seconds - self._clock(), 1.0)
        return self._conclude(case, FINALS_SHARE * left, self._settings.finalists)

    def _case(self) -> Case:
        problem, seed = self.item.problem, self._settings.seed
        return make_case(problem, self._bench.device, seed, options=self.item.options)

    def _stands(self, earlier: dict[str, Any], first: list[Candidate]) -> bool:
        """Whether an earlier entry needs no new finals, and what that leaves to a search.

        It stands where its search tried everything or as many as are asked for now; else only if nothing of
        a first round is untried and no trial was recorded after it, as before a kill.
        """
        wanted = self._settings.trials
        before = earlier["evidence"]["search"]
        seen = sum(before["statuses"].values())
        if before["stopped_by"] == "exhausted" or (wanted is not None and seen >= wanted):
            return True
        self._progress.stopped_by = "first round"
        untried = [candidate for candidate in first if candidate.key not in self._progress.outcomes]
        return not untried and seen == self.tried

    @cached_property
    def _study(self) -> Study:
        name = f"{self.item.problem.key} {self._key}"
        return Study(self._space, name, self._study_storage, self._settings.seed)

    def _search(self, case: Case, *, known_only: bool = False, deadline: float = math.inf) -> None:
        def evaluate(batch: list[Candidate]) -> Iterator[tuple[Candidate, Outcome]]:
            for candidate, outcome in self._evaluator.run(batch, case, self._progress.best_ms):
                self.on_trial(candidate, outcome)
                yield candidate, outcome

        search(
            self._study,
            evaluate,
            self._progress,
            width=min(self._bench.builder.width, self._bench.room_for(self.item.problem)),
            trials=self._settings.trials,
            deadline=deadline,
            known_only=known_only,
            clock=self._clock,
        )

    def _defaults(self) -> list[Candidate]:
        """With few `trials` the kernels come before the fallback."""
        return sorted(self._space.defaults(), key=lambda candidate: candidate.kernel.backend == "torch")

    def _transferred(self, known: Sequence[Entry]) -> list[Candidate]:
        """Winners of like problems, nearest first: earlier in this run, or in a profile."""
        problem = self.item.problem
        near = [entry for entry in known if not math.isinf(entry.problem.distance(problem))]
        near.sort(key=lambda entry: entry.problem.distance(problem))
        named = [(entry.backend, entry.settings) for entry in near[:4]]
        named += [other for entry in near[:2] for other in entry.other_backends.items()]
        found = (self._space.find(backend, settings) for backend, settings in named)
        return list({each.key: each for each in found if each is not None}.values())[:TRANSFERS]

    def _is_challenged(self, entry: Entry) -> bool:
        """Whether a candidate that no finals have judged was faster in the search than the entry's winner."""
        winner = self._space.find(entry.backend, entry.settings)
        outcome = self._progress.outcomes.get(winner.key) if winner else None
        if outcome is None or outcome.median_ms is None:
            return True
        ranking = self._progress.ranking()
        new = [key for key in ranking if key not in self._judged and key not in self._checks]
        return bool(new) and (self._progress.outcomes[new[0]].median_ms or math.inf) < outcome.median_ms

    def _conclude(self, case: Case, finals_s: float, most: int) -> Result:
        """Finals among the `most` best that also pass on fresh inputs, then the entry."""
        finalists = self._finalists(case, most)
        if not finalists:
            note = "no candidate gave a right answer: " + _worst(self._progress)
            return Result(self.item, counts=self._progress.statuses(), note=note)
        timer, policy = self._bench.timer, self._bench.policy
        dense = self._fastest_baseline(case)
        finals = run_finals(case, finalists, dense, timer, finals_s, policy.warm_up_s)
        self._judged |= {candidate.key for candidate in finalists}
        winner = self._space.candidates[finals.winner]
        speedup, seed = finals.speedup.median, self._settings.seed
        crossover = find_crossover(winner, case, dense, speedup, seed, timer, 2 * policy.max_seconds)
        check, progress = self._checks[finals.winner], self._progress
        entry = Entry(
            case.problem,
            winner.kernel.backend,
            winner.settings.as_dict(),
            evidence(self._bench, case, winner, finals, dense, progress, check, crossover),
            crossover.density if crossover else None,
        )
        return self._concluded(self._with_others(entry))

    def _concluded(self, entry: Entry) -> Result:
        self._entry = entry
        self._store.save_verdict(self._key, entry.as_dict())
        return self._result()

    def _with_others(self, entry: Entry) -> Entry:
        """With the best settings of every other backend that has a right and timed candidate on record, also
        where an earlier run wrote the entry: machines that cannot run the winner look for theirs there."""
        failed = {key for key, check in self._checks.items() if not check.ok}
        others = best_of_others(self._space, self._progress, entry.backend, failed)
        return replace(entry, other_backends={**entry.other_backends, **others})

    def _fastest_baseline(self, case: Case) -> Baseline:
        found = baselines(case, self._dense)
        times: list[float] = []
        for one in found if len(found) > 1 else ():
            # One that is far behind is soon dropped: over a video, a call takes half a second.
            best_ms = min(times, default=math.inf)
            measured = measure(one, self._bench.timer, self._bench.policy, incumbent_ms=best_ms)
            times.append(measured.median_ms)
        fastest = found[times.index(min(times))] if times else found[0]
        self._dense = fastest.name
        return fastest

    def _finalists(self, case: Case, most: int) -> list[Candidate]:
        """The fastest and the fastest default, each verified once more on other inputs."""
        ranking = [self._space.candidates[key] for key in self._progress.ranking()]
        defaults = [candidate for candidate in ranking if candidate.is_default][:1]
        chosen: list[Candidate] = []
        for candidate in ranking:
            if candidate not in defaults and len(chosen) >= most:
                continue
            if candidate.key not in self._checks:
                check = self._checks[candidate.key] = self._check_again(candidate, case)
                if not check.ok:
                    _log.warning("%s passed once, failed on other inputs: %s", candidate.key, check.explain())
            if self._checks[candidate.key].ok:
                chosen.append(candidate)
        return chosen

    def _check_again(self, candidate: Candidate, case: Case) -> Check:
        seed = self._settings.seed + 1000
        try:
            return verify(candidate.kernel, candidate.settings, case.problem, case.device, seed, case.options)
        except Exception as error:  # whatever a candidate throws is a datum
            return Check(math.inf, 0.0, "", failure(error).reason)

    def _result(self, reused: bool = False) -> Result:
        assert self._entry is not None
        share, search = self._entry.evidence["ideal"]["share"], self._entry.evidence["search"]
        return Result(self.item, self._entry, share, search["statuses"], reused=reused)


def _judged(entry: Entry, space: Space) -> set[str]:
    """Keys that the finals of an earlier run are known to have judged."""
    named = [(entry.backend, entry.settings)]
    second = entry.evidence.get("runner_up")
    named += [(second["backend"], second["settings"])] if second else []
    found = [space.find(backend, settings) for backend, settings in named]
    return {candidate.key for candidate in found if candidate is not None}


def _reasons(space: Space) -> str:
    refused = [f"{backend}: {reason}" for backend, reason in space.refused.items()]
    misfits = [f"{count} settings: {reason}" for reason, count in space.misfits.most_common(3)]
    return "; ".join([*refused, *misfits])


def _worst(progress: Progress) -> str:
    """The reasons there were, the most frequent first."""
    reasons = Counter(f"{outcome.status}: {outcome.reason}" for outcome in progress.outcomes.values())
    return "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))

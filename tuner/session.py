"""One run of the tuner: every problem of a workload, from candidates to a profile entry.

Time is shared out: each problem gets an equal part of what is left, half of it for the search, the rest
for the baseline, the finals and the density crossover. What a problem does not use, later ones get.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import optuna

from chipmunk_kernels.problem import Problem
from chipmunk_kernels.profiles import Entry, Profile
from tuner.baselines import Baseline, baselines
from tuner.bench import ROOFLINE_MARGIN, Bench, sm_clock
from tuner.build import Answer, Task, device_alive
from tuner.errors import failure, wall_limit
from tuner.evidence import evidence
from tuner.finals import find_crossover, run_finals
from tuner.measure import Measurement, measure
from tuner.problem import Case, KernelWork, make_case
from tuner.search import Progress, Study, best_of_others, search
from tuner.sources import kernel_hash, kernels_hash
from tuner.space import Candidate, Space
from tuner.statistics import significant
from tuner.store import Identity, Outcome, Store
from tuner.verify import Check, verify
from tuner.workload import LabelledProblem

SEARCH_SHARE = {"cpu": 0.5, "cuda": 0.75}
"""Of a problem's time. Where kernels are compiled the search is what takes long."""
FINALS_SHARE = 0.6
"""Of what the search leaves."""
CANDIDATE_LIMIT_S = 60.0
"""What one candidate may take to build and verify, and again to be timed. Never a share of the budget: a
recorded timeout must say something about the candidate, not about how late it came."""
_log = logging.getLogger(__name__)


class DeviceLost(RuntimeError):
    """The device's context is gone; this process cannot go on, another can."""


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


class Session:
    """Tunes problems one after the other.

    Args:
        bench: the device.
        store: where outcomes are recorded.
        study_storage: Optuna's storage, None for memory.
        settings: see there.
        known: a profile whose entries are tried as transferred winners.
        clock: monotonic seconds.
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
        self.on_problem: Callable[[str], None] = lambda label: None
        self.on_trial: Callable[[Candidate, Outcome], None] = lambda candidate, outcome: None

    def run(self, items: tuple[LabelledProblem, ...]) -> Iterator[Result]:
        """Tune each problem, the small ones first; a result is yielded as soon as there is one."""
        deadline = self._clock() + self._settings.budget_s
        # Small problems need less than their share: what they leave is worth most to the large ones.
        ordered = sorted(items, key=lambda item: self._bench.ideal_ms(item.problem, item.options))
        for number, item in enumerate(ordered):
            left = deadline - self._clock()
            if left <= 0 and number:
                yield Result(item, note=f"not reached within the budget of {self._settings.budget_s:.0f} s")
                continue
            self.on_problem(item.label)
            try:
                result = self.tune(item, max(left, 0.0) / (len(items) - number))
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, DeviceLost) or not device_alive(str(self._bench.device)):
                    raise
                result = Result(item, note=f"could not be tuned: {failure(error).reason}")
            if result.entry is not None:
                self._winners.insert(0, result.entry)
            yield result

    def tune(self, item: LabelledProblem, seconds: float) -> Result:
        """Search, finals and evidence of one problem, within about `seconds`."""
        started = self._clock()
        problem = item.problem
        space = Space(problem, self._bench.device, self._bench.hardware.shared_memory_bytes)
        if not space.candidates:
            return Result(item, note="nothing can run it here: " + _reasons(space))
        identity = self.identity(item)
        key = f"{identity.context} {kernels_hash(space.kernels)}"
        earlier = self._store.verdict(key)
        if earlier is not None and self._is_enough(earlier["evidence"]["search"]):
            return self._result(item, Entry.from_mapping(earlier), reused=True)
        case = make_case(problem, self._bench.device, self._settings.seed, options=item.options)
        dense = self._fastest_baseline(case)
        share = SEARCH_SHARE[self._bench.hardware.kind]
        progress = self._search(item, space, identity, case, started + share * seconds, key)
        return self._conclude(item, space, case, dense, progress, started + seconds, key)

    def forget(self, item: LabelledProblem) -> int:
        """Drop what is recorded of a problem on this device; returns how many trials that were."""
        return self._store.forget(self.identity(item))

    def _is_enough(self, earlier: dict[str, Any]) -> bool:
        """Whether an earlier search left nothing to do: all tried, or as many as are asked for now."""
        wanted, tried = self._settings.trials, sum(earlier["statuses"].values())
        return earlier["stopped_by"] == "exhausted" or (wanted is not None and tried >= wanted)

    def identity(self, item: LabelledProblem) -> Identity:
        """What makes recorded timings of this problem apply to this run."""
        hardware = self._bench.hardware
        return Identity(
            problem={**item.problem.as_dict(), **dict(item.options)},
            device={"name": hardware.name, "arch": hardware.arch},
            toolchain=self._bench.toolchain,
            timing={"timer": self._bench.timer.name, **self._bench.policy.as_dict()},
        )

    def _fastest_baseline(self, case: Case) -> Baseline:
        found = baselines(case)
        if len(found) == 1:
            return found[0]
        times: list[float] = []
        for one in found:  # one that is far behind is soon dropped: over a video, a call takes half a second
            best_ms = min(times, default=math.inf)
            measured = measure(one, self._bench.timer, self._bench.policy, incumbent_ms=best_ms)
            times.append(measured.median_ms)
        return found[times.index(min(times))]

    def _search(
        self,
        item: LabelledProblem,
        space: Space,
        identity: Identity,
        case: Case,
        deadline: float,
        key: str,
    ) -> Progress:
        problem = item.problem
        progress = Progress()
        for record in self._store.records(identity):
            candidate = space.find(record.identity.backend, record.identity.settings)
            if candidate is not None and record.identity == self._own(identity, candidate):
                progress.outcomes[candidate.key] = record.outcome
        miss = None if progress.outcomes else self._store.explain(identity)
        if miss:
            _log.warning("%s: recorded trials do not apply: %s", item.label, miss)
        study = Study(space, f"{problem.key} {key}", self._study_storage, self._settings.seed)
        study.enqueue([*space.defaults(), *space.presets(), *self._transferred(problem, space)])

        def evaluate(batch: list[Candidate]) -> Iterator[tuple[Candidate, Outcome]]:
            for candidate, outcome in self._evaluate(batch, identity, case, progress):
                self.on_trial(candidate, outcome)
                yield candidate, outcome

        return search(
            study,
            evaluate,
            progress,
            width=min(self._bench.builder.width, self._bench.room_for(problem)),
            trials=self._settings.trials,
            deadline=deadline,
            clock=self._clock,
        )

    def _transferred(self, problem: Problem, space: Space) -> list[Candidate]:
        """Winners of like problems, nearest first: earlier in this run, or in a profile."""
        near = [entry for entry in self._winners if not math.isinf(entry.problem.distance(problem))]
        near.sort(key=lambda entry: entry.problem.distance(problem))
        known = [(e.backend, e.settings) for e in near[:4]]
        known += [other for e in near[:2] for other in e.other_backends.items()]
        found = (space.find(backend, settings) for backend, settings in known)
        return [candidate for candidate in found if candidate is not None]

    def _evaluate(
        self, batch: list[Candidate], identity: Identity, case: Case, progress: Progress
    ) -> Iterator[tuple[Candidate, Outcome]]:
        """Build and verify all of a batch, then time what passed; each outcome is recorded when it is
        known."""
        builder, seed = self._bench.builder, self._settings.seed + 1
        device = str(self._bench.device)
        tasks = [
            Task(case.problem, c.kernel.backend, c.settings.as_dict(), device, seed, case.options)
            for c in batch
        ]
        if not builder.isolated:
            for candidate in batch:
                self._store.begin(self._own(identity, candidate))
        started = self._clock()
        passed: list[tuple[Candidate, Check]] = []
        for index, answer in builder.run(tasks, CANDIDATE_LIMIT_S):
            rejected = _rejected(answer)
            if rejected is None:
                assert isinstance(answer, Check)
                passed.append((batch[index], answer))
            else:
                yield self._record(batch[index], identity, rejected, started)
        for candidate, check in passed:
            if builder.isolated:
                self._store.begin(self._own(identity, candidate))
            outcome = self._time(candidate, case, check, progress)
            yield self._record(candidate, identity, outcome, started)

    def _record(
        self, candidate: Candidate, identity: Identity, outcome: Outcome, started: float
    ) -> tuple[Candidate, Outcome]:
        own = self._own(identity, candidate)
        outcome = replace(outcome, seconds=round(self._clock() - started, 3))
        self._store.finish(own, outcome)
        if outcome.status == "error" and not device_alive(str(self._bench.device)):
            raise DeviceLost(f"{candidate.key}: {outcome.reason}")
        return candidate, outcome

    def _time(self, candidate: Candidate, case: Case, check: Check, progress: Progress) -> Outcome:
        work = KernelWork(case, candidate.kernel, candidate.settings)
        try:
            with wall_limit(CANDIDATE_LIMIT_S):
                measured = measure(
                    work, self._bench.timer, self._bench.policy, incumbent_ms=progress.best_ms()
                )
        except Exception as error:  # whatever a candidate throws is a datum
            return failure(error)
        return self._timed(measured, check, case)

    def _timed(self, measured: Measurement, check: Check, case: Case) -> Outcome:
        ideal_ms = self._bench.ideal_ms(case.problem, case.options)
        invalid = measured.median_ms * ROOFLINE_MARGIN[self._bench.hardware.kind] < ideal_ms
        reason = f"{measured.median_ms:.4g} ms beats the roofline of {ideal_ms:.4g} ms" if invalid else ""
        return Outcome(
            "invalid" if invalid else "ok",
            reason,
            measured.median_ms,
            tuple(significant(sample) for sample in measured.samples_ms),
            measured.stopped_by,
            check.error,
            check.budget,
            build_s=check.seconds,
        )

    def _conclude(
        self,
        item: LabelledProblem,
        space: Space,
        case: Case,
        dense: Baseline,
        progress: Progress,
        deadline: float,
        key: str,
    ) -> Result:
        """Finals among the best that also pass on fresh inputs, then the entry."""
        finalists, checks = self._finalists(space, progress, case)
        if not finalists:
            return Result(
                item, counts=progress.statuses(), note="no candidate gave a right answer: " + _worst(progress)
            )
        left = max(deadline - self._clock(), 1.0)
        clock_before = sm_clock(self._bench.timer)
        finals = run_finals(
            case, finalists, dense, self._bench.timer, FINALS_SHARE * left, self._bench.policy.warm_up_s
        )
        winner = space.candidates[finals.winner]
        clocks = [clock_before, sm_clock(self._bench.timer)]
        crossover = find_crossover(
            winner,
            case,
            dense,
            finals.speedup.median,
            self._settings.seed,
            self._bench.timer,
            2 * self._bench.policy.max_seconds,
        )
        entry = Entry(
            case.problem,
            winner.kernel.backend,
            winner.settings.as_dict(),
            evidence(
                self._bench, case, winner, finals, dense, progress, checks[finals.winner], crossover, clocks
            ),
            crossover.density if crossover else None,
            best_of_others(space, progress, winner.kernel.backend),
        )
        self._store.save_verdict(key, entry.as_dict())
        return self._result(item, entry)

    def _finalists(
        self, space: Space, progress: Progress, case: Case
    ) -> tuple[list[Candidate], dict[str, Check]]:
        """The fastest and the fastest default, each verified once more on other inputs."""
        ranking = [space.candidates[key] for key in progress.ranking()]
        defaults = [candidate for candidate in ranking if candidate.is_default][:1]
        chosen: list[Candidate] = []
        checks: dict[str, Check] = {}
        for candidate in ranking:
            if candidate not in defaults and len(chosen) >= self._settings.finalists:
                continue
            check = self._check_again(candidate, case)
            if check.ok:
                chosen.append(candidate)
                checks[candidate.key] = check
            else:
                _log.warning("%s passed once and failed on other inputs: %s", candidate.key, check.explain())
        return chosen, checks

    def _check_again(self, candidate: Candidate, case: Case) -> Check:
        seed = self._settings.seed + 1000
        try:
            return verify(candidate.kernel, candidate.settings, case.problem, case.device, seed, case.options)
        except Exception as error:  # whatever a candidate throws is a datum
            return Check(math.inf, 0.0, "", failure(error).reason)

    def _result(self, item: LabelledProblem, entry: Entry, reused: bool = False) -> Result:
        evidence = entry.evidence
        return Result(item, entry, evidence["ideal"]["share"], evidence["search"]["statuses"], reused=reused)

    def _own(self, identity: Identity, candidate: Candidate) -> Identity:
        """The identity of one candidate's trial."""
        settings, source = candidate.settings.as_dict(), kernel_hash(candidate.kernel)
        return replace(identity, backend=candidate.kernel.backend, settings=settings, source=source)


def _rejected(answer: Answer) -> Outcome | None:
    """The outcome of what did not pass; None for what did."""
    if isinstance(answer, Outcome):
        return answer
    if answer.ok:
        return None
    return Outcome(
        "wrong", answer.explain(), error=answer.error, budget=answer.budget, build_s=answer.seconds
    )


def _reasons(space: Space) -> str:
    refused = [f"{backend}: {reason}" for backend, reason in space.refused.items()]
    misfits = [f"{count} settings: {reason}" for reason, count in space.misfits.most_common(3)]
    return "; ".join([*refused, *misfits])


def _worst(progress: Progress) -> str:
    """The reasons there were, the most frequent first."""
    reasons = Counter(f"{outcome.status}: {outcome.reason}" for outcome in progress.outcomes.values())
    return "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))

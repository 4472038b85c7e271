"""The search for one problem: what to try next, and when to stop.

Optuna proposes (ask and tell), this file sees to what Optuna does not: the defaults and transferred
winners come first, settings that do not fit or were tried are never run, a resumed study learns what the
store knows, and nothing that a candidate throws ends it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna

from tuner.space import Candidate, Space
from tuner.store import Outcome

PROPOSALS_PER_TRIAL = 8
"""How often Optuna may propose what cannot or need not be run, before the next untried candidate is taken."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


def open_storage(path: Path) -> optuna.storages.BaseStorage:
    """Optuna's tables in the SQLite file at `path`, beside the tuner's own.

    Trials that a killed process left running are none of this one's: they are simply never told.
    """
    return optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 30}})


@dataclass
class Progress:
    """How a search went.

    Attributes:
        outcomes: key → outcome of every candidate with a record, earlier runs included.
        stopped_by: `exhausted`, `trials`, `time`, or `first round` where only what was known beforehand is
            tried.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    stopped_by: str = ""

    def ranking(self) -> list[str]:
        """Keys of the verified and timed candidates, fastest first."""
        timed = {key: o.median_ms for key, o in self.outcomes.items() if o.status == "ok" and o.median_ms}
        return sorted(timed, key=lambda key: timed[key])

    def statuses(self) -> dict[str, int]:
        """Status → how many candidates."""
        return dict(Counter(str(outcome.status) for outcome in self.outcomes.values()))

    def build_s(self) -> float:
        """Seconds that compiling and verifying the candidates took, summed over the processes that did."""
        return sum(outcome.build_s for outcome in self.outcomes.values())

    def best_ms(self) -> float:
        ranking = self.ranking()
        best = self.outcomes[ranking[0]].median_ms if ranking else None
        return math.inf if best is None else best


def best_of_others(
    space: Space, progress: Progress, winner: str, failed: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """The fastest settings of every backend but the winner's, as the search timed them; `failed` are keys
    of those that a later check found wrong."""
    best: dict[str, dict[str, Any]] = {}
    for key in progress.ranking():
        candidate = space.candidates[key]
        if candidate.kernel.backend != winner and key not in failed:
            best.setdefault(candidate.kernel.backend, candidate.settings.as_dict())
    return best


class Study:
    """An Optuna study over a space, which knows what is recorded.

    Args:
        space: the candidates.
        name: identity of the search; the declared values are added, since Optuna refuses changed ones.
        storage: Optuna's storage, or None to keep the study in memory.
        seed: of the sampler.
    """

    def __init__(
        self, space: Space, name: str, storage: optuna.storages.BaseStorage | None, seed: int
    ) -> None:
        self._space = space
        declared = {kernel.backend: kernel.settings.space() for kernel in space.kernels}
        digest = hashlib.sha256(json.dumps(declared, sort_keys=True, default=str).encode()).hexdigest()[:8]
        self._study = optuna.create_study(
            study_name=f"{name} {digest}", storage=storage, direction="minimize", load_if_exists=True
        )
        known = self._study.get_trials(deepcopy=False)
        # A resumed sampler with the same seed would propose the same candidates again.
        # A batch is proposed before any of it is told: what is open counts as bad, or it would be one idea
        # twelve times over.
        self._study.sampler = optuna.samplers.TPESampler(
            seed=seed + len(known), n_startup_trials=8, constant_liar=True
        )
        self._told = {_key_of(space, trial) for trial in known if trial.state.is_finished()}
        self._queue: list[Candidate] = []
        self._open: dict[str, optuna.Trial | None] = {}

    def learn(self, outcomes: dict[str, Outcome]) -> None:
        """Add recorded outcomes that the study has not heard of, as after a kill between the two writes."""
        for key, outcome in outcomes.items():
            candidate = self._space.candidates.get(key)
            if candidate is None or key in self._told or candidate.kernel not in self._space.searched:
                continue
            state, value = _result(outcome)
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=state,
                    value=value,
                    params=candidate.parameters(),
                    distributions=self._space.distributions(candidate),
                )
            )
            self._told.add(key)

    def enqueue(self, candidates: Iterable[Candidate]) -> None:
        """Try these first."""
        self._queue += list(candidates)

    def left(self, tried: set[str]) -> list[Candidate]:
        """Candidates that are not in `tried` and not proposed already."""
        return [
            candidate
            for key, candidate in self._space.candidates.items()
            if key not in tried and key not in self._open
        ]

    def propose(self, tried: set[str], known_only: bool = False) -> Candidate | None:
        """The next candidate of those `left`, or only of those enqueued; None when there is none."""
        taken = tried | set(self._open)
        while self._queue:
            candidate = self._queue.pop(0)
            if candidate.key not in taken:
                return self._ask_for(candidate)
        left = [] if known_only else self.left(tried)
        if not left:
            return None
        for _ in range(min(PROPOSALS_PER_TRIAL, len(left))):
            trial = self._study.ask()
            proposed = self._space.suggest(trial)
            if proposed is not None and proposed.key not in taken:
                self._open[proposed.key] = trial
                return proposed
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return self._ask_for(left[len(tried) % len(left)])

    def tell(self, candidate: Candidate, outcome: Outcome) -> None:
        """Report what became of a proposed candidate."""
        trial = self._open.pop(candidate.key)
        if trial is None:
            return
        state, value = _result(outcome)
        self._study.tell(trial, value, state=state)
        self._told.add(candidate.key)

    def _ask_for(self, candidate: Candidate) -> Candidate:
        if candidate.kernel not in self._space.searched:
            self._open[candidate.key] = None
            return candidate
        self._study.enqueue_trial(candidate.parameters())
        trial = self._study.ask()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a queued value is reported as fixed
            self._space.suggest(trial)
        self._open[candidate.key] = trial
        return candidate


def search(
    study: Study,
    evaluate: Callable[[list[Candidate]], Iterable[tuple[Candidate, Outcome]]],
    progress: Progress,
    *,
    width: int = 1,
    trials: int | None = None,
    deadline: float = math.inf,
    known_only: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Propose and evaluate, `width` candidates at a time, until nothing is left, or trials or time are up.

    `trials` counts recorded ones, so that a resumed search ends where an uninterrupted one would have.
    `known_only`: only what is enqueued. The first batch runs whatever the time: a video's inputs have taken
    some by now, for nothing otherwise.
    """
    study.learn(progress.outcomes)
    progress.stopped_by, before = "", len(progress.outcomes)
    while not progress.stopped_by:
        tried = set(progress.outcomes)
        room = width if trials is None else min(width, trials - len(tried))
        if room <= 0:
            progress.stopped_by = "trials"
        elif len(tried) > before and clock() >= deadline:
            progress.stopped_by = "time"
        else:
            batch = [c for c in (study.propose(tried, known_only) for _ in range(room)) if c is not None]
            if not batch:
                progress.stopped_by = "first round" if study.left(tried) else "exhausted"
            for candidate, outcome in evaluate(batch):
                progress.outcomes[candidate.key] = outcome
                study.tell(candidate, outcome)
    return progress


def _result(outcome: Outcome) -> tuple[optuna.trial.TrialState, float | None]:
    """Log time, since a tenth matters as much at 1 ms as at 100; a failure ranks below every timing."""
    if outcome.status == "ok" and outcome.median_ms:
        return optuna.trial.TrialState.COMPLETE, math.log(outcome.median_ms)
    return optuna.trial.TrialState.PRUNED, None


def _key_of(space: Space, trial: optuna.trial.FrozenTrial) -> str:
    backend = trial.params.get("backend", "")
    own = {name.split(".", 1)[1]: value for name, value in trial.params.items() if "." in name}
    candidate = space.find(backend, own)
    return candidate.key if candidate else ""

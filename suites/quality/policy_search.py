"""The study behind `tune_policy`: cached dense runs, frugal trials, a final check over all cases."""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState
from tabulate import tabulate

from chipmunk_kernels.delta.policy import Policy
from suites.end_to_end.compare import run_dense, run_sparse, warm_up
from suites.end_to_end.errors import UsageError
from suites.end_to_end.progress import note
from suites.end_to_end.subject import Subject
from suites.quality.fidelity import psnr
from suites.quality.policy_space import choose, starting_points

SLOWER = 1.05
"""A generation this much slower than the best policy's mean cannot win; less may be other load's noise."""

FAR = 200.0
"""Stands for an infinite PSNR or shortfall in dB: databases and JSON hold no infinity."""


@dataclass(frozen=True)
class Case:
    """One generation to be matched: a prompt, and the seed of its noise."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Dense:
    """A dense run, cached on disk: its output as an array, and how long it took."""

    array: NDArray
    total_ms: float


@dataclass(frozen=True)
class Found:
    """A policy that holds the floor on every checked case."""

    policy: Policy
    speedup: float
    psnr_db: list[float]


@dataclass
class Search:
    """One model's search. Everything finished lies in `folder`: the same search continues there.

    Attributes:
        subject: the model.
        profile: tuned kernels.
        name: of the policies tried.
        start: where the search begins.
        folder: for the study's database and the dense runs; belongs to one model, size, step count and seed.
        steps: of each generation.
        seed: of the search itself.
        floor: least PSNR in dB against the dense run.
        cases: that the policy is for.
        per_trial: how many of them a trial tries: the hardest for `start`, hardest first.
    """

    subject: Subject
    profile: Any
    name: str
    start: Policy
    folder: Path
    steps: int
    seed: int
    floor: float
    cases: list[Case]
    per_trial: int
    _dense: dict[Case, Dense] = field(default_factory=dict)
    _study: optuna.Study | None = None

    @property
    def storage(self) -> str | None:
        """Where Optuna keeps the study."""
        return f"sqlite:///{self.folder / 'study.db'}"

    @property
    def finished(self) -> int:
        return len(self.study().get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def study(self) -> optuna.Study:
        """The study of this floor and these cases, opened or begun."""
        if self._study is None:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            with warnings.catch_warnings():
                # Optuna 5 moves constraints onto the trial, where Optuna 4 has none.
                warnings.simplefilter("ignore")
                sampler = optuna.samplers.TPESampler(
                    seed=self.seed,
                    n_startup_trials=8,
                    multivariate=True,
                    constraints_func=_shortfall,
                )
            self._study = optuna.create_study(
                study_name=f"floor {self.floor:g} dB, {self.per_trial} of {len(self.cases)} cases",
                storage=self.storage,
                sampler=sampler,
                load_if_exists=True,
            )
        return self._study

    def run(self, trials: int) -> None:
        """Bring the study to `trials` finished ones. A KeyboardInterrupt loses at most the one under way."""
        study = self.study()
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # Left by a killed process; nobody will finish it.
            study.tell(trial.number, state=TrialState.FAIL)
        if not study.get_trials(deepcopy=False):
            for point in starting_points(self.start, self.subject.layers):
                study.enqueue_trial(point, skip_if_exists=True)
        missing = trials - self.finished
        if missing <= 0:
            note(f"{self.finished} trials are finished already")
            return
        note("warming up")
        warm_up(self.subject, self.start, self.profile, self.seed)
        study.optimize(self._objective, n_trials=missing, catch=(UsageError,))

    def hardest(self) -> list[Case]:
        """The cases of a trial. Measured once, then kept with the study."""
        study = self.study()
        if "hardest" not in study.user_attrs:
            decibels = {case: self._sparse(self.start, case, "start ")[1] for case in self.cases}
            worst = sorted(self.cases, key=decibels.__getitem__)[: self.per_trial]
            study.set_user_attr("hardest", [(case.prompt, case.seed) for case in worst])
            told = ", ".join(f"{case.prompt!r} at seed {case.seed}" for case in worst)
            note(f"{self.start.name}: {min(decibels.values()):.1f} dB or more; trials run {told}")
        return [Case(*pair) for pair in study.user_attrs["hardest"]]

    def check(self, finalists: int, need_mlp: bool = False) -> Found | None:
        """The fastest trial that holds the floor on every case; None if no finalist does.

        With `need_mlp`, only those whose MLP is sparse too.
        """
        feasible = [
            t
            for t in _complete(self.study())
            if t.user_attrs["shortfall_db"] <= 0 and (t.user_attrs["policy"]["mlp"] or not need_mlp)
        ]
        for trial in sorted(feasible, key=_value)[:finalists]:
            policy = Policy.from_mapping(trial.user_attrs["policy"])
            total, psnrs = 0.0, []
            for case in self.cases:
                milliseconds, decibels = self._sparse(policy, case, f"check of trial {trial.number} ")
                total += milliseconds
                psnrs.append(decibels)
                if decibels < self.floor:
                    break
            note(f"trial {trial.number}, {len(psnrs)} pictures: PSNR {min(psnrs):.1f} to {max(psnrs):.1f} dB")
            if len(psnrs) == len(self.cases) and min(psnrs) >= self.floor:
                speedup = sum(self._dense_run(case).total_ms for case in self.cases) / total
                return Found(policy, speedup, psnrs)
        return None

    def _objective(self, trial: optuna.Trial) -> float:
        """Mean time of a generation in ms; how far PSNR falls short of the floor is the constraint."""
        policy = choose(trial, self.name, self.subject.layers)
        trial.set_user_attr("policy", policy.as_dict())
        best = min(
            (_value(t) for t in _complete(self.study()) if t.user_attrs["shortfall_db"] <= 0),
            default=math.inf,
        )
        times, psnrs = [], []
        for case in (hardest := self.hardest()):
            milliseconds, decibels = self._sparse(policy, case, f"trial {trial.number} ")
            times.append(milliseconds)
            psnrs.append(decibels)
            if decibels < self.floor or milliseconds > best * SLOWER:
                break
        mean = sum(times) / len(times)
        dense = self._dense_run(hardest[0]).total_ms
        trial.set_user_attr("psnr_db", [min(max(p, -FAR), FAR) for p in psnrs])
        trial.set_user_attr("speedup", dense / times[0])
        # Optuna's constraint: satisfied when not positive. NaN pictures count as infinitely far off.
        shortfall = self.floor - min(psnrs)
        trial.set_user_attr(
            "shortfall_db", shortfall if math.isfinite(shortfall) else math.copysign(FAR, shortfall)
        )
        note(f"trial {trial.number}: {dense / times[0]:.2f}×, PSNR {min(psnrs):.1f} dB, {_brief(policy)}")
        return mean

    def _sparse(self, policy: Policy, case: Case, label: str) -> tuple[float, float]:
        """(ms, PSNR in dB) of one generation; PSNR is -inf for a picture with NaN."""
        dense = self._dense_run(case)
        inputs = self.subject.inputs(case.prompt, case.seed)
        run = run_sparse(
            self.subject, inputs, policy, self.profile, steps=self.steps, seed=case.seed, label=label
        )
        array = self.subject.array(run.generation.output)
        if not np.isfinite(array).all():
            return run.generation.total_ms, -math.inf
        return run.generation.total_ms, psnr(dense.array, array, self.subject.value_range)

    def _dense_run(self, case: Case) -> Dense:
        """The case's dense run: from memory, from disk, or made now."""
        if case not in self._dense:
            name = hashlib.sha256(case.prompt.encode()).hexdigest()[:10]
            path = self.folder / f"dense-{name}-{case.seed}.npz"
            if path.is_file():
                with np.load(path) as stored:
                    self._dense[case] = Dense(stored["array"], float(stored["total_ms"]))
            else:
                inputs = self.subject.inputs(case.prompt, case.seed)
                run = run_dense(self.subject, inputs, steps=self.steps, seed=case.seed, label="dense")
                dense = Dense(self.subject.array(run.output), run.total_ms)
                partial = path.with_suffix(".part.npz")
                np.savez_compressed(partial, array=dense.array, total_ms=dense.total_ms)
                partial.replace(path)
                self._dense[case] = dense
                note(f"dense, {case.prompt}, seed {case.seed}: {dense.total_ms / 1e3:.2f} s")
        return self._dense[case]


def _shortfall(trial: FrozenTrial) -> tuple[float]:
    # A failed trial has no shortfall; the sampler does not learn from it.
    return (trial.user_attrs.get("shortfall_db", math.inf),)


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None  # complete trials have one
    return trial.value


def _brief(policy: Policy) -> str:
    attention, mlp = policy.attention, policy.mlp
    assert attention is not None
    first = f"attention {attention.keep:g} {attention.merge} g{attention.group_size}"
    first += f", dense layers {attention.dense_layers}"
    second = f"MLP {mlp.keep:g} g{mlp.group_size}" if mlp is not None else "MLP dense"
    patch = ", ".join("x".join(map(str, level)) for level in policy.patch) or "none"
    return (
        f"{first}; {second}; first {attention.schedule.first} every {attention.schedule.every}; patch {patch}"
    )


def report(study: optuna.Study, rows: int = 10) -> str:
    """The fastest trials that hold the floor, then the nearest misses, as a table."""
    trials = sorted(_complete(study), key=lambda t: (max(0.0, t.user_attrs["shortfall_db"]), _value(t)))
    body = [
        [
            trial.number,
            f"{_value(trial) / 1e3:.2f}",
            f"{trial.user_attrs['speedup']:.2f}",
            f"{min(trial.user_attrs['psnr_db']):.1f}",
            "yes" if trial.user_attrs["shortfall_db"] <= 0 else "no",
            _brief(Policy.from_mapping(trial.user_attrs["policy"])),
        ]
        for trial in trials[:rows]
    ]
    headers = ["trial", "s", "speedup", "PSNR dB", "holds", "policy"]
    return tabulate(body, headers, tablefmt="simple", disable_numparse=True)

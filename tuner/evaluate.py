"""What becomes of a candidate: built, verified, timed, and recorded the moment that it is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from tuner.bench import ROOFLINE_MARGIN, Bench
from tuner.build import Answer, DeviceLost, Task, device_alive
from tuner.errors import failure, wall_limit
from tuner.measure import Measurement, measure
from tuner.problem import Case, KernelWork
from tuner.sources import kernel_hash
from tuner.space import Candidate, Space
from tuner.statistics import significant
from tuner.store import Identity, Outcome, Store
from tuner.verify import Check

CANDIDATE_LIMIT_S = 60.0
"""What one candidate may take to build and verify, and again to be timed. Never a share of the budget: a
recorded timeout must say something about the candidate, not about how late it came."""


class Evaluator:
    """Evaluates candidates of one problem.

    Args:
        bench: the device.
        store: where outcomes are recorded.
        identity: what makes timings of this problem apply.
        seed: of the inputs that candidates are verified on.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        bench: Bench,
        store: Store,
        identity: Identity,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bench, self._store, self._identity = bench, store, identity
        self._seed, self._clock = seed, clock

    def recorded(self, space: Space) -> dict[str, Outcome]:
        """Key → outcome of every candidate with a record that applies, earlier runs included."""
        found: dict[str, Outcome] = {}
        for record in self._store.records(self._identity):
            candidate = space.find(record.identity.backend, record.identity.settings)
            if candidate is not None and record.identity == self._own(candidate):
                found[candidate.key] = record.outcome
        return found

    def run(
        self, batch: list[Candidate], case: Case, best_ms: Callable[[], float]
    ) -> Iterator[tuple[Candidate, Outcome]]:
        """Build and verify all of a batch, then time what passed; each outcome is recorded when it is
        known. Timing gives a candidate up early that is far behind `best_ms()`.

        Raises:
            DeviceLost: a candidate took the device with it.
        """
        builder, device = self._bench.builder, str(self._bench.device)
        tasks = [
            Task(case.problem, c.kernel.backend, c.settings.as_dict(), device, self._seed, case.options)
            for c in batch
        ]
        if not builder.isolated:
            for candidate in batch:
                self._store.begin(self._own(candidate))
        started = self._clock()
        passed: list[tuple[Candidate, Check]] = []
        for index, answer in builder.run(tasks, CANDIDATE_LIMIT_S):
            rejected = _rejected(answer)
            if rejected is None:
                assert isinstance(answer, Check)
                passed.append((batch[index], answer))
            else:
                yield self._record(batch[index], rejected, started)
        # The fallback last: over a video it takes seconds a call, two of which do beside a faster one.
        for candidate, check in sorted(passed, key=lambda pair: pair[0].kernel.backend == "torch"):
            if builder.isolated:
                self._store.begin(self._own(candidate))
            yield self._record(candidate, self._time(candidate, case, check, best_ms()), started)

    def _record(self, candidate: Candidate, outcome: Outcome, started: float) -> tuple[Candidate, Outcome]:
        outcome = replace(outcome, seconds=round(self._clock() - started, 3))
        self._store.finish(self._own(candidate), outcome)
        if outcome.status == "error" and not device_alive(str(self._bench.device)):
            raise DeviceLost(f"{candidate.key}: {outcome.reason}")
        return candidate, outcome

    def _time(self, candidate: Candidate, case: Case, check: Check, best_ms: float) -> Outcome:
        work = KernelWork(case, candidate.kernel, candidate.settings)
        try:
            with wall_limit(CANDIDATE_LIMIT_S):
                measured = measure(work, self._bench.timer, self._bench.policy, incumbent_ms=best_ms)
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

    def _own(self, candidate: Candidate) -> Identity:
        """The identity of one candidate's trial."""
        settings, source = candidate.settings.as_dict(), kernel_hash(candidate.kernel)
        return replace(self._identity, backend=candidate.kernel.backend, settings=settings, source=source)


def _rejected(answer: Answer) -> Outcome | None:
    """The outcome of what did not pass; None for what did."""
    if isinstance(answer, Outcome):
        return answer
    if answer.ok:
        return None
    return Outcome(
        "wrong", answer.explain(), error=answer.error, budget=answer.budget, build_s=answer.seconds
    )

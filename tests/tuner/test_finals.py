"""The finals: lucky winners lose, ties keep the default, and the crossover is where two lines meet."""

from __future__ import annotations

import pytest

from chipmunk_kernels import registry
from chipmunk_kernels.problem import Problem
from tests.tuner.fakes import PROBLEM, FakeTimer, ScriptedWork, fake_kernels
from tuner.baselines import Baseline
from tuner.finals import AGAIN, DENSE, crossing, find_crossover, judge, run_finals, second_density
from tuner.measure import Work
from tuner.problem import KernelWork, make_case
from tuner.space import Candidate, Space


def rounds(ms: float, wobble: float = 0.0) -> list[float]:
    return [ms * (1.0 + wobble * (n % 2)) for n in range(8)]


def test_a_lucky_winner_is_measured_away() -> None:
    """The search put `lucky` first on one good sample; side by side it is 20 % slower."""
    samples = {DENSE: rounds(50), "lucky": rounds(12), "honest": rounds(10), AGAIN: rounds(12)}
    finals = judge(samples, "lucky", defaults=[])
    assert finals.winner == "honest" and finals.runner_up == "lucky"
    assert finals.verdict == "faster" and finals.speedup.median == pytest.approx(5.0)
    assert finals.over_runner_up is not None and finals.over_runner_up.median == pytest.approx(1.2)


def test_a_gain_within_the_noise_keeps_the_default() -> None:
    samples = {DENSE: rounds(50), "tuned": rounds(10.0), "default": rounds(10.2), AGAIN: rounds(10.0, 0.05)}
    finals = judge(samples, "tuned", defaults=["default"])
    assert finals.noise == pytest.approx(0.05)
    assert finals.winner == "default"


def test_a_gain_beyond_the_noise_replaces_the_default() -> None:
    samples = {DENSE: rounds(50), "tuned": rounds(10.0), "default": rounds(12.0), AGAIN: rounds(10.0, 0.05)}
    finals = judge(samples, "tuned", defaults=["default"])
    assert finals.winner == "tuned"
    assert finals.over_default is not None and finals.over_default.median == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("dense_ms", "verdict"), [(20.0, "faster"), (10.3, "tie"), (9.8, "tie"), (5.0, "dense is better")]
)
def test_the_verdict_is_against_dense(dense_ms: float, verdict: str) -> None:
    samples = {DENSE: rounds(dense_ms), "only": rounds(10.0), AGAIN: rounds(10.0, 0.05)}
    finals = judge(samples, "only", defaults=["only"])
    assert finals.verdict == verdict and finals.runner_up is None


def test_finals_run_kernels_the_leader_twice_and_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "kernels", fake_kernels)
    case = make_case(PROBLEM, "cpu", 0)
    space = Space(PROBLEM, registry.torch.device("cpu"))
    slow, fast = (space.find("torch", {"speed": speed, "fault": "none"}) for speed in (8, 2))
    assert slow is not None and fast is not None
    timer = FakeTimer()
    dense = Baseline("dense", ScriptedWork(lambda n: 20.0).call)
    finals = run_finals(case, [fast, slow], dense, timer, max_seconds=60.0)
    assert finals.winner == fast.key
    assert finals.speedup.median == pytest.approx(10.0)
    assert finals.times[slow.key].median == 8.0
    assert len(timer.taken) % 4 == 0  # dense, two finalists, the leader again


def test_the_crossover_is_where_sparse_takes_as_long_as_dense() -> None:
    assert crossing({0.1: 0.25, 0.5: 0.75}) == pytest.approx(0.7)
    assert crossing({0.5: 6.0, 0.1: 2.0}) == 0.0
    assert crossing({0.1: 0.2, 0.5: 0.3}) == 1.0


def test_no_growth_with_density_wins_everywhere_or_nowhere() -> None:
    assert crossing({0.1: 0.5, 0.5: 0.5}) == 1.0
    assert crossing({0.1: 1.5, 0.5: 1.5}) == 0.0


@pytest.mark.parametrize(
    ("density", "speedup", "expected"),
    [(0.1, 5.0, 0.5), (0.1, 50.0, 1.0), (0.1, 0.5, 0.2), (0.9, 1.0, 0.45), (1.0, 2.0, 0.5)],
)
def test_the_second_density_lies_near_the_expected_crossover(
    density: float, speedup: float, expected: float
) -> None:
    assert second_density(density, speedup) == pytest.approx(expected)


def test_the_crossover_of_a_kernel_is_measured_beside_dense() -> None:
    problem = Problem(
        "sparse_mlp", rows=64, columns=64, width=64, dtype="float32", group_size=64, density=0.1
    )
    kernel = registry.kernel("sparse_mlp", "torch")
    winner = Candidate(kernel, kernel.settings())

    class DensityTimer(FakeTimer):
        """10 ms at any density plus 100 ms for all columns; the baseline says its own time."""

        def sample(self, work: Work) -> float:
            if isinstance(work, KernelWork):
                self.taken.append(work)
                return 10.0 + 100.0 * work.case.problem.density
            return super().sample(work)

    dense = Baseline("dense", ScriptedWork(lambda n: 60.0).call)
    found = find_crossover(winner, make_case(problem, "cpu", 0), dense, 3.0, 0, DensityTimer(), 60.0)
    assert found is not None and found.density == pytest.approx(0.5, abs=1e-3)
    assert sorted(found.points) == pytest.approx([0.1, 0.3])


def test_an_operation_that_does_not_grow_with_density_has_no_crossover() -> None:
    case = make_case(PROBLEM, "cpu", 0)
    kernel = fake_kernels("torch")["group_mean"]
    dense = Baseline("dense", lambda: 1.0)
    assert find_crossover(Candidate(kernel, kernel.settings()), case, dense, 3.0, 0, FakeTimer(), 1.0) is None

"""The policy search: its space, its frugality, and that nothing finished is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest

from chipmunk_kernels.delta.policies import load_policy
from chipmunk_kernels.delta.policy import AttentionPolicy, MlpPolicy, Policy, Schedule
from suites.quality import policy_search
from suites.quality.policy_search import Case, Search
from suites.quality.policy_space import choices_of, choose, starting_points
from suites.quality.tune_policy import main

LAYERS = 5


@pytest.mark.parametrize("mlp", [MlpPolicy(keep=0.4, schedule=Schedule(first=3, every=8)), None])
def test_choices_stand_for_their_policy(mlp: MlpPolicy | None) -> None:
    attention = AttentionPolicy(
        keep=0.12, schedule=Schedule(first=3, every=8), group_size=64, dense_layers=1, merge="lse"
    )
    policy = Policy(name="p", attention=attention, mlp=mlp, patch=((8, 8),))
    choices = choices_of(policy, LAYERS)
    assert choices is not None
    assert choose(optuna.trial.FixedTrial(choices), "p", LAYERS) == policy


def test_choices_outside_the_space_come_nearest() -> None:
    attention = AttentionPolicy(
        keep=0.9, schedule=Schedule(first=50, every=11), group_size=192, dense_layers=9
    )
    policy = Policy(name="p", attention=attention, mlp=None, patch=((3, 3),))
    choices = choices_of(policy, 3)
    assert choices is not None
    found = choose(optuna.trial.FixedTrial(choices), "p", 3)
    assert found.attention is not None
    assert (found.attention.keep, found.attention.schedule.first, found.attention.schedule.every) == (
        0.5,
        6,
        10,
    )
    assert (found.attention.dense_layers, found.patch, found.mlp) == (2, (), None)


def test_a_search_begins_with_known_policies() -> None:
    points = starting_points(load_policy("flux-shapes"), LAYERS)
    policies = [choose(optuna.trial.FixedTrial(point), "p", LAYERS) for point in points]
    assert len({str(policy) for policy in policies}) == len(points) == 4
    assert starting_points(Policy(name="dense", attention=None), LAYERS) == []


class Model:
    """Stands in for the generations: time and error follow from the policy by a formula."""

    def __init__(self) -> None:
        self.dense: list[str] = []
        self.sparse: list[tuple[Policy, str]] = []
        self.subject: Any = SimpleNamespace(
            layers=LAYERS,
            value_range=1.0,
            inputs=lambda prompt, seed: {"prompt": prompt},
            array=lambda output: output,
        )

    def run_dense(self, subject: Any, inputs: dict[str, str], **options: Any) -> Any:
        self.dense.append(inputs["prompt"])
        return SimpleNamespace(output=np.zeros((4, 4, 3)), total_ms=1000.0)

    def run_sparse(
        self, subject: Any, inputs: dict[str, str], policy: Policy, profile: Any, **options: Any
    ) -> Any:
        assert policy.attention is not None
        self.sparse.append((policy, inputs["prompt"]))
        keep = policy.attention.keep + (policy.mlp.keep if policy.mlp else 1.0)
        hard = 2.0 if inputs["prompt"] == "hard" else 1.0
        output = np.full((4, 4, 3), hard * 0.05 * (1.5 - keep))
        return SimpleNamespace(generation=SimpleNamespace(output=output, total_ms=400.0 + 300.0 * keep))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model()
    monkeypatch.setattr(policy_search, "run_dense", model.run_dense)
    monkeypatch.setattr(policy_search, "run_sparse", model.run_sparse)
    monkeypatch.setattr(policy_search, "warm_up", lambda *arguments: None)
    return model


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No database: every suggestion is a transaction, which costs seconds on a busy disk."""
    monkeypatch.setattr(Search, "storage", None)


@pytest.fixture
def new_search(model: Model, tmp_path: Path) -> Callable[..., Search]:
    def build(
        floor: float = 28.0, prompts: tuple[str, ...] = ("easy", "other"), per_trial: int = 2
    ) -> Search:
        return Search(
            subject=model.subject,
            profile=None,
            name="found",
            start=load_policy("flux-shapes"),
            folder=tmp_path,
            steps=28,
            seed=0,
            floor=floor,
            cases=[Case(prompt, seed=3) for prompt in prompts],
            per_trial=per_trial,
        )

    return build


@pytest.mark.usefixtures("in_memory")
def test_a_trial_ends_at_the_first_prompt_below_the_floor(
    new_search: Callable[..., Search], model: Model
) -> None:
    search = new_search(floor=200.0)
    search.hardest()
    model.sparse.clear()
    search.run(4)
    assert [prompt for _, prompt in model.sparse] == ["easy"] * 4


@pytest.mark.usefixtures("in_memory")
def test_trials_run_the_hardest_cases(new_search: Callable[..., Search], model: Model) -> None:
    """Which are hard is measured once, with the policy to begin from."""
    search = new_search(floor=10.0, prompts=("easy", "hard", "other"), per_trial=1)
    assert search.hardest() == [Case("hard", 3)]
    assert [prompt for _, prompt in model.sparse] == ["easy", "hard", "other"]
    search.run(2)
    assert [prompt for _, prompt in model.sparse[3:]] == ["hard", "hard"]


@pytest.mark.usefixtures("in_memory")
def test_a_trial_slower_than_the_best_ends_early(new_search: Callable[..., Search], model: Model) -> None:
    """The first holds the floor; of those after it only one as fast gets a second prompt."""
    search = new_search(floor=20.0)
    search.run(4)
    first, *others = search.study().trials
    assert len(first.user_attrs["psnr_db"]) == 2
    for trial in others:
        slower = trial.value > first.value * policy_search.SLOWER
        assert len(trial.user_attrs["psnr_db"]) == (1 if slower else 2)
    assert any(len(trial.user_attrs["psnr_db"]) == 1 for trial in others)


@pytest.mark.usefixtures("in_memory")
def test_the_search_finds_a_faster_policy_that_holds_the_floor(new_search: Callable[..., Search]) -> None:
    search = new_search()
    search.run(24)
    found = search.check(finalists=3)
    assert found is not None
    assert min(found.psnr_db) >= 28.0
    holding = [t for t in search.study().trials if t.user_attrs["shortfall_db"] <= 0]
    assert found.speedup == pytest.approx(1000 / min(t.value for t in holding))
    assert found.speedup > max(1000 / t.value for t in holding if t.number < 4), "better than where it began"


@pytest.mark.usefixtures("in_memory")
def test_the_check_refuses_what_one_prompt_breaks(new_search: Callable[..., Search], model: Model) -> None:
    """On the hard prompt the error doubles, 6 dB: the fastest above the floor fall below it there."""
    search = new_search()
    search.run(12)
    easy = search.check(finalists=1)
    assert easy is not None
    assert easy.psnr_db[0] < 34.0
    model.sparse.clear()
    search.cases = [Case(prompt, 3) for prompt in ("easy", "hard", "other")]
    assert search.check(finalists=1) is None
    assert [prompt for _, prompt in model.sparse] == ["easy", "hard"], "the first failure ends the check"


@pytest.mark.usefixtures("in_memory")
def test_a_sparse_mlp_may_be_demanded(new_search: Callable[..., Search]) -> None:
    search = new_search(floor=20.0)
    search.run(12)
    assert any(t.user_attrs["policy"]["mlp"] is None for t in search.study().trials)
    found = search.check(finalists=3, need_mlp=True)
    assert found is not None and found.policy.mlp is not None


def test_a_search_continues_where_it_was_killed(new_search: Callable[..., Search], model: Model) -> None:
    """Finished trials and dense runs are not repeated; what a killed process left is given up."""
    search = new_search()
    search.run(5)
    values = [trial.value for trial in search.study().trials]
    search.study().ask()  # a trial under way when the process died
    assert sorted(model.dense) == ["easy", "other"]
    again = new_search()
    again.run(7)
    assert sorted(model.dense) == ["easy", "other"], "dense runs come from the cache"
    trials = again.study().trials
    assert [trial.value for trial in trials[:5]] == values
    assert trials[5].state == optuna.trial.TrialState.FAIL
    assert again.finished == 7


@pytest.mark.usefixtures("in_memory")
def test_pictures_with_nan_never_win(
    new_search: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = SimpleNamespace(generation=SimpleNamespace(output=np.full((4, 4, 3), np.nan), total_ms=1.0))
    monkeypatch.setattr(policy_search, "run_sparse", lambda *arguments, **options: nan)
    search = new_search()
    search.run(3)
    assert [trial.user_attrs["shortfall_db"] for trial in search.study().trials[:3]] == [200.0] * 3
    assert search.check(finalists=3) is None


TINY = (
    "flux",
    "--random-weights",
    "tiny",
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--size",
    "128",
    "--steps",
    "4",
)


def test_the_command_writes_a_policy_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--trials", "2", "--search-cases", "1", "--check-prompts", "2", "--work", str(tmp_path))
    output = tmp_path / "policy.yaml"
    assert main([*TINY, *small, "--psnr-floor", "5", "--name", "mine", "--output", str(output)]) == 0
    policy = load_policy(output)
    assert policy.name == "mine"
    assert "all 4 pictures" in output.read_text()
    assert "holds" in capsys.readouterr().out
    hopeless = tmp_path / "hopeless.yaml"
    assert main([*TINY, *small, "--psnr-floor", "500", "--output", str(hopeless)]) == 1
    assert "lower --psnr-floor" in capsys.readouterr().err
    assert not hopeless.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--trials", "0"), "--trials 0"),
        (("--check-prompts", "99"), "8 fixed prompts"),
        (("--start", "flux-shape"), "did you mean 'flux-shapes'"),
    ],
)
def test_bad_input_is_named(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, *arguments]) == 2
    assert says in capsys.readouterr().err

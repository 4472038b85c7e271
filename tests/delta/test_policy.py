"""Policies: schedules, plain form, files, and what is said about a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from chipmunk_kernels.delta.policies import load_policy, names
from chipmunk_kernels.delta.policy import AttentionPolicy, MlpPolicy, Policy, Schedule


def test_schedule() -> None:
    assert Schedule(2, 10).full_steps(31) == (0, 1, 10, 20, 30)
    assert Schedule(2, 0, (10, 40)).full_steps(50) == (0, 1, 10, 40)
    assert Schedule(1, 1).full_steps(3) == (0, 1, 2)


@given(st.integers(1, 3), st.integers(0, 6), st.lists(st.integers(0, 20), max_size=3), st.integers(0, 25))
def test_last_full(first: int, every: int, also: list[int], step: int) -> None:
    schedule = Schedule(first, every, tuple(also))
    assert schedule.last_full(step) == max(schedule.full_steps(step + 1))


@pytest.mark.parametrize("name", names())
def test_built_in_policies_load_and_survive_a_round_trip(name: str) -> None:
    policy = load_policy(name)
    assert policy.name == name
    assert Policy.from_mapping(yaml.safe_load(yaml.safe_dump(policy.as_dict()))) == policy


def test_the_models_of_this_release_have_one() -> None:
    assert {"flux-dev", "hunyuan-video", "flux-shapes"} <= set(names())


def test_policy_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("attention: {keep: 0.2, schedule: {first: 3, also: [5]}}\nmlp: null\npatch: [[4, 4]]\n")
    policy = load_policy(path)
    assert policy == Policy("mine", AttentionPolicy(0.2, schedule=Schedule(3, also=(5,))), None, ((4, 4),))


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'flux_dev'; did you mean 'flux-dev'\?"):
        load_policy("flux_dev")
    with pytest.raises(ValueError, match=r"There are .*hunyuan-video"):
        load_policy("zzz")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1\n", "expected a mapping"),
        ("attention: [\n", "not valid YAML"),
        ("atention: null\n", "unknown fields"),
        ("attention: {kep: 0.1}\n", "unknown fields"),
        ("attention: 3\n", "attention: expected a mapping, got 3"),
        ("mlp: {schedule: 10}\n", "mlp.schedule: expected a mapping, got 10"),
        ("mlp: {keep: 1.5}\n", "mlp.keep: expected a fraction"),
        ("mlp: {keep: many}\n", "not supported between"),
        ("attention: {merge: sum}\n", "attention.merge"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml") as caught:
        load_policy(path)
    assert said in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*none\.yaml: No such file"):
        load_policy(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("make", "values", "said"),
    [
        (Schedule, {"first": 0}, "schedule.first"),
        (Schedule, {"every": -1}, "schedule.every"),
        (AttentionPolicy, {"keep": -0.1}, "attention.keep"),
        (AttentionPolicy, {"random": 2.0}, "attention.random"),
        (AttentionPolicy, {"group_size": 0}, "attention.group_size"),
        (MlpPolicy, {"dense_layers": -1}, "mlp.dense_layers"),
        (MlpPolicy, {"reselect_every": 0}, "mlp.reselect_every"),
    ],
)
def test_bad_values(make: Any, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**values)

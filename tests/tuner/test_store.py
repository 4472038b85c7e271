"""The store: what is recorded survives, what applies is found, and what does not says why."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.tuner.fakes import PROBLEM
from tuner.store import MAX_ATTEMPTS, Identity, Outcome, Store, StoreError

SEARCH = Identity(
    problem=PROBLEM.as_dict(),
    device={"name": "NVIDIA H200", "arch": "sm_90"},
    toolchain={"torch": "2.11", "triton": "3.6"},
    timing={"timer": "events", "max_samples": 30},
)
TRIAL = dataclasses.replace(SEARCH, backend="triton", settings={"block": 64}, source="abc")
OK = Outcome("ok", median_ms=1.5, samples_ms=(1.4, 1.5, 1.6), stopped_by="interval", error=0.1, budget=0.2)


def recorded(store: Store, trial: Identity) -> Outcome | None:
    """The outcome of exactly this trial, as a search finds it."""
    return {r.identity.digest: r.outcome for r in store.records(trial)}.get(trial.digest)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "trials.db")


def test_an_outcome_is_there_for_another_process_at_once(store: Store, tmp_path: Path) -> None:
    store.begin(TRIAL)
    store.finish(TRIAL, OK)
    assert recorded(Store(tmp_path / "trials.db"), TRIAL) == OK


@pytest.mark.parametrize(
    "change",
    [
        {"problem": {**PROBLEM.as_dict(), "rows": 71}},
        {"device": {"name": "NVIDIA H100", "arch": "sm_90"}},
        {"toolchain": {"torch": "2.11", "triton": "3.7"}},
        {"timing": {"timer": "events", "max_samples": 31}},
        {"backend": "torch"},
        {"settings": {"block": 128}},
        {"source": "abd"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_of_the_identity_counts(store: Store, change: dict) -> None:
    store.finish(TRIAL, OK)
    assert recorded(store, dataclasses.replace(TRIAL, **change)) is None


def test_a_miss_is_explained_field_by_field(store: Store) -> None:
    store.finish(TRIAL, OK)
    assert store.explain(SEARCH) is None
    upgraded = dataclasses.replace(SEARCH, toolchain={"torch": "2.11", "triton": "3.7"})
    assert store.explain(upgraded) == "toolchain.triton was '3.6', is '3.7'"
    elsewhere = dataclasses.replace(SEARCH, problem={**PROBLEM.as_dict(), "rows": 9})
    assert store.explain(elsewhere) is None


def test_the_nearest_miss_is_the_one_explained(store: Store) -> None:
    store.finish(TRIAL, OK)
    other = dataclasses.replace(TRIAL, device={"name": "B200", "arch": "sm_100"}, toolchain={"torch": "1"})
    store.finish(other, OK)
    asked = dataclasses.replace(SEARCH, timing={"timer": "events", "max_samples": 7})
    assert store.explain(asked) == "timing.max_samples was 30, is 7"


def test_an_interrupted_trial_is_run_again_but_not_for_ever(store: Store) -> None:
    for _ in range(MAX_ATTEMPTS - 1):
        store.begin(TRIAL)
        assert recorded(store, TRIAL) is None
    store.begin(TRIAL)
    crashed = recorded(store, TRIAL)
    assert crashed is not None and crashed.status == "crashed"


def test_records_come_back_in_order(store: Store) -> None:
    for block in (64, 128, 32):
        store.finish(dataclasses.replace(TRIAL, settings={"block": block}), OK)
    store.begin(dataclasses.replace(TRIAL, settings={"block": 16}))
    assert [record.identity.settings["block"] for record in store.records(SEARCH)] == [64, 128, 32]
    assert store.records(SEARCH)[0].outcome == OK


def test_forgetting_takes_one_problem_of_one_device(store: Store) -> None:
    other_device = dataclasses.replace(TRIAL, device={"name": "NVIDIA H100", "arch": "sm_90"})
    for identity in (TRIAL, other_device):
        store.finish(identity, OK)
    store.save_verdict(f"{SEARCH.context} sources", {"a": 1})
    assert store.forget(SEARCH) == 1
    assert recorded(store, TRIAL) is None and recorded(store, other_device) == OK
    assert store.verdict(f"{SEARCH.context} sources") is None


def test_facts_and_verdicts_are_kept(store: Store) -> None:
    store.save_fact("ceilings", {"bandwidth_gbs": 1.5})
    store.save_verdict("key", {"backend": "torch"})
    assert store.fact("ceilings") == {"bandwidth_gbs": 1.5} and store.fact("other") is None
    assert store.verdict("key") == {"backend": "torch"} and store.verdict("other") is None


def test_a_file_that_is_no_database_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "trials.db"
    path.write_text("this is not a database, and it is long enough to be seen as none " * 20)
    with pytest.raises(StoreError, match="--storage"):
        Store(path)

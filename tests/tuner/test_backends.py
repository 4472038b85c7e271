"""A search over several backends, CuPy's among them: what each offers, and what becomes of it, end to end."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chipmunk_kernels import dispatch, registry
from chipmunk_kernels.profiles import Profile
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import choice
from tests.tuner.fakes import PROBLEM, FakeSettings, FakeTimer, fake_bench, fake_run
from tuner import sources, tuning
from tuner import space as space_module
from tuner.session import Session
from tuner.space import MOST_LISTED, Space
from tuner.store import Store
from tuner.tuning import Settings
from tuner.verify import Check
from tuner.workload import LabelledProblem, load_workload

CUDA = torch.device("cuda:0")
H200_SHARED_BYTES = 232448


@pytest.fixture
def everything_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU with CuPy: spaces are declared beside kernels, none of which is launched here."""
    monkeypatch.setattr(space_module, "unavailable_reason", lambda backend, device: None)


@pytest.mark.parametrize("suite", ["h200", "flux-dev", "hunyuan-video"])
def test_every_kernel_offers_a_choice_on_every_problem(suite: str, everything_available: None) -> None:
    for item in load_workload(suite).problems:
        space = Space(item.problem, CUDA, H200_SHARED_BYTES)
        for kernel in space.kernels:
            own = [c.settings for c in space.candidates.values() if c.kernel is kernel]
            assert kernel.settings() in own, f"{item.label}: {kernel.backend}'s defaults are not tried"
            fitting = [s for s in own if s.misfit(item.problem, H200_SHARED_BYTES) is None]
            least = 1 if kernel.backend == "torch" else 2
            assert len(fitting) >= least, f"{item.label}: {kernel.backend} has nothing to search"
            assert len(own) <= MOST_LISTED + 1


@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_declared_values_include_the_defaults_and_survive_a_profile(backend: str) -> None:
    for kernel in registry.kernels(backend).values():
        default = kernel.settings()
        for name, values in kernel.settings.space().items():
            assert getattr(default, name) in values, f"{backend} {kernel.operation}: {name}"
            assert len(set(values)) == len(values), f"{backend} {kernel.operation}: {name} repeats a value"
        assert kernel.settings.from_mapping(default.as_dict()) == default


@pytest.mark.parametrize("backend", ["cupy", "cupy_hopper"])
def test_cuda_sources_and_their_headers_are_part_of_a_kernels_identity(backend: str) -> None:
    for kernel in registry.kernels(backend).values():
        files = {path.name for path in sources._files(kernel.settings.__module__)}
        compiled = {source.file for source in sys.modules[kernel.settings.__module__].SOURCES}
        assert compiled and {"module.py", *compiled} <= files
        assert backend == "cupy" or "hopper.cuh" in files


class NVRTCError(RuntimeError):
    """Stands for the class of that name in CuPy."""


@dataclasses.dataclass(frozen=True)
class HopperSettings(FakeSettings):
    """Faster than the others where it compiles."""

    speed: int = choice(3, 3, 1)


def run_cuda(x: Tensor, group_size: int, settings: FakeSettings) -> Tensor:
    """As a kernel that NVRTC compiles when it is first called."""
    if settings.fault == "compile":
        log = 'fake.cu does not compile\nfake.cu(7): error: identifier "tile" is undefined\n1 error detected'
        raise RuntimeError(log) from NVRTCError("NVRTC_ERROR_COMPILATION (6)")
    return fake_run(x, group_size, settings)


FAKES = {
    "torch": Kernel("group_mean", "torch", fake_run, FakeSettings),
    "cupy": Kernel("group_mean", "cupy", run_cuda, FakeSettings),
    "cupy_hopper": Kernel("group_mean", "cupy_hopper", run_cuda, HopperSettings),
}


def fake_kernels(backend: str) -> Mapping[str, Kernel]:
    return {"group_mean": FAKES[backend]} if backend in FAKES else {}


def test_a_search_over_backends_ends_in_a_profile_that_dispatch_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything_available: None
) -> None:
    monkeypatch.setattr(registry, "kernels", fake_kernels)
    monkeypatch.setattr(registry, "unavailable", lambda backend, device: None)
    item = LabelledProblem("means", PROBLEM)
    store = Store(tmp_path / "trials.db")
    session = Session(fake_bench(FakeTimer()), store, None, Settings(budget_s=1e6), Profile.empty())
    *_, result = session.run((item,))
    assert result.entry is not None and result.entry.backend == "cupy_hopper"
    assert result.entry.settings == {"speed": 1, "fault": "none"}

    records = store.records(session.identity(item))
    assert {record.identity.backend for record in records} == set(FAKES)
    broken = [
        r.outcome for r in records if r.identity.backend != "torch" and r.outcome.status == "compile_error"
    ]
    # Three speeds that fit for cupy, two for cupy_hopper, each once with a source that does not compile.
    assert len(broken) == 5
    assert all('fake.cu(7): error: identifier "tile"' in outcome.reason for outcome in broken)
    assert all(record.outcome.build_s > 0 for record in records)
    spent = sum(record.outcome.build_s for record in records)
    assert result.entry.evidence["search"]["build_s"] == pytest.approx(spent, rel=1e-3)

    profile = Profile(entries=(result.entry,))
    kernel, settings = dispatch.select(PROBLEM, "cpu", profile=profile)
    assert kernel.backend == "cupy_hopper" and settings == HopperSettings(speed=1)


def hopper_wins(folder: Path) -> tuple[Store, Session, LabelledProblem]:
    store = Store(folder / "trials.db")
    session = Session(fake_bench(FakeTimer()), store, None, Settings(budget_s=1e6), Profile.empty())
    return store, session, LabelledProblem("means", PROBLEM)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "kernels", fake_kernels)
    monkeypatch.setattr(registry, "unavailable", lambda backend, device: None)


def test_every_entry_has_the_best_settings_of_other_backends(
    tmp_path: Path, everything_available: None, fakes: None
) -> None:
    """After a first round, after a search, and where a run of before wrote the entry without them."""
    store, session, item = hopper_wins(tmp_path)
    first, searched = (result.entry for result in session.run((item,)))
    assert first is not None and searched is not None
    assert first.backend == searched.backend == "cupy_hopper"
    assert {name: each["speed"] for name, each in first.other_backends.items()} == {"cupy": 8, "torch": 8}
    best = {"speed": 2, "fault": "none"}
    assert searched.other_backends == {"cupy": best, "torch": best}

    ((key, _),) = store._db.execute("SELECT context, entry FROM verdicts").fetchall()
    store.save_verdict(key, {**searched.as_dict(), "other_backends": {}})
    (again,) = session.run((item,))
    assert again.reused and again.entry == searched


def test_other_backends_leave_out_what_fails_on_other_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything_available: None, fakes: None
) -> None:
    verify = tuning.verify

    def picky(kernel: Kernel, settings: FakeSettings, *rest: object) -> Check:
        if kernel.backend == "cupy" and settings.speed == 2:
            return Check(1.0, 0.5, "small case, means")
        return verify(kernel, settings, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tuning, "verify", picky)
    _, session, item = hopper_wins(tmp_path)
    *_, result = session.run((item,))
    assert result.entry is not None
    assert {name: each["speed"] for name, each in result.entry.other_backends.items()} == {
        "cupy": 4,
        "torch": 2,
    }


def test_defaults_are_tried_first_even_where_they_call_themselves_a_misfit(
    monkeypatch: pytest.MonkeyPatch, everything_available: None
) -> None:
    """Dispatch runs them untuned all the same, so that is what a tuned kernel must be faster than."""
    monkeypatch.setattr(registry, "kernels", fake_kernels)
    monkeypatch.setattr(HopperSettings, "misfit", lambda self, *rest: "no" if self.speed == 3 else None)
    space = Space(PROBLEM, torch.device("cpu"))
    assert [c.kernel.backend for c in list(space.candidates.values())[:3]] == list(FAKES)
    assert {c.kernel.backend for c in space.defaults()} == set(FAKES)
    kept = [c.settings for c in space.candidates.values() if c.kernel.backend == "cupy_hopper"]
    assert [settings for settings in kept if settings.speed == 3] == [HopperSettings()]


@dataclasses.dataclass(frozen=True)
class ManySettings(FakeSettings):
    """More than anybody could try."""

    number: int = choice(0, *range(1000))


def test_of_too_many_candidates_a_sample_is_listed_and_the_rest_can_be_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel("group_mean", "torch", fake_run, ManySettings)
    monkeypatch.setattr(
        registry, "kernels", lambda backend: {"group_mean": kernel} if backend == "torch" else {}
    )
    space, again = (Space(PROBLEM, torch.device("cpu")) for _ in range(2))
    listed = dict(space.candidates)
    assert list(listed) == list(again.candidates)
    assert space.size == 24_000 and MOST_LISTED // 2 < len(listed) <= MOST_LISTED + 1
    assert len({c.settings.number for c in listed.values()}) > 900  # type: ignore[attr-defined]
    others = [{"speed": 4, "fault": "none", "number": number} for number in range(1000)]
    unlisted = next(s for s in others if f"torch {ManySettings(**s).as_json()}" not in listed)
    found = space.find("torch", unlisted)
    assert found is not None and space.candidates[found.key] is found
    assert space.find("torch", {**unlisted, "number": 1000}) is None  # not declared
    assert space.find("torch", {**unlisted, "speed": 6}) is None  # does not fit

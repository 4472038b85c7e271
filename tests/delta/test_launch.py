"""How an explicit profile reaches the operations, and when a problem stays dense."""

from __future__ import annotations

import pytest
import torch

from chipmunk_kernels import dispatch, registry
from chipmunk_kernels.delta.launch import Launch
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.profiles import Entry, Profile

CPU = torch.device("cpu")
EXTENT = (1, 2, 256, 256, 64)


def profile(crossover: float | None = None, dtype: str = "float32") -> Profile:
    problem = Problem(
        "sparse_attention", rows=256, columns=256, width=64, heads=2, dtype=dtype, group_size=32, density=0.2
    )
    settings = registry.kernel("sparse_attention", "torch").settings().as_dict()
    return Profile(entries=(Entry(problem, "torch", settings, density_crossover=crossover),))


def test_without_a_profile_the_operations_choose() -> None:
    assert Launch()("sparse_attention", CPU, torch.float32, EXTENT, 32, 0.2) == {}


def test_an_explicit_profile_is_handed_on_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch(profile())
    chosen = launch("sparse_attention", CPU, torch.float32, EXTENT, 32, 0.2)
    assert chosen["backend"] == "torch"
    assert isinstance(chosen["settings"], registry.kernel("sparse_attention", "torch").settings)
    monkeypatch.setattr(dispatch, "select", None)
    assert launch("sparse_attention", CPU, torch.float32, EXTENT, 32, 0.2) is chosen


@pytest.mark.parametrize(("density", "stays"), [(0.1, False), (0.5, True)])
def test_dense_above_the_crossover(density: float, stays: bool) -> None:
    reason = Launch(profile(crossover=0.3)).why_dense(
        "sparse_attention", CPU, torch.float32, EXTENT, 32, density
    )
    assert reason == ("density above the crossover" if stays else None)


def test_no_kernel_for_the_dtype() -> None:
    reason = Launch(Profile.empty()).why_dense("sparse_attention", CPU, torch.float64, EXTENT, 32, 0.1)
    assert reason == "no kernel for float64"


def test_no_backend_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no backend can run this")

    monkeypatch.setattr(dispatch, "select", refuse)
    launch = Launch(Profile.empty())
    assert launch.why_dense("sparse_mlp", CPU, torch.float32, EXTENT, 32, 0.1) == "no backend can run this"

"""What every test shares: where it runs, what it may find beside it, and what is skipped without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# The tests' tensors are small: a second thread waits more than it works, above all beside another worker (the
# HunyuanVideo tests took five times as long on two threads). Tests of speed choose their own. In the
# environment, and before torch reads it, for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.turns import turn

if not torch.cuda.is_available():
    # Triton reads this when it is first imported, so it must be set before any test module imports a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests, saying why, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch.cuda.is_available() is False here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Where pytest-xdist runs several workers, an `alone` test runs while the others wait."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    with turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is compiled once a run, whichever worker comes first."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    (folder / "compiled").mkdir(exist_ok=True)
    return folder / "compiled"


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same generator state, so that a failure repeats when the test runs alone."""
    torch.manual_seed(0)

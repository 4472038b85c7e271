"""What every test shares: where it runs, and what is skipped where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is first imported, so it must be set before any test module imports a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tests' tensors are small: a second thread waits more than it works, above all beside another busy
# process (the HunyuanVideo tests took five times as long on two threads). Tests of speed choose their own.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests, saying why, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch.cuda.is_available() is False here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same generator state, so that a failure repeats when the test runs alone."""
    torch.manual_seed(0)

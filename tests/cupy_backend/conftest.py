"""What the tests that run kernels on the host share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cupy_backend.emulate import COMPILER
from tests.cupy_backend.warps import Warps


@pytest.fixture(scope="session")
def host(compiled: Path) -> Warps:
    """Warps on the host; each source is compiled once a session."""
    if COMPILER is None:
        pytest.skip("no C++ compiler on PATH")
    return Warps(compiled)

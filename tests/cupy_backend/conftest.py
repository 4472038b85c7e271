"""What the tests that run kernels on the host share."""

from __future__ import annotations

import pytest

from tests.cupy_backend.emulate import COMPILER
from tests.cupy_backend.warps import Warps


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Warps:
    """Warps on the host; each source is compiled once a session."""
    if COMPILER is None:
        pytest.skip("no C++ compiler on PATH")
    return Warps(tmp_path_factory.mktemp("warps"))

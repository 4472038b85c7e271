"""Operations are tested on the torch backend everywhere, and on the triton backend where there is a GPU.

(On a CPU the Triton kernels have interpreter tests of their own.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from chipmunk_kernels import checks, registry


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def supported(backend: str) -> Callable[[str, torch.dtype, int], None]:
    """Skips, saying why, what the backend's kernel declares that it cannot run."""

    def check(operation: str, dtype: torch.dtype, width: int) -> None:
        reason = registry.kernel(operation, backend).unsupported(dtype, width)
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")

    return check


@pytest.fixture
def debug() -> Iterator[None]:
    """Values are checked too, for the length of one test."""
    before = checks.set_debug(True)
    yield
    checks.set_debug(before)

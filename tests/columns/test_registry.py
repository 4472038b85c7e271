"""The registry: every backend's table is complete and honest, whether or not the backend can run here."""

from __future__ import annotations

import pytest
import torch

from chipmunk_kernels import registry
from chipmunk_kernels.problem import OPERATIONS
from chipmunk_kernels.registry import BACKENDS
from chipmunk_kernels.settings import LaunchSettings


@pytest.mark.parametrize("backend", BACKENDS)
def test_unavailability_has_a_reason(backend: str) -> None:
    reason = registry.unavailable(backend, "cpu")
    assert reason is None or len(reason) > 10


def available() -> list[str]:
    return [backend for backend in BACKENDS if registry.unavailable(backend, "cpu") is None]


@pytest.mark.parametrize("backend", available())
def test_a_table_says_what_it_holds(backend: str) -> None:
    for operation, kernel in registry.kernels(backend).items():
        assert (kernel.operation, kernel.backend) == (operation, backend)
        assert issubclass(kernel.settings, LaunchSettings)
        defaults = kernel.settings().as_dict()
        for name, values in kernel.settings.space().items():
            assert defaults[name] in values, f"{operation}: the default of {name} is not among its values"
            assert len(set(values)) == len(values), f"{operation}: {name} repeats a value"


def test_torch_runs_every_operation() -> None:
    untuned = {"coverage_columns", "columns_from_mask", "bias_gelu"}
    assert set(OPERATIONS) | untuned == set(registry.kernels("torch"))
    for kernel in registry.kernels("torch").values():
        assert kernel.unsupported(torch.float32, 80) is None


def test_candidates_start_with_torch() -> None:
    found = registry.candidates("sparse_attention", "cpu")
    assert found[0].backend == "torch" and len({kernel.backend for kernel in found}) == len(found)


def test_what_is_unknown_is_named() -> None:
    with pytest.raises(
        ValueError,
        match="backend: expected one of torch, triton, triton_hopper, cupy, cupy_hopper; got 'cuda'",
    ):
        registry.unavailable("cuda", "cpu")
    with pytest.raises(ValueError, match="softmax: the torch backend has no such kernel; it has"):
        registry.kernel("softmax", "torch")

"""The kernels of each backend, found by name and imported on use.

A backend is a package under `chipmunk_kernels/backends/` with two functions:

    unavailable(device) -> str | None        why this backend cannot serve the device, or None
    kernels() -> Mapping[str, Kernel]        operation → kernel

so that `import chipmunk_kernels` needs neither triton nor cupy, and a machine without them still dispatches.
One that cannot be imported everywhere and serves few operations names them in `OPERATIONS`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from chipmunk_kernels.settings import LaunchSettings

BACKENDS = ("torch", "triton", "triton_hopper", "cupy", "cupy_hopper")


class BuildError(RuntimeError):
    """A kernel that cannot be built for this device; the message is the compiler's or the loader's."""


class UnsuitableInputError(ValueError):
    """Tensors that a kernel cannot take although it takes their dtype and width; nothing was launched.

    Where dispatch chose the kernel, the call goes to the next one.
    """


@dataclass(frozen=True)
class Kernel:
    """One backend's way to run one operation.

    Attributes:
        operation: as in `problem.OPERATIONS`.
        backend: as in `BACKENDS`.
        run: the backend function; every backend of an operation has the same signature, `settings` last.
        settings: the launch settings class that `run` takes.
        unsupported: given the same positional tensors' (dtype, width), why they cannot run here, or None.
    """

    operation: str
    backend: str
    run: Callable[..., Any]
    settings: type[LaunchSettings]
    unsupported: Callable[[torch.dtype, int], str | None] = lambda dtype, width: None


def _package(backend: str) -> Any:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    return importlib.import_module(f"chipmunk_kernels.backends.{backend}")


def unavailable(backend: str, device: torch.device | str) -> str | None:
    """Why `backend` cannot serve `device` and what to do about it, or None if it can."""
    return _package(backend).unavailable(torch.device(device))


@functools.cache
def kernels(backend: str) -> Mapping[str, Kernel]:
    """Operation → kernel for an available backend."""
    return _package(backend).kernels()


def offered(backend: str) -> tuple[str, ...] | None:
    """Operations of a backend that need not be imported to name them; None if it does not say."""
    return getattr(_package(backend), "OPERATIONS", None)


def kernel(operation: str, backend: str) -> Kernel:
    """The kernel of `operation` in `backend`. Raises ValueError if the backend has none."""
    found = kernels(backend).get(operation)
    if found is None:
        raise ValueError(
            f"{operation}: the {backend} backend has no such kernel; it has {sorted(kernels(backend))}"
        )
    return found


def candidates(operation: str, device: torch.device | str) -> list[Kernel]:
    """Every kernel that can run `operation` on `device`, in the order of `BACKENDS`."""
    return [
        kernels(backend)[operation]
        for backend in BACKENDS
        if unavailable(backend, device) is None and operation in kernels(backend)
    ]

"""Which kernel runs a problem, with which launch settings.

An explicit backend is honoured or refused. Otherwise the profile's winner runs, if its backend can; else
the first of the device's default order. A kernel that turns out not to build gives way to the next. Whatever
is passed over is said once. Answers are cached: asking again costs microseconds, and a profile that was
loaded anew counts as another question.
"""

from __future__ import annotations

import functools
import json
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from chipmunk_kernels import registry
from chipmunk_kernels.backends import hopper
from chipmunk_kernels.problem import OPERATIONS, Problem
from chipmunk_kernels.registry import BuildError, Kernel, UnsuitableInputError
from chipmunk_kernels.settings import LaunchSettings

if TYPE_CHECKING:
    from chipmunk_kernels.profiles import Entry, Profile

DEFAULT_ORDER = {
    "cpu": ("torch",),
    "cuda": ("triton", "torch"),
    "hopper": ("cupy_hopper", "triton_hopper", "triton", "torch"),
}
"""Backends by kind of device, best first: a CUDA device of compute capability 9.0 is a "hopper".

On other GPUs the CUDA kernels are for profiles to name: the tuner verifies them on the very GPU before it
writes one.
"""
FIRST_FOR = {("hopper", "topk_columns"): "cupy"}
"""Who comes before that order. On an H200, selection at HunyuanVideo's size took 3.0 ms there and 9.7 ms in
Triton, at FLUX's size 56 and 108 µs."""

_told: set[str] = set()
_broken: dict[tuple[str, str], str] = {}
"""(operation, backend) → why its kernel did not build in this process."""


def select(
    problem: Problem,
    device: torch.device | str,
    *,
    backend: str | None = None,
    settings: LaunchSettings | None = None,
    profile: Profile | None = None,
) -> tuple[Kernel, LaunchSettings]:
    """The kernel for `problem` on `device`, and its launch settings.

    Args:
        problem: what is to run.
        device: where.
        backend: run this one and no other.
        settings: run these; without a backend, they name the one they belong to.
        profile: look up in this one; by default in what `profiles.find` finds for the device.

    Raises:
        ValueError: an unknown backend, or settings that no kernel of this operation takes.
        RuntimeError: the explicit backend cannot run this here; the message says why and what to do.
    """
    device = torch.device(device)
    return _select(problem.operation, problem, device, backend, settings, profile or _profile(device))


def dense_is_better(problem: Problem, device: torch.device | str, profile: Profile | None = None) -> bool:
    """Whether the dense operation is known to beat the sparse one at this problem's density.

    True only above the density crossover that the profile records for the problem, or for the nearest one
    tuned.
    """
    device = torch.device(device)
    entry = _lookup(profile or _profile(device), problem)
    return (
        entry is not None
        and entry.density_crossover is not None
        and problem.density > entry.density_crossover
    )


def resolve(
    operation: str,
    device: torch.device,
    backend: str,
    settings: str,
    *,
    rows: int,
    columns: int,
    width: int,
    batch: int,
    heads: int = 1,
    dtype: torch.dtype = torch.float32,
    group_size: int = 1,
    kept: int | None = None,
) -> tuple[Kernel, LaunchSettings]:
    """`select` for a registered operator: plain values, `backend` and `settings` as strings, "" to choose.

    `kept` is the capacity of the column set, which stands for the density: the counts stay unread. Where
    dispatch chose, a kernel that does not build hands its call to the next one.
    """
    key = (rows, columns, width, batch, heads, dtype, group_size, kept)
    return _resolve(operation, device, backend, settings, key, _profile(device))


def encode(
    operation: str, device: torch.device, backend: str | None, settings: LaunchSettings | None
) -> tuple[str, str]:
    """Backend and settings as the strings that a registered operator takes.

    Raises:
        ValueError: settings without a backend that no available kernel of this operation takes.
    """
    if settings is None:
        return backend or "", ""
    if backend is None:
        backend = _owner(operation, device, settings)
    return backend, settings.as_json()


@functools.lru_cache(maxsize=4096)
def _resolve(
    operation: str,
    device: torch.device,
    backend: str,
    settings: str,
    key: tuple[int, int, int, int, int, torch.dtype, int, int | None],
    profile: Profile,
) -> tuple[Kernel, LaunchSettings]:
    rows, columns, width, batch, heads, dtype, group_size, kept = key
    problem = Problem(
        operation if operation in OPERATIONS else "topk_columns",
        rows=rows,
        columns=columns,
        width=width,
        batch=batch,
        heads=heads,
        dtype=str(dtype).removeprefix("torch."),
        group_size=group_size,
        density=1.0 if kept is None else min(1.0, max(1, kept) / columns),
    )
    built = None
    if settings:
        built = registry.kernel(operation, backend).settings.from_mapping(json.loads(settings))
    kernel, launch = _select(operation, problem, device, backend or None, built, profile)
    if backend:
        return kernel, launch

    def run_or_pass_on(*arguments: Any) -> Any:
        try:
            return kernel.run(*arguments)
        except UnsuitableInputError as error:
            entry = _lookup(profile, problem)
            other = _best(operation, problem, device, entry, without=kernel.backend)
            _tell(f"{operation}: using the {other.backend} backend on {device}: {error}")
            return other.run(*arguments[:-1], _tuned(other, problem, entry))
        except BuildError as error:
            _pass_over(kernel, error)
        following, following_launch = _resolve(operation, device, backend, settings, key, profile)
        return following.run(*arguments[:-1], following_launch)

    return replace(kernel, run=run_or_pass_on), launch


def _pass_over(kernel: Kernel, error: BuildError) -> None:
    """Remember a kernel that does not build, and forget the answers that named it."""
    if kernel.backend == "torch":  # nothing comes after it
        raise error
    _broken[kernel.operation, kernel.backend] = f"its kernel does not build ({error})"
    _select.cache_clear()
    _resolve.cache_clear()


@functools.lru_cache(maxsize=4096)
def _select(
    operation: str,
    problem: Problem,
    device: torch.device,
    backend: str | None,
    settings: LaunchSettings | None,
    profile: Profile,
) -> tuple[Kernel, LaunchSettings]:
    if backend is None and settings is not None:
        backend = _owner(operation, device, settings)
    entry = _lookup(profile, problem)
    if backend is not None:
        kernel = _demand(operation, backend, problem, device)
    else:
        kernel = _best(operation, problem, device, entry)
    if settings is None:
        settings = _tuned(kernel, problem, entry)
    elif not isinstance(settings, kernel.settings):
        raise ValueError(
            f"settings: expected {kernel.settings.__name__} for {operation} on the {kernel.backend} backend, "
            f"got {type(settings).__name__}"
        )
    return kernel, settings


def _demand(operation: str, backend: str, problem: Problem, device: torch.device) -> Kernel:
    """The kernel of a backend that was asked for by name."""
    reason = _why_not(operation, backend, problem, device)
    if reason is not None:
        others = [name for name in registry.BACKENDS if _why_not(operation, name, problem, device) is None]
        raise RuntimeError(
            f"{operation}: the {backend} backend cannot run this on {device}: {reason}. "
            f"Backends that can: {', '.join(others) or 'none'}; leave backend out to let dispatch choose"
        )
    return registry.kernel(operation, backend)


def _best(
    operation: str, problem: Problem, device: torch.device, entry: Entry | None, without: str = ""
) -> Kernel:
    """The profile's winner, or the next backend that can, other than `without`."""
    kind = _kind(device)
    first = (entry.backend if entry else None, FIRST_FOR.get((kind, operation)))
    offered = [name for name in DEFAULT_ORDER[kind] if _offers(name, operation)]
    names = dict.fromkeys(name for name in (*first, *offered) if name and name != without)
    passed_over: list[str] = []
    for name in names:
        reason = _why_not(operation, name, problem, device)
        if reason is None:
            if passed_over:
                _tell(f"using the {name} backend on {device}: {'; '.join(passed_over)}")
            return registry.kernel(operation, name)
        passed_over.append(f"{name} cannot: {reason}")
    raise RuntimeError(f"{operation}: no backend can run this on {device}: {'; '.join(passed_over)}")


@functools.cache
def _kind(device: torch.device) -> str:
    """Of device, as in `DEFAULT_ORDER`."""
    if device.type != "cuda":
        return "cpu"
    found = torch.cuda.is_available() and torch.cuda.get_device_capability(device)
    return "hopper" if found == hopper.CAPABILITY else "cuda"


def _offers(backend: str, operation: str) -> bool:
    """Whether a backend has such a kernel at all, so that only a real loss is spoken of."""
    try:
        return operation in registry.kernels(backend)
    except ImportError:  # not to be listed without its package; `unavailable` names that
        listed = registry.offered(backend)
        return listed is None or operation in listed


def _tuned(kernel: Kernel, problem: Problem, entry: Entry | None) -> LaunchSettings:
    """The profile's settings where they are this kernel's and fit the problem, else its defaults."""
    found = entry.settings_for(kernel.backend) if entry is not None else None
    if entry is None or found is None or entry.problem.operation != kernel.operation:
        return kernel.settings()
    try:
        settings = kernel.settings.from_mapping(found)
    except (TypeError, ValueError) as error:
        _tell(f"{kernel.operation}: tuned settings left out, defaults used: {error}; tune again")
        return kernel.settings()
    return kernel.settings() if settings.misfit(problem) else settings


def _owner(operation: str, device: torch.device, settings: LaunchSettings) -> str:
    """The backend whose kernel takes these settings."""
    found = [kernel for kernel in registry.candidates(operation, device) if type(settings) is kernel.settings]
    if not found:
        raise ValueError(
            f"settings: no kernel of {operation} available on {device} takes {type(settings).__name__}"
        )
    return found[0].backend


def _why_not(operation: str, backend: str, problem: Problem, device: torch.device) -> str | None:
    """Why this backend cannot run this problem on this device, or None."""
    reason = registry.unavailable(backend, device)
    if reason is not None:
        return reason
    kernel = registry.kernels(backend).get(operation)
    if kernel is None:
        return f"it has no {operation} kernel"
    if (operation, backend) in _broken:
        return _broken[operation, backend]
    return kernel.unsupported(getattr(torch, problem.dtype), problem.width)


def _lookup(profile: Profile, problem: Problem) -> Entry | None:
    return profile.lookup(problem) if profile.entries else None


def _profile(device: torch.device) -> Profile:
    # Imported on use: it brings in YAML, which a plain `import chipmunk_kernels` does without.
    from chipmunk_kernels.profiles import find

    return find(device)


def _tell(message: str) -> None:
    """Warn, once per process for each message."""
    if message not in _told:
        _told.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)

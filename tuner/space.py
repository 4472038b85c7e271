"""What can be tried for a problem: the launch settings of every kernel that can run it, the defaults first.

All of them are listed, or, of a kernel that declares more than any search could try, a fair sample: listing a
quarter of a million took eight seconds a problem, and no proposal depends on the list.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from chipmunk_kernels import registry
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings

if TYPE_CHECKING:
    import optuna


MOST_LISTED = 4000
"""Settings of one kernel."""


@dataclass(frozen=True)
class Candidate:
    """A kernel with one choice of its settings."""

    kernel: Kernel
    settings: LaunchSettings

    @property
    def key(self) -> str:
        """`triton {"block_m": 128, ...}`: stable, readable, unique within a problem."""
        return f"{self.kernel.backend} {self.settings.as_json()}"

    @property
    def is_default(self) -> bool:
        return self.settings == self.kernel.settings()

    def parameters(self) -> dict[str, Any]:
        """As the parameters of an Optuna trial."""
        own = {f"{self.kernel.backend}.{name}": value for name, value in self.settings.as_dict().items()}
        return {"backend": self.kernel.backend, **own}


class Space:
    """The candidates of one problem on one device.

    Attributes:
        kernels: those that can run it here.
        refused: backend → why its kernel cannot.
        misfits: reason → how many settings it ruled out before anything was built.
    """

    def __init__(
        self, problem: Problem, device: torch.device, shared_memory_bytes: int | None = None
    ) -> None:
        self._problem, self._device, self._shared_memory = problem, device, shared_memory_bytes
        self.refused: dict[str, str] = {}
        self.misfits: Counter[str] = Counter()
        self.kernels: list[Kernel] = []
        for backend in registry.BACKENDS:
            reason = why_not(problem, backend, device)
            if reason is None:
                self.kernels.append(registry.kernel(problem.operation, backend))
            else:
                self.refused[backend] = reason

    @property
    def size(self) -> int:
        """How many settings are declared by the kernels that are searched, fitting or not."""
        return sum(math.prod(map(len, kernel.settings.space().values())) for kernel in self.searched)

    @property
    def searched(self) -> list[Kernel]:
        """Kernels whose settings are searched. On a GPU the torch backend is the fallback that runs anywhere:
        it takes part with its defaults, and not one trial more as long as there is another."""
        others = [kernel for kernel in self.kernels if kernel.backend != "torch"]
        return others if others and self._device.type == "cuda" else self.kernels

    @cached_property
    def candidates(self) -> dict[str, Candidate]:
        """Key → candidate, for those listed that fit, and the defaults, which come first in the order of the
        backends: dispatch runs those untuned, whatever they say of the problem. `find` adds what it finds."""
        defaults = [Candidate(kernel, kernel.settings()) for kernel in self.kernels]
        found = {candidate.key: candidate for candidate in defaults}
        every = (Candidate(kernel, each) for kernel in self.searched for each in _listed(kernel))
        for candidate in every:
            reason = candidate.settings.misfit(self._problem, self._shared_memory)
            if reason is None:
                found.setdefault(candidate.key, candidate)
            else:
                self.misfits[reason] += 1
        return found

    def defaults(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates.values() if candidate.is_default]

    def presets(self) -> list[Candidate]:
        """What the kernels recommend besides their defaults, as far as it fits."""
        named = [Candidate(kernel, each) for kernel in self.searched for each in kernel.settings.presets()]
        return [self.candidates[each.key] for each in named if each.key in self.candidates]

    def find(self, backend: str, settings: dict[str, Any]) -> Candidate | None:
        """The candidate of these settings, None where they do not fit or are not among the declared."""
        for kernel in self.kernels:
            if kernel.backend == backend:
                try:
                    wanted = Candidate(kernel, kernel.settings.from_mapping(settings))
                except (TypeError, ValueError):
                    return None
                return self.candidates.get(wanted.key) or self._unlisted(wanted)
        return None

    def _unlisted(self, wanted: Candidate) -> Candidate | None:
        declared, own = wanted.kernel.settings.space(), wanted.settings.as_dict()
        if wanted.kernel not in self.searched or any(own[name] not in declared[name] for name in declared):
            return None
        if wanted.settings.misfit(self._problem, self._shared_memory) is not None:
            return None
        return self.candidates.setdefault(wanted.key, wanted)

    def suggest(self, trial: optuna.Trial) -> Candidate | None:
        """What an Optuna trial proposes; None if it does not fit."""
        names = [kernel.backend for kernel in self.searched]
        kernel = self.searched[names.index(trial.suggest_categorical("backend", names))]
        values = {
            name: trial.suggest_categorical(f"{kernel.backend}.{name}", choices)
            for name, choices in kernel.settings.space().items()
        }
        return self.find(kernel.backend, values)

    def distributions(self, candidate: Candidate) -> dict[str, optuna.distributions.BaseDistribution]:
        """The Optuna distributions that the parameters of a candidate come from."""
        from optuna.distributions import CategoricalDistribution

        backend = candidate.kernel.backend
        own = {
            f"{backend}.{name}": CategoricalDistribution(choices)
            for name, choices in candidate.kernel.settings.space().items()
        }
        return {"backend": CategoricalDistribution([kernel.backend for kernel in self.searched]), **own}


def unavailable_reason(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot be tuned on a device, or None.

    Triton's interpreter does run on a CPU, to test kernels; its times say nothing about anything.
    """
    reason = registry.unavailable(backend, device)
    if reason is None and device.type == "cpu" and backend != "torch":
        return f"{backend} only interprets kernels on a CPU"
    return reason


def why_not(problem: Problem, backend: str, device: torch.device) -> str | None:
    """Why a backend has nothing to offer for a problem on a device, or None."""
    reason = unavailable_reason(backend, device)
    if reason is not None:
        return reason
    kernel = registry.kernels(backend).get(problem.operation)
    if kernel is None:
        return f"it has no {problem.operation} kernel"
    return kernel.unsupported(getattr(torch, problem.dtype), problem.width)


def _listed(kernel: Kernel) -> Iterator[LaunchSettings]:
    """Every declared combination, or `MOST_LISTED` of them, the same every time."""
    space = kernel.settings.space()
    declared = math.prod(map(len, space.values()))
    if declared <= MOST_LISTED:
        for values in itertools.product(*space.values()):
            yield kernel.settings(**dict(zip(space, values, strict=True)))
        return
    for number in random.Random(0).sample(range(declared), MOST_LISTED):
        chosen = {}
        for name, choices in space.items():
            number, place = divmod(number, len(choices))
            chosen[name] = choices[place]
        yield kernel.settings(**chosen)

"""The step clock: which denoising step of which guidance branch a forward of the root module belongs to.

It counts forwards of the root module, never calls of a layer: another cache may skip blocks, and a counter
inside them would drift. It starts anew when

- the owner says that the generation ended (`reset`),
- the generation's marker changes (an object compared by identity, e.g. a scheduler's list of timesteps),
- a branch's timestep rises: samplers go from noise to picture, so a rise means that a new generation began
  after one that never ended (an exception, a stopped loop). A sampler whose timesteps rise is never sparse.
- a branch's signature changes: resolution, batch, dtype, device.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

UNNAMED_BRANCHES = 4
"""Forwards at one timestep that may be guidance branches the caller does not name (own caches each)."""


@dataclass(frozen=True)
class Tick:
    """One forward: its branch, its step in that branch, and whether it begins a generation."""

    branch: Hashable
    step: int
    fresh: bool


@dataclass
class _Branch:
    signature: Hashable
    step: int = -1
    timestep: float | None = None


@dataclass
class StepClock:
    """Counts denoising steps per guidance branch."""

    _branches: dict[Hashable, _Branch] = field(default_factory=dict)
    _marker: Any = None
    _unnamed: tuple[float | None, int] = (None, 0)

    def tick(
        self,
        signature: Hashable,
        *,
        branch: Hashable = None,
        timestep: float | None = None,
        marker: Any = None,
    ) -> Tick:
        """Note a forward and say which step it is.

        Args:
            signature: what must stay the same within a generation of this branch.
            branch: the guidance branch; None if the caller does not name it. Then forwards that repeat a
                timestep are taken for the branches of that step in the order they come, at most
                `UNNAMED_BRANCHES` of them: timing loops repeat a timestep too.
            timestep: the forward's timestep where it can be read cheaply.
            marker: compared by identity; another object means another generation.
        """
        if branch is None:
            branch = self._name(timestep)
        if self._is_new(branch, signature, timestep, marker):
            self.reset()
            branch = ("unnamed", 0) if isinstance(branch, tuple) else branch
        self._marker = marker
        fresh = not self._branches
        state = self._branches.setdefault(branch, _Branch(signature))
        state.step += 1
        state.timestep = timestep
        if isinstance(branch, tuple):
            self._unnamed = (timestep, branch[1])
        return Tick(branch, state.step, fresh)

    def reset(self) -> None:
        """The generation is over."""
        self._branches.clear()
        self._marker = None
        self._unnamed = (None, 0)

    def _name(self, timestep: float | None) -> Hashable:
        last, occurrence = self._unnamed
        repeated = timestep is not None and timestep == last
        return ("unnamed", (occurrence + 1) % UNNAMED_BRANCHES if repeated else 0)

    def _is_new(self, branch: Hashable, signature: Hashable, timestep: float | None, marker: Any) -> bool:
        if self._branches and marker is not self._marker:
            return True
        state = self._branches.get(branch)
        if state is None:
            return False
        rose = timestep is not None and state.timestep is not None and timestep > state.timestep
        return rose or signature != state.signature

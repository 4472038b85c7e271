"""Launch settings: what a kernel lets the tuner choose.

A kernel declares a frozen dataclass beside itself, whose fields are made with `choice(default, *values)`: the
default is safe on every supported device, the values are those worth searching.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from chipmunk_kernels.problem import Problem

Self = TypeVar("Self", bound="LaunchSettings")


def choice(default: Any, *values: Any) -> Any:
    """A settings field with its default and every value worth searching (the default included)."""
    return field(default=default, metadata={"values": values or (default,)})


@dataclass(frozen=True)
class LaunchSettings:
    """Base of all launch settings. Equal settings hash equal, so they serve as cache keys."""

    @classmethod
    def space(cls) -> dict[str, tuple[Any, ...]]:
        """Field name → values worth searching."""
        return {f.name: tuple(f.metadata["values"]) for f in fields(cls)}

    @classmethod
    def presets(cls: type[Self]) -> tuple[Self, ...]:
        """Settings known to do well somewhere, if not everywhere: the tuner tries them after the default."""
        return ()

    @classmethod
    def from_mapping(cls: type[Self], values: dict[str, Any]) -> Self:
        """Settings from a profile entry. Raises ValueError naming unknown fields."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown settings {unknown}; expected among {sorted(known)}")
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), sort_keys=True)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        """Why these settings cannot run this problem, or None: the tuner drops such candidates unbuilt."""
        return None

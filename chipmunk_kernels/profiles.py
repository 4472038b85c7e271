"""Tuned profiles: load one, look problems up in it, and find the right one for a device.

A profile is a YAML file. Its `kernels` part is bound to a device and a toolchain; its `policies` part is
portable. The ladder of `find`, first hit wins: explicit path → `CHIPMUNK_PROFILE` → `chipmunk-profile.yaml`
in the working directory → the packaged profile of exactly this device → a packaged one of the same
architecture (marked as transferred) → safe defaults. What was used is logged once.

A path that a person named (argument or environment) must be readable, else `ProfileError`. Anything that was
only come across is a miss with one warning when it is broken, and so is a broken entry inside a good file.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import yaml

from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import BACKENDS

if TYPE_CHECKING:
    from chipmunk_kernels.delta.policy import Policy

SCHEMA = 1
ENVIRONMENT_VARIABLE = "CHIPMUNK_PROFILE"
LOCAL_FILE = "chipmunk-profile.yaml"

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class ProfileError(ValueError):
    """A profile that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Entry:
    """The tuned answer to one problem.

    Attributes:
        problem: what was tuned.
        backend: the winner's backend.
        settings: the winner's launch settings, as `LaunchSettings.from_mapping` takes them.
        evidence: how it was measured and verified; numbers, never needed to run.
        density_crossover: the density above which the dense baseline is faster; None if not applicable.
        other_backends: the best settings that the search met of each other backend, for whoever cannot run
            the winner, or asks for another by name.
    """

    problem: Problem
    backend: str
    settings: dict[str, Any]
    evidence: dict[str, Any] = field(default_factory=dict)
    density_crossover: float | None = None
    other_backends: dict[str, dict[str, Any]] = field(default_factory=dict)

    def settings_for(self, backend: str) -> dict[str, Any] | None:
        """The tuned launch settings of a backend, None where the search met none."""
        return self.settings if backend == self.backend else self.other_backends.get(backend)

    def as_dict(self) -> dict[str, Any]:
        """As a profile's YAML stores it."""
        problem = self.problem.as_dict()
        return {
            "operation": problem.pop("operation"),
            "problem": problem,
            "backend": self.backend,
            "settings": dict(self.settings),
            "other_backends": {name: dict(settings) for name, settings in self.other_backends.items()},
            "density_crossover": self.density_crossover,
            "evidence": dict(self.evidence),
        }

    @classmethod
    def from_mapping(cls, values: Any) -> Entry:
        """An entry from YAML. Raises ValueError naming what is wrong with it."""
        if not isinstance(values, dict):
            raise ValueError(f"expected a mapping, got {type(values).__name__}")
        names = ("problem", "settings", "other_backends", "evidence")
        parts = {name: values.get(name) or {} for name in names}
        for name, part in parts.items():
            if not isinstance(part, dict):
                raise ValueError(f"{name}: expected a mapping, got {type(part).__name__}")
        backend = values.get("backend")
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
        others = parts["other_backends"]
        if not all(name in BACKENDS and isinstance(settings, dict) for name, settings in others.items()):
            raise ValueError(
                f"other_backends: expected a mapping of settings for each backend, got {others!r}"
            )
        crossover = values.get("density_crossover")
        if crossover is not None and not (_is_number(crossover) and 0.0 <= crossover <= 1.0):
            raise ValueError(f"density_crossover: expected a fraction from 0 to 1 or null, got {crossover!r}")
        problem = Problem.from_mapping({"operation": values.get("operation"), **parts["problem"]})
        return cls(
            problem, backend, dict(parts["settings"]), dict(parts["evidence"]), crossover, dict(others)
        )


@dataclass(frozen=True, eq=False)
class Profile:
    """Everything tuned for one device. Compared and hashed by identity, so it serves as a cache key.

    Attributes:
        device: name, kind (`cuda` or `cpu`), arch and more, as `device_identity` gives them.
        toolchain: versions and the hash of the kernel sources that were tuned.
        entries: one per problem.
        policies: portable sparsity plans by name.
        path: the file, or None for the defaults.
        rung: which step of the ladder found it.
        transferred: tuned on another device than the one it is used for.
    """

    device: dict[str, Any] = field(default_factory=dict)
    toolchain: dict[str, Any] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    policies: dict[str, Policy] = field(default_factory=dict)
    path: Path | None = None
    rung: str = "safe defaults"
    transferred: bool = False

    @classmethod
    def empty(cls) -> Profile:
        """No tuned entries: every problem runs with its kernel's defaults."""
        return cls()

    def lookup(self, problem: Problem) -> Entry | None:
        """The entry of this very problem, else of the nearest one that the same kernel serves, else None."""
        nearest = min(self.entries, key=lambda entry: entry.problem.distance(problem), default=None)
        if nearest is None or math.isinf(nearest.problem.distance(problem)):
            return None
        return nearest

    def as_dict(self) -> dict[str, Any]:
        """The whole YAML document."""
        return {
            "schema": SCHEMA,
            "device": dict(self.device),
            "toolchain": dict(self.toolchain),
            "kernels": [entry.as_dict() for entry in self.entries],
            "policies": {name: policy.as_dict() for name, policy in self.policies.items()},
        }


def slug(device_name: str) -> str:
    """A device's file name under `results/tuned/`, without suffix: "NVIDIA H200" → "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") or "unknown"


def device_identity(device: torch.device | str) -> dict[str, Any]:
    """What tells devices apart: `name`, `kind` and `arch` (`sm_90`, `x86_64`)."""
    device = torch.device(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"name": properties.name, "kind": "cuda", "arch": f"sm_{properties.major}{properties.minor}"}
    return _cpu_identity()


def packaged_folder() -> Path:
    """Where packaged profiles lie: `results/tuned` in a checkout, `chipmunk_kernels/tuned` in a wheel."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "results" / "tuned"
    return checkout if in_checkout() else package / "tuned"


def in_checkout() -> bool:
    """Whether this package runs from a source checkout rather than from an installed wheel."""
    # A fresh clone may have no results/ yet; an installed package never lies beside a build file.
    return (Path(__file__).resolve().parent.parent / "pyproject.toml").is_file()


def load(path: str | Path) -> Profile:
    """Read one profile file.

    Raises:
        ProfileError: not readable, not a profile, or of a newer schema. A broken entry or policy is left out
            with one warning instead.
    """
    path = Path(path)
    document = _read(path)
    schema = document.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise ProfileError(
            f"{path}: not a profile: expected 'schema: {SCHEMA}', got {schema!r}; tune it anew"
        )
    if schema > SCHEMA:
        raise ProfileError(
            f"{path}: written with schema {schema}, newer than the {SCHEMA} that this version reads; "
            "upgrade chipmunk-kernels or tune again with this version"
        )
    broken: list[str] = []
    profile = Profile(
        device=_section(document, "device", path),
        toolchain=_section(document, "toolchain", path),
        entries=_entries(document.get("kernels") or [], broken, path),
        policies=_policies(_section(document, "policies", path), broken),
        path=path,
        rung="explicit path",
    )
    if broken:
        _log.warning("%s: left out %d broken: %s", path, len(broken), "; ".join(broken))
    return profile


def find(device: torch.device | str, explicit: str | Path | None = None) -> Profile:
    """The profile to use on `device`, by the ladder in the module docstring. Cached; logged once.

    Raises:
        ProfileError: the explicit or environment path cannot be used.
    """
    named = str(explicit) if explicit is not None else None
    return _find(str(device), named, os.environ.get(ENVIRONMENT_VARIABLE) or None, os.getcwd())


def forget() -> None:
    """Drop cached look-ups, so that a profile written just now is found."""
    _find.cache_clear()


@functools.lru_cache(maxsize=64)
def _find(device: str, explicit: str | None, environment: str | None, folder: str) -> Profile:
    identity = device_identity(device)
    profile = (
        _named(explicit, "explicit path", identity)
        or _named(environment, f"environment variable {ENVIRONMENT_VARIABLE}", identity)
        or _local(Path(folder) / LOCAL_FILE, identity)
        or _packaged(identity)
        or Profile.empty()
    )
    _log.info(
        "profile for %s: %s%s", identity["name"], profile.rung, f" ({profile.path})" if profile.path else ""
    )
    return profile


def _named(path: str | None, rung: str, identity: dict[str, Any]) -> Profile | None:
    """A profile that a person asked for. One of another kind of device still lends its portable policies."""
    if path is None:
        return None
    profile = load(path)
    if profile.device.get("kind") == identity["kind"]:
        return _placed(profile, rung, identity)
    _log.warning(
        "%s: tuned for %s, not for %s; its kernel entries are ignored, its policies are used",
        path, profile.device.get("name", "an unnamed device"), identity["name"],
    )  # fmt: skip
    return _placed(profile, rung, identity, entries=())


def _local(path: Path, identity: dict[str, Any]) -> Profile | None:
    profile = _tolerant(path) if path.is_file() else None
    if profile is None:
        return None
    if profile.device.get("kind") != identity["kind"]:
        _log.info("%s: tuned for %s, skipped on %s", path, profile.device.get("name"), identity["name"])
        return None
    return _placed(profile, "working directory", identity)


def _packaged(identity: dict[str, Any]) -> Profile | None:
    folder = packaged_folder()
    exact = folder / f"{slug(identity['name'])}.yaml"
    others = sorted(path for path in folder.glob("*.yaml") if path != exact)
    for path in [exact, *others] if exact.is_file() else others:
        profile = _tolerant(path)
        if profile is None or profile.device.get("kind") != identity["kind"]:
            continue
        if profile.device.get("name") == identity["name"]:
            return _placed(profile, "packaged, this device", identity)
        if profile.device.get("arch") == identity["arch"]:
            return _placed(profile, f"packaged, transferred from {profile.device.get('name')}", identity)
    return None


def _placed(
    profile: Profile, rung: str, identity: dict[str, Any], entries: tuple[Entry, ...] | None = None
) -> Profile:
    """The profile with its place on the ladder filled in."""
    return Profile(
        device=profile.device,
        toolchain=profile.toolchain,
        entries=profile.entries if entries is None else entries,
        policies=profile.policies,
        path=profile.path,
        rung=rung,
        transferred=profile.device.get("name") != identity["name"],
    )


def _tolerant(path: Path) -> Profile | None:
    """A profile that was only come across: a broken one is a miss with one warning."""
    try:
        return load(path)
    except ProfileError as error:
        _log.warning("profile skipped: %s", error)
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ProfileError(
            f"{path}: no such profile; check the path, or write one with chipmunk-tune"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: cannot be read ({error}); check the path and its permissions") from error
    except yaml.YAMLError as error:
        raise ProfileError(f"{path}: not valid YAML ({error}); restore it or tune it anew") from error
    if not isinstance(document, dict):
        raise ProfileError(
            f"{path}: not a profile: expected a mapping at the top, got {type(document).__name__}"
        )
    return document


def _section(document: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = document.get(name) or {}
    if not isinstance(section, dict):
        raise ProfileError(f"{path}: {name}: expected a mapping, got {type(section).__name__}")
    return section


def _entries(items: Any, broken: list[str], path: Path) -> tuple[Entry, ...]:
    if not isinstance(items, list):
        raise ProfileError(f"{path}: kernels: expected a list, got {type(items).__name__}")
    built = [_attempt(Entry.from_mapping, item, f"kernels[{n}]", broken) for n, item in enumerate(items)]
    return tuple(entry for entry in built if entry is not None)


def _policies(items: dict[str, Any], broken: list[str]) -> dict[str, Policy]:
    # Imported here: the delta engine uses profiles; only files that carry policies need it the other way.
    from chipmunk_kernels.delta.policy import Policy

    def build(named: tuple[str, Any]) -> Policy:
        return Policy.from_mapping({"name": named[0], **named[1]})

    built = {item[0]: _attempt(build, item, f"policies.{item[0]}", broken) for item in items.items()}
    return {name: policy for name, policy in built.items() if policy is not None}


def _attempt(build: Callable[[Any], _T], values: Any, where: str, broken: list[str]) -> _T | None:
    try:
        return build(values)
    except (TypeError, ValueError) as error:
        broken.append(f"{where}: {error}")
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@functools.cache
def _cpu_identity() -> dict[str, Any]:
    """The core count is part of a CPU's name: virtual machines of very different sizes share a model name."""
    arch = platform.machine() or "unknown"
    name = _cpu_model() or platform.processor() or f"{arch} CPU"
    return {"name": f"{name} ({os.cpu_count() or 1} cores)", "kind": "cpu", "arch": arch}


def _cpu_model() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found.group(1).strip() if found else ""
    return name if name.lower() not in ("", "unknown") else None

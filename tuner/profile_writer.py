"""Writing profiles: atomically, keeping what this run did not tune.

A profile is written anew after every problem. The new text goes to a temporary file beside the target and
takes its place in one step, so that an interrupted write leaves the old file as it was.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from chipmunk_kernels import profiles
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.profiles import LOCAL_FILE, SCHEMA, Entry, ProfileError, slug


class OutputError(ValueError):
    """A place where the profile cannot be written; the message says why and what to do."""


def output_path(output: str | None, device_name: str) -> Path:
    """The file to write: `output` itself if it is named like a YAML file, else the device's file in that
    folder.

    By default where the look-up ladder finds it again: `results/tuned/` in a checkout, else the working
    directory.
    """
    if output is None:
        if profiles.in_checkout():
            return profiles.packaged_folder() / f"{slug(device_name)}.yaml"
        return Path.cwd() / LOCAL_FILE
    path = Path(output).expanduser()
    return path if path.suffix in (".yaml", ".yml") else path / f"{slug(device_name)}.yaml"


class ProfileWriter:
    """One profile file, read when opened and rewritten with every new entry.

    Args:
        path: the file; its folder is created.
        device: name, kind and arch and more.
        toolchain: versions, and the hash of the kernel sources.

    Raises:
        OutputError: the folder cannot be written, or the file holds something that must not be overwritten.
    """

    def __init__(self, path: Path, device: Mapping[str, Any], toolchain: Mapping[str, Any]) -> None:
        self.path = path
        _require_writable(path)
        self._document = _read(path, str(device["name"]))
        self._document.update(schema=SCHEMA, device=dict(device), toolchain=dict(toolchain))
        self._document.setdefault("kernels", [])
        self._document.setdefault("policies", {})

    def put(self, entry: Entry) -> None:
        """Add or replace the entry of a problem and write the file."""
        kept = [item for item in self._document["kernels"] if _problem_of(item) != entry.problem]
        self._document["kernels"] = sorted([*kept, entry.as_dict()], key=_order)
        self.write()

    def add_policy(self, name: str, policy: Mapping[str, Any]) -> None:
        """Add a policy unless the file has one of that name, which somebody may have changed."""
        self._document["policies"].setdefault(name, dict(policy))

    def write(self) -> None:
        """Write the whole file in one step."""
        text = yaml.dump(self._document, Dumper=_Readable, sort_keys=False, width=110, allow_unicode=True)
        write_atomically(self.path, text)
        profiles.forget()


def write_atomically(path: Path, text: str) -> None:
    """Replace the file's content in one step; on any failure the old content stays and nothing else is
    left."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _require_writable(path: Path) -> None:
    """Say before the tuning what would fail after it."""
    remedy = "make it writable, or choose another place with --output"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"{path.parent}: a profile cannot be written there ({error}); {remedy}") from error
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise OutputError(f"{path}: this file cannot be written; {remedy}")


def _read(path: Path, device_name: str) -> dict[str, Any]:
    """The present document, to be kept where this run has nothing new. Empty if there is none."""
    if not path.exists():
        return {}
    remedy = "move it away, or choose another place with --output"
    try:
        present = profiles.load(path)
    except ProfileError as error:
        raise OutputError(f"{path} is not a usable profile and is left alone; {remedy}: {error}") from error
    name = present.device.get("name")
    if name and name != device_name:
        raise OutputError(f"{path} holds what was tuned for {name}, not for {device_name}; {remedy}")
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {**document, "kernels": document.get("kernels") or [], "policies": document.get("policies") or {}}


def _problem_of(item: Any) -> Problem | None:
    """The problem of a stored entry; None for a broken one, which is kept as it is."""
    try:
        return Entry.from_mapping(item).problem
    except (TypeError, ValueError):
        return None


def _order(item: Any) -> tuple[str, str]:
    problem = _problem_of(item)
    return (problem.operation, problem.key) if problem else ("~", "")


class _Readable(yaml.SafeDumper):
    """Short flat mappings and lists on one line, everything else spread out."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        node = super().represent_mapping(tag, mapping, flow_style)
        node.flow_style = _is_flat(mapping) and len(str(mapping)) < 100
        return node

    def represent_sequence(
        self, tag: str, sequence: Any, flow_style: bool | None = None
    ) -> yaml.SequenceNode:
        node = super().represent_sequence(tag, sequence, flow_style)
        node.flow_style = _is_flat(dict(enumerate(sequence)))
        return node

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _is_flat(mapping: Mapping[Any, Any]) -> bool:
    return bool(mapping) and not any(isinstance(value, (dict, list, tuple)) for value in mapping.values())

"""Built-in policies, one YAML file each, and how to load one by name or from a file."""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml

from chipmunk_kernels.delta.policy import Policy

_FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """Names of the built-in policies."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_policy(name_or_path: str | Path) -> Policy:
    """A built-in policy by name, or a policy from a YAML file (anything with a suffix or a folder is a path).

    Raises:
        ValueError: an unknown name (the nearest one is suggested), a file that is missing, unreadable or
        not a policy.
    """
    text = str(name_or_path)
    if text in names():
        return _read(_FOLDER / f"{text}.yaml")
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1 or path.is_file():
        return _read(path)
    near = difflib.get_close_matches(text, names(), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(
        f"policy: no built-in policy is called {text!r}{hint} There are {', '.join(names())}; or give a file"
    )


def _read(path: Path) -> Policy:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"policy: cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"policy: {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"policy: {path}: expected a mapping with the policy's fields, got {type(values).__name__}"
        )
    values.setdefault("name", path.stem)
    try:
        return Policy.from_mapping(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"policy: {path}: {error}") from error

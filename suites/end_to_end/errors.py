"""The one error that the commands of this folder show without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """What was asked for cannot be done here. The message names the problem and the remedy; exit code 2."""


def unknown(what: str, given: str, known: Iterable[str]) -> UsageError:
    """An unknown name, with the nearest known one suggested."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"unknown {what} {given!r}: {hint}known are {', '.join(names)}")

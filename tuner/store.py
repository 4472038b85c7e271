"""What was tried: one SQLite file in which every outcome is recorded the moment it happens.

A crash or a kill loses at most the trial in flight. A trial's identity is operation + problem + launch
settings + device + toolchain + kernel source hash + timing policy: a field left out would serve timings
that do not apply, a field too many would force needless searches. `explain` says field by field why
nothing recorded applies.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sqlite3
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "wrong", "invalid", "compile_error", "out_of_resources", "timeout", "error", "crashed"]

MAX_ATTEMPTS = 3
"""A trial that was in flight when the process died is tried again, but not for ever: then it is taken for the
killer."""

# Optuna keeps its own tables in the same file, `trials` and `studies` among them.
_TABLES = """
CREATE TABLE IF NOT EXISTS outcomes (
    identity TEXT PRIMARY KEY,
    context TEXT NOT NULL,
    operation TEXT NOT NULL,
    fields TEXT NOT NULL,
    status TEXT,
    reason TEXT,
    median_ms REAL,
    outcome TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    started TEXT NOT NULL,
    finished TEXT
);
CREATE INDEX IF NOT EXISTS outcomes_of_a_context ON outcomes (context);
CREATE TABLE IF NOT EXISTS verdicts (context TEXT PRIMARY KEY, entry TEXT NOT NULL, finished TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class StoreError(RuntimeError):
    """A storage file that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Identity:
    """What makes a recorded timing apply. Everything but backend, settings and source is shared by a search.

    Attributes:
        problem: `Problem.as_dict()`, the operation included.
        device: name and arch.
        toolchain: versions.
        timing: timer and timing policy.
        backend: of the candidate.
        settings: of the candidate.
        source: hash of the candidate's kernel sources.
    """

    problem: dict[str, Any]
    device: dict[str, Any]
    toolchain: dict[str, Any]
    timing: dict[str, Any]
    backend: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def digest(self) -> str:
        return _digest(asdict(self))

    @property
    def context(self) -> str:
        """The identity of the search that this trial belongs to."""
        shared = asdict(self)
        return _digest({name: shared[name] for name in ("problem", "device", "toolchain", "timing")})


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate.

    Attributes:
        status: `ok`, or why there is no timing.
        reason: one line; empty for `ok`.
        median_ms: the timing.
        samples_ms: all samples.
        stopped_by: the rule that ended the sampling.
        error: largest error against float64.
        budget: what was allowed.
        seconds: wall time that the trial took, from the start of its batch.
        build_s: of one process, compiling and verifying it; batches are built side by side.
    """

    status: Status
    reason: str = ""
    median_ms: float | None = None
    samples_ms: tuple[float, ...] = ()
    stopped_by: str = ""
    error: float | None = None
    budget: float | None = None
    seconds: float = 0.0
    build_s: float = 0.0


@dataclass(frozen=True)
class Record:
    """A recorded trial."""

    identity: Identity
    outcome: Outcome


class Store:
    """The SQLite file. Every write is committed before the call returns.

    Raises:
        StoreError: the file cannot be created or is no such file.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
            # A write-ahead log survives a kill, and lets another process read while this one writes.
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"{path}: cannot be used to record trials ({error}); name another file with --storage"
            ) from error

    def close(self) -> None:
        self._db.close()

    def begin(self, identity: Identity) -> None:
        """Note that a trial is in flight, so that a killed process leaves a trace of it."""
        self._put(identity)
        self._db.execute("UPDATE outcomes SET attempts = attempts + 1 WHERE identity = ?", (identity.digest,))

    def finish(self, identity: Identity, outcome: Outcome) -> None:
        """Record what became of it."""
        self._put(identity)
        values = (outcome.status, outcome.reason, outcome.median_ms, json.dumps(asdict(outcome)), _now())
        self._db.execute(
            "UPDATE outcomes SET status = ?, reason = ?, median_ms = ?, outcome = ?, finished = ? "
            "WHERE identity = ?",
            (*values, identity.digest),
        )

    def _put(self, identity: Identity) -> None:
        fields = json.dumps(asdict(identity), sort_keys=True)
        self._db.execute(
            "INSERT OR IGNORE INTO outcomes (identity, context, operation, fields, started) "
            "VALUES (?, ?, ?, ?, ?)",
            (identity.digest, identity.context, identity.problem["operation"], fields, _now()),
        )

    def records(self, search: Identity) -> list[Record]:
        """Every finished trial of a search, in the order in which they began.

        A trial that was in flight in `MAX_ATTEMPTS` processes that died is taken for crashed.
        """
        rows = self._db.execute(
            "SELECT fields, outcome, attempts FROM outcomes WHERE context = ? ORDER BY rowid",
            (search.context,),
        ).fetchall()
        found = []
        for fields, outcome, attempts in rows:
            identity = Identity(**json.loads(fields))
            if outcome is not None:
                found.append(Record(identity, _outcome(outcome)))
            elif attempts >= MAX_ATTEMPTS:
                found.append(Record(identity, self._crashed(identity, attempts)))
        return found

    def _crashed(self, identity: Identity, attempts: int) -> Outcome:
        outcome = Outcome("crashed", f"the process died {attempts} times while this candidate ran")
        self.finish(identity, outcome)
        return outcome

    def save_verdict(self, key: str, entry: dict[str, Any]) -> None:
        """Record the profile entry that a search ended with."""
        self._db.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", (key, json.dumps(entry), _now()))

    def verdict(self, key: str) -> dict[str, Any] | None:
        row = self._db.execute("SELECT entry FROM verdicts WHERE context = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def save_fact(self, name: str, value: Any) -> None:
        """Record something measured once, such as the ceilings of a device."""
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def fact(self, name: str) -> Any:
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    def forget(self, search: Identity) -> int:
        """Drop everything recorded about a problem on a device; returns how many trials that were."""
        where = "json_extract(fields, '$.problem') = json(?) AND json_extract(fields, '$.device.name') = ?"
        values = (json.dumps(search.problem, sort_keys=True), search.device["name"])
        contexts = self._db.execute(f"SELECT DISTINCT context FROM outcomes WHERE {where}", values).fetchall()
        dropped = self._db.execute(f"DELETE FROM outcomes WHERE {where}", values).rowcount
        for (context,) in contexts:
            self._db.execute("DELETE FROM verdicts WHERE context LIKE ? || '%'", (context,))
        return dropped

    def explain(self, search: Identity) -> str | None:
        """Why trials recorded for this problem do not apply to `search`, field by field; None if some do.

        Compares with the recorded search that differs in the fewest fields; None, too, if there is none.
        """
        if self._db.execute("SELECT 1 FROM outcomes WHERE context = ?", (search.context,)).fetchone():
            return None
        rows = self._db.execute(
            "SELECT fields FROM outcomes WHERE json_extract(fields, '$.problem') = json(?) GROUP BY context",
            (json.dumps(search.problem, sort_keys=True),),
        )
        misses = [_differences(Identity(**json.loads(fields)), search) for (fields,) in rows]
        nearest = min(misses, key=len, default=None)
        return None if nearest is None else "; ".join(nearest)


def _differences(stored: Identity, wanted: Identity) -> list[str]:
    values = [
        (part, name, getattr(stored, part).get(name), getattr(wanted, part).get(name))
        for part in ("device", "toolchain", "timing")
        for name in sorted(set(getattr(stored, part)) | set(getattr(wanted, part)))
    ]
    return [f"{part}.{name} was {was!r}, is {now!r}" for part, name, was, now in values if was != now]


def _outcome(text: str) -> Outcome:
    values = json.loads(text)
    return Outcome(**{**values, "samples_ms": tuple(values["samples_ms"])})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")

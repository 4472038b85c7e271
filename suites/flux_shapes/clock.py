"""Training by the clock: budgets, stages as shares of the time, and the log with times."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Clock:
    """Seconds since `started`, out of a budget."""

    def __init__(
        self, budget_s: float, started: float | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._now = now
        self.budget_s = budget_s
        self._started = now() if started is None else started

    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return self._now() - self._started


class Log:
    """Prints rows and keeps them; `write` saves them as JSON."""

    def __init__(self, clock: Clock, path: Path) -> None:
        self.clock, self.path = clock, path
        self.rows: list[dict[str, Any]] = []

    def add(self, event: str, **values: Any) -> None:
        """Record one event with the time it happened."""
        row = {"seconds": round(self.clock.elapsed_s(), 1), "event": event, **values}
        self.rows.append(row)
        shown = "  ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        print(f"[{row['seconds']:7.1f} s] {event:12s} {shown}", flush=True)

    def write(self) -> None:
        """Save all rows."""
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n")

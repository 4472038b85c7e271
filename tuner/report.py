"""What a run shows on stdout: a table for people, or JSON for programs."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from tuner.tuning import Result

HEADERS = (
    "operation",
    "problem",
    "winner",
    "median",
    "dense baseline",
    "speedup",
    "share of ideal",
    "verdict",
)


def table(results: list[Result]) -> str:
    """One row a problem."""
    text = tabulate([_row(result) for result in results], headers=HEADERS, disable_numparse=True)
    notes = [f"{result.item.label}: {result.note}" for result in results if result.note]
    return "\n".join([text, *(["", *notes] if notes else [])])


def as_json(results: list[Result]) -> list[dict[str, Any]]:
    """The same, with everything that is known of each problem."""
    return [
        {
            "label": result.item.label,
            "problem": result.item.problem.as_dict(),
            "entry": result.entry.as_dict() if result.entry else None,
            "share_of_ideal": result.share,
            "candidates": result.counts,
            "reused": result.reused,
            "note": result.note,
        }
        for result in results
    ]


def _row(result: Result) -> list[str]:
    problem, entry = result.item.problem, result.entry
    if entry is None:
        return [problem.operation, result.item.label, "none", "", "", "", "", ""]
    evidence = entry.evidence
    speedup = evidence["speedup"]
    return [
        problem.operation,
        result.item.label,
        f"{entry.backend} {settings_text(entry.settings)}".strip(),
        duration(evidence["time"]["median_ms"]),
        f"{duration(evidence['dense_baseline']['median_ms'])} {evidence['dense_baseline']['name']}",
        f"{speedup['median']:.2f}x ({speedup['low']:.2f}-{speedup['high']:.2f})",
        f"{100 * (result.share or 0.0):.0f} %",
        evidence["verdict"],
    ]


def settings_text(settings: dict[str, Any]) -> str:
    """`scratch_mib=8 fused=False`."""
    return " ".join(f"{name}={value}" for name, value in settings.items())


def duration(ms: float) -> str:
    """Three digits in the unit that suits: `12.3 us`, `4.56 ms`, `1.23 s`."""
    for factor, unit in ((1e3, "us"), (1.0, "ms")):
        if ms * factor < 1000:
            return f"{ms * factor:.3g} {unit}"
    return f"{ms / 1e3:.3g} s"

"""The tables of a run, from its record alone: a resumed or finished run prints the same."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from chipmunk_kernels.delta.policy import Policy
from suites.end_to_end.compare import predicted_speedup

LONG_SCHEDULE = 50
UNSTEADY = 1.5


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def _psnr(row: dict[str, Any]) -> str:
    return "identical" if row.get("identical") else _number(row["psnr_db"], ".1f")


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return statistics.fmean(values) if values else None


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All prompts together: speedup is total dense over total sparse time, fidelity also at its worst."""
    whole = [row for row in rows if row["speedup"] is not None]
    psnrs = [row["psnr_db"] for row in whole if row["psnr_db"] is not None]
    ssims = [row["ssim"] for row in whole if row["ssim"] is not None]
    dense, sparse = (sum(row[kind]["total_ms"] for row in whole) for kind in ("dense", "sparse"))
    return {
        "prompts": len(rows),
        "speedup": dense / sparse if whole else None,
        "speedup_lowest": min((row["speedup"] for row in whole), default=None),
        "psnr_db_mean": statistics.fmean(psnrs) if psnrs else None,
        "psnr_db_lowest": min(psnrs, default=None),
        "ssim_mean": statistics.fmean(ssims) if ssims else None,
        "ssim_lowest": min(ssims, default=None),
        "dense_step_ms": _mean(rows, "dense_step_ms"),
        "full_step_ms": _mean(rows, "full_step_ms"),
        "sparse_step_ms": _mean(rows, "sparse_step_ms"),
        "step_speedup": _mean(rows, "step_speedup"),
        "attention_density": _mean(rows, "attention_density"),
        "mlp_density": _mean(rows, "mlp_density"),
        "cache_bytes": max((row["cache_bytes"] for row in rows), default=0),
        "ceiling_policy": _mean([row["ceiling"] for row in rows if "ceiling" in row], "policy"),
        "ceiling_limit": _mean([row["ceiling"] for row in rows if "ceiling" in row], "limit"),
    }


def prompt_table(rows: Sequence[dict[str, Any]]) -> str:
    """Times, speedup and fidelity of every prompt; with several, all of them below."""
    body = [
        [
            row["prompt"],
            _number(row["dense"]["total_ms"] / 1e3) if row["speedup"] else "stopped early",
            _number(row["sparse"]["total_ms"] / 1e3),
            _number(row["speedup"]),
            _psnr(row),
            _number(row["ssim"], ".3f"),
        ]
        for row in rows
    ]
    total = summary(rows)
    if len(rows) > 1:
        body.append(
            [
                "all (speedup of the sums; lowest PSNR, SSIM)",
                "",
                "",
                _number(total["speedup"]),
                _number(total["psnr_db_lowest"], ".1f"),
                _number(total["ssim_lowest"], ".3f"),
            ]
        )
    headers = ["prompt", "dense s", "sparse s", "speedup", "PSNR dB", "SSIM"]
    return tabulate(
        body, headers, tablefmt="simple", disable_numparse=True, colalign=("left",) + ("right",) * 5
    )


def step_table(rows: Sequence[dict[str, Any]]) -> str:
    """Each step's median time over the prompts."""
    kinds = rows[0]["sparse"]["steps"]

    def median(side: str, step: int) -> float | None:
        times = [row[side]["step_ms"][step] for row in rows if step < len(row[side]["step_ms"])]
        return statistics.median(times) if times else None

    body = [
        [step, kind, _number(median("dense", step), ".1f"), _number(median("sparse", step), ".1f")]
        for step, kind in enumerate(kinds)
    ]
    headers = ["step", "kind", "dense ms", "chipmunk ms"]
    return tabulate(
        body, headers, tablefmt="simple", disable_numparse=True, colalign=("right", "left", "right", "right")
    )


def _percent(value: float | None) -> str:
    return "stayed dense" if value is None else f"{value:.1%} kept"


def _unsteady(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A warning where steps that do the same work take very different times."""
    groups = {
        "dense": [ms for row in rows for ms in row["dense"]["step_ms"]],
        "sparse": [
            ms
            for row in rows
            for ms, kind in zip(row["sparse"]["step_ms"], row["sparse"]["steps"], strict=True)
            if kind == "sparse"
        ],
    }
    warnings = []
    for name, times in groups.items():
        # A lone slow step is no sign; the first sparse step may still have full attention.
        low, high = min(times, default=0.0), sorted(times)[len(times) * 9 // 10] if times else 0.0
        if len(times) > 2 and high > UNSTEADY * low:
            warnings.append(
                f"{name} steps take {low:.1f} to {high:.1f} ms: the machine is busy, times are rough"
            )
    return warnings


def fact_table(record: dict[str, Any], rows: Sequence[dict[str, Any]], policy: Policy) -> str:
    """What the run was, what it kept, where its time goes and why anything stayed dense."""
    total = summary(rows)
    kinds = rows[0]["sparse"]["steps"]
    facts: list[tuple[str, str]] = [
        (
            "model",
            f"{record['settings']['model']}, {record['settings']['dtype']} on {record['settings']['device']}",
        ),
        ("dense baseline", record["dense_baseline"]),
        ("policy", policy.name),
        ("profile", record["profile"]),
        ("steps", f"{len(kinds)}: {kinds.count('full')} full, {kinds.count('sparse')} sparse"),
        (
            "step, median ms",
            f"dense {_number(total['dense_step_ms'], '.1f')}, full {_number(total['full_step_ms'], '.1f')}, "
            f"sparse {_number(total['sparse_step_ms'], '.1f')} ({_number(total['step_speedup'])}× dense)",
        ),
        ("attention", _percent(total["attention_density"])),
        ("MLP", _percent(total["mlp_density"])),
        ("caches", f"{total['cache_bytes'] / 2**20:.1f} MiB"),
    ]
    parts = next((row["parts"] for row in rows if "parts" in row), None)
    if parts:
        facts.append(
            (
                "dense step",
                f"attention {parts['attention_share']:.0%}, MLP {parts['mlp_share']:.0%} of its time",
            )
        )
        facts.append(
            (
                "ceiling",
                f"{_number(total['ceiling_policy'])}× with this policy and kernels as fast as their density, "
                f"{_number(total['ceiling_limit'])}× if attention and MLP were free",
            )
        )
    if len(rows[0]["dense"]["step_ms"]) < len(kinds):
        predicted = predicted_speedup(rows[0], policy, LONG_SCHEDULE)
        facts.append((f"{LONG_SCHEDULE} steps", f"{_number(predicted)}× predicted from these step times"))
    facts += [("unsteady", warning) for warning in _unsteady(rows)]
    peak = max((row["sparse"]["peak_bytes"] or 0 for row in rows), default=0)
    if peak:
        dense_peak = max(row["dense"]["peak_bytes"] or 0 for row in rows)
        facts.append(("peak memory", f"dense {dense_peak / 2**30:.1f} GiB, sparse {peak / 2**30:.1f} GiB"))
    reasons = {reason: count for row in rows for reason, count in row["dense_calls"].items()}
    facts += [("note", text) for text in dict.fromkeys(text for row in rows for text in row["notes"])]
    facts += [("stayed dense", f"{count} calls: {reason}") for reason, count in reasons.items()]
    return tabulate(facts, tablefmt="plain", disable_numparse=True)

"""What was reached: a table of the rows, one of the bars, and the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from suites.benchmarks.bars.tasks import DENSE, Row
from tuner.baselines import work_of
from tuner.bench import ROOFLINE_MARGIN
from tuner.hardware import Ceilings
from tuner.report import duration
from tuner.statistics import significant
from tuner.workload import MEASURES, Bar, LabelledProblem

HEADERS = (
    "problem",
    "backend",
    "median",
    "rate",
    "of floor",
    "dense",
    "speedup",
    "MHz: it, dense",
    "by itself",
    "of copy: same size, large",
    "extra MiB",
    "launch us",
    "error/budget",
)
UNTRIED = ("missing", "left out")
BAR_HEADERS = ("bar", "asked", "reached", "by", "on", "met")
LIMITED = {
    "extra_mib": ("triton", "triton_hopper", "cupy", "cupy_hopper"),
    "launch_us": ("cupy", "cupy_hopper"),
}
"""Which backends each limit binds: memory all but torch, which trades it for products; launch cost those that
launch through CuPy."""


@dataclass(frozen=True)
class Verdict:
    """A bar and what reached it.

    Attributes:
        label: of the problem that has the bar.
        asked: the bar in words.
        reached: the best measured value, None where there is none; of a limit the worst.
        by: whose kernel that was, or why there is none.
        met: whether the bar is.
        problem: label of the problem that it was measured on; empty where nothing was.
    """

    label: str
    asked: str
    reached: float | None
    by: str
    met: bool
    problem: str = ""


class Report:
    """Rows in the order in which they came, and what they mean at this machine's ceilings.

    Args:
        items: the problems that were to be measured.
        limits: what binds every kernel, as `Workload.limits`.
        ceilings: measured in the same run.
        kind: of the device, `cuda` or `cpu`.
    """

    def __init__(
        self, items: Sequence[LabelledProblem], limits: dict[str, float], ceilings: Ceilings, kind: str
    ) -> None:
        self.items, self.limits, self.ceilings = items, limits, ceilings
        self._margin = ROOFLINE_MARGIN[kind]
        self.rows: list[Row] = []

    def add(self, row: Row) -> str:
        """Keep a row; returns it as one line, empty where the same has been said of another problem."""
        told = any(other.reason == row.reason for other in self.rows if other.backend == row.backend)
        self.rows.append(row)
        if row.status in UNTRIED and told:
            return ""
        name = f"{row.item.label} | {row.backend}"
        if row.backend == DENSE and row.dense is not None:
            return f"{name}: {duration(row.dense.median)} {row.dense_name}"
        if row.time is None:
            return f"{name}: {row.status}: {row.reason}"
        titles = zip(HEADERS[2:], self._cells(row)[2:], strict=True)
        return f"{name}: " + ", ".join(f"{title} {cell}" for title, cell in titles if cell)

    def floor_share(self, row: Row) -> float | None:
        """Roofline time at the measured ceilings over the measured time."""
        if row.time is None:
            return None
        problem = row.item.problem
        work = work_of(problem, row.item.options)
        peak = self.ceilings.peak_tflops[problem.dtype]
        return work.ideal_ms(peak, self.ceilings.bandwidth_gbs) / row.time.median

    def impossible(self, row: Row) -> bool:
        """Faster than the roofline: the measurement is broken, whatever it shows."""
        share = self.floor_share(row)
        return share is not None and share > self._margin

    def verdicts(self) -> list[Verdict]:
        """Every bar of every problem, then the limits, each with every backend's worst kernel."""
        found = [self._verdict(item, bar) for item in self.items for bar in item.bars]
        return [*found, *self._limits()]

    def _verdict(self, item: LabelledProblem, bar: Bar) -> Verdict:
        asked = f"{bar.measure} {MEASURES[bar.measure]} {bar.value:g}"
        asked += f" by {bar.backend}" if bar.backend else ""
        asked += f" here or on {'; '.join(bar.also)}" if bar.also else ""
        labels = (item.label, *bar.also)
        rows = [row for row in self.rows if row.item.label in labels and bar.backend in (None, row.backend)]
        values = [(value, row) for row in rows if (value := self.value(bar, row)) is not None]
        if not values:
            reasons = [f"{row.backend}: {row.reason or row.status}" for row in rows if row.time is None]
            return Verdict(item.label, asked, None, "; ".join(reasons) or "not measured", False)
        best = max if MEASURES[bar.measure] == "at least" else min
        value, row = best(values, key=lambda pair: pair[0])
        return Verdict(item.label, asked, value, row.backend, bar.met_by(value), row.item.label)

    def value(self, bar: Bar, row: Row) -> float | None:
        """What a row reached of the bar's measure; None where that cannot be told."""
        if row.time is None or self.impossible(row):
            return None
        if bar.measure == "share_of_copy":
            return None if row.share_of_copy is None else row.share_of_copy.median
        if bar.dense is None:
            assert row.speedup is not None
            return row.speedup.median if bar.measure == "speedup" else 1 / row.speedup.median
        dense = [r.dense.median for r in self.rows if r.item.label == bar.dense and r.dense is not None]
        if not dense:
            return None
        ratio = dense[-1] / row.time.median
        return ratio if bar.measure == "speedup" else 1 / ratio

    def _limits(self) -> list[Verdict]:
        found = []
        for name, most in self.limits.items():
            for backend in LIMITED[name]:
                rows = [row for row in self.rows if row.backend == backend]
                values = [(value, row) for row in rows if (value := getattr(row, name)) is not None]
                if values:
                    value, row = max(values, key=lambda pair: pair[0])
                    asked, met = f"{name} at most {most:g}", value <= most
                    found.append(Verdict("every kernel", asked, value, backend, met, row.item.label))
        return found

    def _share_of_large_copy(self, row: Row) -> float | None:
        """Compulsory bytes a second over those of the copy that measured the ceiling, of far more bytes."""
        if row.copy is None:
            return None
        return self._bandwidth_gbs(row) / self.ceilings.bandwidth_gbs

    def _bandwidth_gbs(self, row: Row) -> float:
        assert row.time is not None
        return work_of(row.item.problem, row.item.options).bytes / row.time.median / 1e6

    def rate(self, row: Row) -> str:
        """TF/s of what multiplies matrices, GB/s of what moves bytes."""
        flops = work_of(row.item.problem, row.item.options).flops
        if row.time is None:
            return ""
        return (
            f"{flops / row.time.median / 1e9:.4g} TF/s" if flops else f"{self._bandwidth_gbs(row):.4g} GB/s"
        )

    def _cells(self, row: Row) -> list[str]:
        if row.time is None:
            return [row.item.label, row.backend, row.status, *[""] * (len(HEADERS) - 3)]
        share = self.floor_share(row) or 0.0
        speedup, check, same, large = (
            row.speedup,
            row.check,
            row.share_of_copy,
            self._share_of_large_copy(row),
        )
        assert speedup is not None and row.dense is not None and check is not None
        return [
            row.item.label,
            row.backend + ("" if row.tuned else " (defaults)"),
            duration(row.time.median),
            self.rate(row),
            "impossible" if self.impossible(row) else f"{100 * share:.0f} %",
            duration(row.dense.median),
            f"{speedup.median:.2f}x ({speedup.low:.2f}-{speedup.high:.2f})",
            _clocks(row),
            _alone(row),
            f"{100 * same.median:.0f} %, {100 * large:.0f} %" if same and large else "",
            _number(row.extra_mib),
            _number(row.launch_us),
            f"{check.error / check.budget:.2f}" if check.budget else f"{check.error:.0f}",
        ]

    def text(self) -> str:
        """Both tables, and below them why anything is missing."""
        tried = [row for row in self.rows if row.backend != DENSE and row.status not in UNTRIED]
        verdicts = self.verdicts()
        ceilings = self.ceilings
        peaks = ", ".join(f"{peak:.3g} TF/s in {name}" for name, peak in ceilings.peak_tflops.items())
        return "\n".join(
            [
                tabulate([self._cells(row) for row in tried], HEADERS, disable_numparse=True),
                "",
                tabulate([_bar_cells(verdict) for verdict in verdicts], BAR_HEADERS, disable_numparse=True),
                "",
                *self._reasons(),
                f"ceilings in this run: matrix products {peaks}; copy {ceilings.bandwidth_gbs:.0f} GB/s",
                *self._yardstick(),
                f"{sum(verdict.met for verdict in verdicts)} of {len(verdicts)} bars met",
            ]
        )

    def _yardstick(self) -> list[str]:
        """How fast the host was while launches were timed, by a launch that is none of ours."""
        values = [row.torch_launch_us for row in self.rows if row.torch_launch_us is not None]
        if not values:
            return []
        return [f"a launch of torch's own add: {min(values):.1f} to {max(values):.1f} us beside these rows"]

    def _reasons(self) -> list[str]:
        """Why rows have no timing, each reason once, and which baselines could not run."""
        labels: dict[str, list[str]] = {}
        for row in self.rows:
            named = {f"{row.backend}: {row.reason}": True} if row.reason else {}
            failed = {
                f"{name} left out of the baselines: {why}": True for name, why in row.dense_failed.items()
            }
            for text in {**named, **failed}:
                if row.item.label not in labels.setdefault(text, []):
                    labels[text].append(row.item.label)
        return [f"{text} ({_few(where)})" for text, where in labels.items()]

    def as_dict(self) -> dict[str, Any]:
        """Everything that is known, in plain values."""
        return {
            "ceilings": self.ceilings.as_dict(),
            "rows": [self._row(row) for row in self.rows],
            "bars": [asdict(verdict) for verdict in self.verdicts()],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        share = self.floor_share(row)
        problem = work_of(row.item.problem, row.item.options)
        plain = {name: getattr(row, name) for name in ("backend", "status", "reason", "settings", "tuned")}
        return {
            "label": row.item.label,
            "problem": {**row.item.problem.as_dict(), **dict(row.item.options)},
            **plain,
            "time": row.time and row.time.as_dict("ms"),
            "dense_baseline": row.dense and {"name": row.dense_name, **row.dense.as_dict("ms")},
            "dense_failed": row.dense_failed,
            "speedup": row.speedup and row.speedup.as_dict(),
            "tflops": significant(problem.flops / row.time.median / 1e9, 4) if row.time else None,
            "gbs": significant(self._bandwidth_gbs(row), 4) if row.time else None,
            "share_of_floor": share and significant(share, 3),
            "same_size_copy": row.copy and row.copy.as_dict("ms"),
            "share_of_same_size_copy": row.share_of_copy and row.share_of_copy.as_dict(),
            "share_of_large_copy": (large := self._share_of_large_copy(row)) and significant(large, 3),
            "correctness": row.check and asdict(row.check),
            "extra_mib": row.extra_mib,
            "launch_us": row.launch_us and significant(row.launch_us, 3),
            "torch_launch_us": row.torch_launch_us and significant(row.torch_launch_us, 3),
            "sm_clock_mhz": row.clock_mhz and significant(row.clock_mhz, 4),
            "dense_sm_clock_mhz": row.dense_clock_mhz and significant(row.dense_clock_mhz, 4),
            "alone": row.alone
            and {
                **row.alone.as_dict("ms"),
                "sm_clock_mhz": row.alone_clock_mhz and significant(row.alone_clock_mhz, 4),
                "speedup": (alone := speedup_alone(row)) and significant(alone, 4),
            },
            "speedup_in_cycles": (cycles := speedup_in_cycles(row)) and significant(cycles, 4),
        }


def speedup_alone(row: Row) -> float | None:
    """Dense between the kernel's calls over the kernel between calls of its own.

    Calls a tenth as long hardly cool the baseline; beside longer ones (an MLP's over a video, a third) it is
    faster than by itself, and this ratio less than it would be.
    """
    return row.dense.median / row.alone.median if row.dense and row.alone else None


def _alone(row: Row) -> str:
    speedup = speedup_alone(row)
    if row.alone is None or row.alone_clock_mhz is None or speedup is None:
        return ""
    return f"{duration(row.alone.median)} at {row.alone_clock_mhz:.0f} MHz, {speedup:.2f}x"


def _clocks(row: Row) -> str:
    if not row.clock_mhz or not row.dense_clock_mhz:
        return ""
    return f"{row.clock_mhz:.0f}, {row.dense_clock_mhz:.0f}"


def speedup_in_cycles(row: Row) -> float | None:
    """Dense over kernel at the same SM clock: what is the kernel's own, whatever power left of the clock."""
    if row.speedup is None or not row.clock_mhz or not row.dense_clock_mhz:
        return None
    return row.speedup.median * row.dense_clock_mhz / row.clock_mhz


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _bar_cells(verdict: Verdict) -> tuple[str, ...]:
    reached = "-" if verdict.reached is None else f"{verdict.reached:.3g}"
    by = verdict.by if len(verdict.by) <= 60 else verdict.by[:57] + "..."
    return verdict.label, verdict.asked, reached, by, verdict.problem, "yes" if verdict.met else "NO"


def _few(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{len(labels)} problems"

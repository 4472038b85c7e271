"""`python -m suites.benchmarks.bars`: a workload's problems on every backend, and which bars are met.

Rows appear on stderr as they come, tables on stdout at the end. Only the standard library is imported here at
the top, so that `--help` answers at once, and in the worker processes, which import this file, too.

Exit codes: 0, measured, whatever was reached; 1, nothing could be timed; 2, what was asked for cannot be
done; 130, interrupted, what was measured is written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from suites.benchmarks.bars.report import Report
    from suites.benchmarks.bars.run import Plan
    from tuner.workload import LabelledProblem, Workload

FOLDER = Path(__file__).resolve().parents[3] / "results" / "bars"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    it = argparse.ArgumentParser(
        prog="python -m suites.benchmarks.bars",
        description="Measure a workload's problems on every backend, and say which of its bars are met.",
        epilog="Without a GPU: --tiny tries the whole command on small shapes.",
    )
    it.add_argument("--workload", default="h200", metavar="NAME", help="or a YAML file of one (%(default)s)")
    it.add_argument(
        "--gpu", default="auto", metavar="NAME", help="auto, cpu, cuda:1, or h100 … (%(default)s)"
    )
    it.add_argument("--backend", action="append", metavar="NAME", help="only this one; repeatable")
    it.add_argument(
        "--only", action="append", default=[], metavar="TEXT",
        help="only problems with this in their label or operation; repeatable",
    )  # fmt: skip
    it.add_argument(
        "--seconds", type=_positive, default=300.0, metavar="N", help="for all of it (%(default)g)"
    )
    it.add_argument("--profile", metavar="YAML", help="tuned settings (those found for this machine)")
    it.add_argument("--seed", type=int, default=0, metavar="N", help="of the inputs (%(default)s)")
    it.add_argument(
        "--no-compile", action="store_true", help="leave FlexAttention and torch.compile out of the baselines"
    )
    it.add_argument("--tiny", action="store_true", help="small shapes, in the processor's own precision")
    it.add_argument("--output", metavar="FILE", help="JSON (results/bars/DEVICE.json; none with --tiny)")
    it.add_argument("--json", action="store_true", help="the same JSON on stdout, not tables")
    return it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parser().parse_args(argv)
    from chipmunk_kernels.profiles import ProfileError
    from tuner.hardware import HardwareError
    from tuner.workload import WorkloadError

    try:
        return _measure(args)
    except (HardwareError, ProfileError, WorkloadError, OSError) as error:
        print(f"bars: {error}", file=sys.stderr)
        return 2


def _measure(args: argparse.Namespace) -> int:
    import torch

    from chipmunk_kernels import profiles
    from suites.benchmarks.bars.report import Report
    from tuner.hardware import HardwareError, detect, measure_ceilings, resolve_device

    device = resolve_device(args.gpu)
    if device.type == "cpu" and not args.tiny:
        raise HardwareError("no GPU here, and these shapes take hours without one; --tiny tries the command")
    workload, items = _items(args, device)
    plan = _plan(args, device, workload, items)
    profile, hardware = profiles.find(device, args.profile), detect(device)
    output = _output(args, hardware.name)
    ceilings = measure_ceilings(device, {item.problem.dtype for item in workload.problems})
    if device.type == "cuda":
        torch.cuda.empty_cache()
    report = Report(items, dict(workload.limits), ceilings, device.type)
    facts = {
        "workload": workload.name,
        "device": hardware.as_dict(),
        "profile": {"rung": profile.rung, "path": profile.path and profile.path.name},
    }
    interrupted = _collect(plan, report, facts, output)
    print(json.dumps(_document(report, facts), indent=2) if args.json else report.text())
    if interrupted:
        return 130
    return 0 if any(row.time is not None for row in report.rows) else 1


def _collect(plan: Plan, report: Report, facts: dict[str, Any], output: Path | None) -> bool:
    """Measure; say and write each row at once. Returns whether somebody interrupted."""
    from suites.benchmarks.bars.run import run

    started = time.monotonic()
    try:
        for row in run(plan):
            line, elapsed_s = report.add(row), time.monotonic() - started
            if line:
                print(f"[{elapsed_s:6.1f} s] {line}", file=sys.stderr, flush=True)
            if output is not None:
                _write(output, _document(report, facts))
    except KeyboardInterrupt:
        print("bars: interrupted; what was measured is kept", file=sys.stderr)
        return True
    return False


def _document(report: Report, facts: dict[str, Any]) -> dict[str, Any]:
    from tuner.hardware import toolchain

    return {"schema": 1, **facts, "toolchain": toolchain(), **report.as_dict()}


def _write(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all: a kill must not leave half a file."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def _items(args: argparse.Namespace, device: torch.device) -> tuple[Workload, tuple[LabelledProblem, ...]]:
    """The workload, shrunk if asked for, and those of its problems that are to be measured."""
    from dataclasses import replace

    from tuner.hardware import native_dtype
    from tuner.workload import WorkloadError, load_workload

    workload = load_workload(args.workload, native_dtype(device))
    if args.tiny:
        problems = tuple(_tiny(item, native_dtype(device)) for item in workload.problems)
        workload = replace(workload, problems=problems)
    wanted = [text.lower() for text in args.only]
    items = tuple(
        item
        for item in workload.problems
        if not wanted or any(text in f"{item.label} {item.problem.operation}".lower() for text in wanted)
    )
    if not items:
        labels = "; ".join(item.label for item in workload.problems)
        raise WorkloadError(
            f"--only {' '.join(args.only)}: no problem of {workload.name} has it; it has {labels}"
        )
    return workload, items


def _tiny(item: LabelledProblem, dtype: str) -> LabelledProblem:
    """The same structure in milliseconds on a CPU; topk keeps its own dtype."""
    from dataclasses import replace

    from tuner.verify import shrunken

    small = shrunken(item.problem)
    own = small.dtype if small.dtype == "float32" else dtype
    width = small.width if small.operation in ("gather_columns", "scatter_columns") else min(small.width, 128)
    return replace(item, problem=replace(small, width=width, dtype=own))


def _plan(
    args: argparse.Namespace, device: torch.device, workload: Workload, items: tuple[LabelledProblem, ...]
) -> Plan:
    from chipmunk_kernels.registry import BACKENDS
    from suites.benchmarks.bars.run import Plan
    from tuner.workload import WorkloadError, unknown

    for backend in args.backend or ():
        if backend not in BACKENDS:
            raise WorkloadError(unknown("backend", backend, BACKENDS))
    return Plan(
        items,
        args.backend or BACKENDS,
        device,
        args.seconds,
        args.profile,
        args.seed,
        not args.no_compile,
        workload.problems,
    )


def _output(args: argparse.Namespace, device_name: str) -> Path | None:
    from chipmunk_kernels.profiles import slug

    if args.output is None and args.tiny:
        return None
    path = Path(args.output) if args.output else FOLDER / f"{slug(device_name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())

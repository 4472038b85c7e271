"""Every kernel once on small awkward shapes, for NVIDIA's compute-sanitizer to watch.

    python -m suites.benchmarks.sanitize --under compute-sanitizer [--backend NAME] [--tool NAME]

runs each tool over each backend in a process of its own and prints a table. What such a process runs is this
command without `--under`, alone or under any other tool:

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m suites.benchmarks.sanitize --backend cupy

Inputs are made, and results compared with the reference, on the CPU: the sanitizer, which slows every kernel
of the process 10 to 100 times, then sees few others than ours. Each tensor is an allocation of its own.

racecheck takes raw bulk copies (`cp.async.bulk` without a tensor map) for writes of the thread that issued
them and knows no barrier that they arrive at: hazards between such a copy and its readers are false alarms
(flash-attention 2.8.3, AI/RACECHECK_TMA_HAZARD.md). Nor does it follow a `__syncwarp` before the arrival of
one lane for its warp, nor a barrier of all warps after one of some. So for it column sums are built with
every lane arriving, and Triton's barriers between partitions twice (`racecheck.py`): `CHIPMUNK_RACECHECK=1`,
which `--under` sets.

Exit codes: 0, all right; 1, a wrong result or a finding; 2, what was asked for cannot be done.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from chipmunk_kernels import registry
from chipmunk_kernels.checks import switched_on
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from suites.benchmarks.racecheck import handing_out_twice
from tuner.problem import MUTATED, Options, make_case
from tuner.verify import Check, Sampled, worst

CUDA = ("cupy", "cupy_hopper")
TOOLS = {
    # Between allocations, where an access past the end of one might fall into the next.
    "memcheck": ("--padding", "256"),
    "racecheck": (),
    "synccheck": (),
}
COLUMNS = 347
"""No tile divides it."""
DEVICE = torch.device("cuda:0")
CALLS = 2
"""Of each kernel: the second finds what the first left behind, such as counters."""
FOUND = 9
"""Exit code of a sanitizer that has found something."""
SHOWN = 60
"""Lines of a sanitizer's findings that are shown."""
SUMMARY = re.compile(r"^=+ [A-Z ]*SUMMARY: (\d+)", re.MULTILINE)
CASE = re.compile(r"^(ok|WRONG|FAILED) ", re.MULTILINE)

Inputs = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Trial:
    """A problem, how it is called, and inputs that differ from those made for it."""

    problem: Problem
    options: Options = ()
    inputs: Inputs = ()

    @property
    def name(self) -> str:
        """The problem's key and what is special."""
        return " ".join(
            [self.problem.key, *(f"{name}={value}" for name, value in self.options + self.inputs)]
        )


def trials() -> list[Trial]:
    """Two planes of three groups, the first empty, the last full and ragged; every width and group size."""
    return [*_attention(), *_mlp_and_moves(), *_selection_and_means()]


def _problem(operation: str, group_size: int, width: int, dtype: str = "bfloat16", **more: Any) -> Problem:
    fields = {"batch": 2, "heads": 2, "columns": COLUMNS, "density": 0.2, **more}
    rows = fields.pop("rows", 2 * group_size + group_size // 3)
    return Problem(operation, rows=rows, width=width, dtype=dtype, group_size=group_size, **fields)


def _attention() -> Iterator[Trial]:
    alone: Inputs = (("base", None),)
    short: Inputs = (("key_length", COLUMNS - 100),)
    for size, width, dtype, inputs in (
        (64, 64, "float16", alone),
        (128, 64, "bfloat16", ()),
        (192, 64, "bfloat16", alone),
        (64, 128, "bfloat16", ()),
        (128, 128, "bfloat16", alone),
        (192, 128, "float16", ()),
    ):
        yield Trial(_problem("sparse_attention", size, width, dtype), inputs=inputs)
    for size, width, inputs in ((64, 64, ()), (192, 64, short), (128, 128, short), (192, 128, ())):
        yield Trial(_problem("colsum_attention", size, width, density=1.0), inputs=inputs)
    for width, inputs in ((64, short), (128, ())):
        yield Trial(_problem("dense_attention", 1, width, rows=299, density=1.0), inputs=inputs)


def _mlp_and_moves() -> Iterator[Trial]:
    for size, width, dtype in ((64, 128, "float16"), (128, 192, "bfloat16"), (192, 128, "bfloat16")):
        yield Trial(_problem("sparse_mlp", size, width, dtype, heads=1))
    for width in (64, 128):
        yield Trial(_problem("gather_columns", 128, width))
    for size, adds in ((64, False), (128, True), (192, False)):
        yield Trial(_problem("gather_columns", size, 128), (("per_group", 1),))
        yield Trial(_problem("scatter_columns", size, size), inputs=(("accumulate", adds),))


def _selection_and_means() -> Iterator[Trial]:
    for columns in (COLUMNS, 17_001):  # a row in registers, and one that is searched
        yield Trial(_problem("topk_columns", 64, 1, "float32", rows=192, columns=columns))
    for size in (64, 192):
        yield Trial(_problem("group_mean", size, 128, heads=1, density=1.0))


def beside(kernel: Kernel, device: torch.device) -> Kernel:
    """The same kernel for inputs on the CPU: copies go to the device, what it gives or writes comes back."""

    def run(*arguments: Any) -> Any:
        *inputs, settings = arguments
        moved = [_moved(x, device) for x in inputs]
        result = kernel.run(*moved, settings)
        if kernel.operation in MUTATED:
            for here, there in zip(inputs, moved, strict=True):
                if isinstance(here, Tensor):
                    here.copy_(there)
        if isinstance(result, Tensor):
            return result.cpu()
        return result and tuple(value.cpu() for value in result)

    return replace(kernel, run=run)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, ColumnSet):
        return value.to(device)
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def check(trial: Trial, kernel: Kernel, device: torch.device) -> Check:
    """Run the kernel with its default settings, compare with the reference. Passes on what it raises."""
    case = make_case(trial.problem, "cpu", 0, ragged=True, options=trial.options)
    case.inputs.update(trial.inputs)
    sampled, there = Sampled(case, 0), beside(kernel, device)
    return worst([sampled.check(there, kernel.settings()) for _ in range(CALLS)])


def lines(backend: str, device: torch.device, only: Sequence[str] = ()) -> Iterator[str]:
    """A line for every trial that the backend has a kernel for: `ok`, `WRONG`, `FAILED`, `skipped`; why."""
    for trial in trials():
        kernel = registry.kernels(backend).get(trial.problem.operation)
        if kernel is None or (only and not any(text in trial.name for text in only)):
            continue
        yield f"{_outcome(trial, kernel, device)} ({backend} {trial.name})"


def _outcome(trial: Trial, kernel: Kernel, device: torch.device) -> str:
    reason = kernel.unsupported(getattr(torch, trial.problem.dtype), trial.problem.width)
    if reason is not None:
        return f"skipped {reason}"
    try:
        found = check(trial, kernel, device)
    except Exception as error:  # one kernel must not hide the others
        return f"FAILED {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return (
        f"ok error {found.error:.1e}, budget {found.budget:.1e}" if found.ok else f"WRONG {found.explain()}"
    )


@dataclass(frozen=True)
class Watched:
    """What one tool made of one backend: right cases, all of them, findings (None: it came to no end)."""

    tool: str
    backend: str
    right: int
    cases: int
    findings: int | None
    outcome: str

    @property
    def clean(self) -> bool:
        return self.outcome == "clean"


def watch(
    sanitizer: str, tool: str, backend: str, only: Sequence[str], limit_s: float
) -> tuple[Watched, str]:
    """Run a backend's trials under a tool in a process of its own; what became of it, and all it said."""
    asked = [part for text in only for part in ("--only", text)]
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *TOOLS[tool]]
    command += [sys.executable, "-m", "suites.benchmarks.sanitize", "--backend", backend, *asked]
    output, code = _output(command, limit_s, {"CHIPMUNK_RACECHECK": str(int(tool == "racecheck"))})
    return judge(tool, backend, output, code), output


def _output(command: list[str], limit_s: float, environment: dict[str, str]) -> tuple[str, int | None]:
    """Both streams and the exit code, None where time was up, of a command with more in its environment."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    options["env"] = {**os.environ, **environment}
    child = subprocess.Popen(command, **options, text=True, errors="replace", start_new_session=True)
    try:
        output, _ = child.communicate(timeout=limit_s)
    except BaseException as stop:
        os.killpg(child.pid, signal.SIGKILL)  # the sanitizer and the process that it watches
        output, _ = child.communicate()
        if not isinstance(stop, subprocess.TimeoutExpired):
            raise
        return output, None
    return output, child.returncode


def judge(tool: str, backend: str, output: str, code: int | None) -> Watched:
    """Clean is what came to an end, compared right, and has a summary without findings."""
    statuses, sums = CASE.findall(output), [int(count) for count in SUMMARY.findall(output)]
    right = statuses.count("ok")
    if code is None:
        outcome = "time was up"
    elif not sums:
        outcome = f"no summary, exit code {code}"
    elif sum(sums):
        outcome = "findings"
    elif code or right < len(statuses) or not right:
        outcome = f"wrong results, exit code {code}" if statuses else f"nothing ran, exit code {code}"
    else:
        outcome = "clean"
    return Watched(tool, backend, right, len(statuses), sum(sums) if sums else None, outcome)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    it = argparse.ArgumentParser(
        prog="python -m suites.benchmarks.sanitize",
        description="Run every kernel on small awkward shapes, compared with the reference.",
    )
    it.add_argument(
        "--backend", action="append", choices=registry.BACKENDS, help=f"repeatable ({', '.join(CUDA)})"
    )
    it.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases with it; repeatable")
    it.add_argument("--under", metavar="PATH", help="compute-sanitizer: run its tools over each backend")
    it.add_argument("--tool", action="append", choices=TOOLS, help="repeatable (memcheck, racecheck)")
    it.add_argument(
        "--seconds", type=float, default=140.0, metavar="N", help="for each process (%(default)g)"
    )
    it.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what each tool says")
    return it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parser().parse_args(argv)
    if not args.under:
        # Else tensors share blocks of 2 MiB, and memcheck takes what lies between them for theirs.
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    missing = {name: registry.unavailable(name, DEVICE) for name in args.backend or CUDA}
    there = [name for name, reason in missing.items() if reason is None]
    for name, reason in missing.items():
        if reason is not None:
            print(f"sanitize: {name} left out: {reason}", file=sys.stderr)
    # One that was named must be there; of the usual two a GPU may have but the portable one.
    if not there or (args.backend and len(there) < len(missing)):
        return 2
    return _watch(args, there) if args.under else _run(there, args.only)


def _run(backends: Sequence[str], only: Sequence[str]) -> int:
    statuses = []
    for backend in backends:
        twice = backend == "triton_hopper" and switched_on("CHIPMUNK_RACECHECK")
        with handing_out_twice() if twice else nullcontext():
            for line in lines(backend, DEVICE, only):
                print(line, flush=True)
                statuses.append(line.split()[0])
    if not {"ok", "WRONG", "FAILED"} & set(statuses):
        print(f"sanitize: no case of {', '.join(backends)} has {' or '.join(only)}", file=sys.stderr)
        return 2
    return 1 if {"WRONG", "FAILED"} & set(statuses) else 0


def _watch(args: argparse.Namespace, backends: Sequence[str]) -> int:
    sanitizer = shutil.which(args.under)
    if sanitizer is None:
        print(
            f"sanitize: no {args.under} on PATH; it comes with the CUDA toolkit, often as "
            "/usr/local/cuda/bin/compute-sanitizer: pass that to --under",
            file=sys.stderr,
        )
        return 2
    found = []
    for tool in args.tool or ("memcheck", "racecheck"):
        for backend in backends:
            row, output = watch(sanitizer, tool, backend, args.only, args.seconds)
            found.append(row)
            _tell(row, output, args.logs)
    rows = [
        (row.tool, row.backend, f"{row.right} of {row.cases}", row.findings, row.outcome) for row in found
    ]
    print(tabulate(rows, ("tool", "backend", "right", "findings", "outcome"), missingval="-"))
    return 0 if all(row.clean for row in found) else 1


def _tell(row: Watched, output: str, logs: Path | None) -> None:
    """Keep the log, and show of a run that is not clean what its sanitizer and its cases said."""
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"{row.tool}-{row.backend}.txt").write_text(output, encoding="utf-8")
    if not row.clean:
        told = [line for line in output.splitlines() if not line.startswith(("ok ", "skipped "))]
        print(f"{row.tool} of {row.backend}: {row.outcome}", *told[:SHOWN], sep="\n", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

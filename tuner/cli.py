"""`chipmunk-tune`: find the fastest right kernels for this machine and write them into a profile.

Only the standard library, and what needs no more, is imported at the top, so that `--help` answers at once.

Exit codes: 0, a profile was written (or shown what would be done); 1, no problem got a right kernel; 2, what
was asked for cannot be done; 3, the device was lost too often; 130, interrupted, finished parts are written.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.interrupts import Interrupts

if TYPE_CHECKING:
    import torch

    from tuner.hardware import Hardware
    from tuner.session import Session
    from tuner.tuning import Result
    from tuner.workload import LabelledProblem, Workload

DEFAULT_BUDGET_S = {"cpu": 120.0, "cuda": 300.0}
DEFAULT_SUITE = {"cpu": "laptop", "cuda": "flux-dev"}
FINALISTS = {"cpu": 2, "cuda": 4}
RESTARTS = "CHIPMUNK_TUNE_RESTARTS"
MAX_RESTARTS = 5


def parser() -> argparse.ArgumentParser:
    """The command line."""
    it = argparse.ArgumentParser(
        prog="chipmunk-tune",
        description="Find the fastest right kernels for this machine, and write them into a profile.",
        epilog="Without arguments: tunes the first CUDA device for FLUX, or the CPU for a laptop's problems.",
    )
    what = it.add_argument_group("what to tune")
    what.add_argument(
        "--gpu", default="auto", metavar="NAME", help="auto, cpu, cuda:1, or h100, 4090 … (auto)"
    )
    what.add_argument("--suite", metavar="NAME", help="workload, or a YAML file of one (by device)")
    what.add_argument(
        "--op", action="append", default=[], metavar="NAME", help="only this operation; repeatable"
    )
    how = it.add_argument_group("how hard to try")
    how.add_argument(
        "--budget",
        type=_positive,
        metavar="SECONDS",
        help="for the whole run (120 CPU, 300 GPU); a first look at every problem is taken whatever it costs",
    )
    how.add_argument("--trials", type=_count, metavar="N", help="candidates per problem (as time allows)")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of inputs and search (0)")
    where = it.add_argument_group("what to write")
    where.add_argument(
        "--output", metavar="PATH", help="profile file, or a folder for it (where it is found again)"
    )
    where.add_argument("--storage", metavar="FILE", help="SQLite file of every trial (beside the profile)")
    again = where.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", dest="fresh", action="store_false", help="go on from recorded trials (default)"
    )
    again.add_argument(
        "--fresh", dest="fresh", action="store_true", help="forget what is recorded of these problems"
    )
    it.set_defaults(fresh=False)
    show = it.add_argument_group("what to show")
    show.add_argument("--json", action="store_true", help="results as JSON on stdout, not as a table")
    show.add_argument("--dry-run", action="store_true", help="only say what would be done")
    show.add_argument("--list", action="store_true", help="only list workloads, operations and backends")
    return it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(arguments)
    # The first message of a library should not look like a crash; warnings of ours are worth showing.
    logging.basicConfig(level=logging.WARNING, format="chipmunk-tune: %(message)s", stream=sys.stderr)
    from tuner.hardware import HardwareError
    from tuner.profile_writer import OutputError
    from tuner.store import StoreError
    from tuner.workload import WorkloadError

    try:
        if args.list:
            return _list(args)
        return _tune(args, arguments)
    except (HardwareError, OutputError, StoreError, WorkloadError) as error:
        print(f"chipmunk-tune: {error}", file=sys.stderr)
        return 2


def _tune(args: argparse.Namespace, arguments: list[str]) -> int:
    from tuner.hardware import detect, native_dtype, resolve_device
    from tuner.profile_writer import output_path
    from tuner.workload import load_workload

    device = resolve_device(args.gpu)
    workload = load_workload(args.suite or DEFAULT_SUITE[device.type], native_dtype(device))
    items = workload.select(args.op)
    hardware = detect(device)
    path = output_path(args.output, hardware.name)
    if args.dry_run:
        return _dry_run(args, device, hardware, items, path)
    return _Run(args, arguments, device, hardware, workload, items, path).go()


class _Run:
    """A tuning run: opens everything that can refuse before any time is spent, then tunes."""

    def __init__(
        self,
        args: argparse.Namespace,
        arguments: list[str],
        device: torch.device,
        hardware: Hardware,
        workload: Workload,
        items: tuple[LabelledProblem, ...],
        path: Path,
    ) -> None:
        from tuner.bench import open_bench
        from tuner.hardware import toolchain
        from tuner.profile_writer import ProfileWriter
        from tuner.sources import all_sources_hash
        from tuner.store import Store

        self._args, self._arguments, self._items, self._path = args, arguments, items, path
        versions = {**toolchain(), "kernel_sources": all_sources_hash()}
        self._writer = ProfileWriter(path, hardware.as_dict(), versions)
        _add_policies(self._writer, workload.policies)
        self._storage = Path(args.storage) if args.storage else path.with_suffix(".db")
        self._store = Store(self._storage)
        _say(f"{hardware.name}: {len(items)} problems of workload {workload.name}, profile {path}")
        self._bench = open_bench(device, (item.problem.dtype for item in items), self._store)
        self._results: dict[LabelledProblem, Result] = {}
        self._budget_s = args.budget or DEFAULT_BUDGET_S[device.type]
        self._started = time.monotonic()

    def go(self) -> int:
        """Tune every problem, write each result at once, show all of them."""
        from tuner.build import DeviceLost

        interrupted = False
        try:
            self._tune()
        except KeyboardInterrupt:
            interrupted = True
        except DeviceLost as error:
            return self._restart(error)
        finally:
            self._bench.builder.close()
            self._store.close()
        self._show()
        if interrupted:
            _say("interrupted; what was finished is written, the same command goes on from here")
            return 130
        self._say_what_is_left()
        return 0 if any(result.entry for result in self._results.values()) else 1

    def _tune(self) -> None:
        session = self._session()
        if self._args.fresh:
            for item in self._items:
                session.forget(item)
        with _Progress() as progress, Interrupts() as interrupts:

            def trial(candidate: Any, outcome: Any) -> None:
                progress.trial(candidate, outcome)
                interrupts.check()

            session.on_round = progress.round
            session.on_problem = progress.problem
            session.on_trial = trial
            for result in session.run(self._items):
                self._results[result.item] = result
                if result.entry is not None:
                    self._writer.put(result.entry)
                progress.result(result)
                interrupts.check()

    def _session(self) -> Session:
        from chipmunk_kernels.profiles import Profile, find
        from tuner.search import open_storage
        from tuner.session import Session
        from tuner.tuning import Settings

        finalists = FINALISTS[self._bench.device.type]
        settings = Settings(self._args.seed, self._args.trials, self._budget_s, finalists)
        known = Profile.empty() if self._args.fresh else find(self._bench.device)
        return Session(self._bench, self._store, open_storage(self._storage), settings, known)

    def _show(self) -> None:
        from tuner.report import as_json, table

        results = [self._results[item] for item in self._items if item in self._results]
        if self._args.json:
            document = {
                "device": self._bench.hardware.as_dict(),
                "profile": str(self._path),
                "storage": str(self._storage),
                "problems": as_json(results),
            }
            print(json.dumps(document, indent=2))
        else:
            print(table(results))
            print(f"\nprofile: {self._path}\ntrials:  {self._storage}")

    def _say_what_is_left(self) -> None:
        entries = [result.entry for result in self._results.values() if result.entry is not None]
        left = [each for each in entries if each.evidence["search"]["stopped_by"] == "first round"]
        if left:
            _say(
                f"the budget of {self._budget_s:g} s left no search to {len(left)} of {len(self._items)} "
                "problems: they have their first round's best; the same command goes on from here"
            )

    def _restart(self, error: Exception) -> int:
        """Go on in a new process: a CUDA context that an illegal access ended cannot be opened again here."""
        done = int(os.environ.get(RESTARTS, "0"))
        _say(f"the device was lost ({error}); the candidate is recorded and will be skipped")
        if done >= MAX_RESTARTS:
            _say(f"given up after {done} restarts; the same command goes on from here")
            return 3
        os.environ[RESTARTS] = str(done + 1)
        # `--fresh` must not forget what this run has found.
        again = [argument for argument in self._arguments if argument != "--fresh"]
        left = max(1.0, self._budget_s - (time.monotonic() - self._started))
        again += ["--budget", f"{left:.0f}"]
        os.execv(sys.executable, [sys.executable, "-m", "tuner.cli", *again])


class _Progress:
    """A bar on stderr: the round's problems done, and the present one's candidates."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._bar = tqdm(unit="problem", file=sys.stderr, dynamic_ncols=True)
        self._round, self._trials, self._best_ms = "", 0, float("inf")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def round(self, name: str, problems: int) -> None:
        self._round = name
        self._bar.set_postfix_str("", refresh=False)
        self._bar.set_description(name, refresh=False)
        self._bar.reset(total=problems)

    def problem(self, label: str) -> None:
        self._trials, self._best_ms = 0, float("inf")
        self._bar.set_description(f"{self._round}: {label}")

    def trial(self, candidate: Any, outcome: Any) -> None:
        self._trials += 1
        if outcome.status == "ok" and outcome.median_ms:
            self._best_ms = min(self._best_ms, outcome.median_ms)
        self._bar.set_postfix_str(f"{self._trials} candidates, best {self._best_ms:.4g} ms")

    def result(self, result: Result) -> None:
        self._bar.update()


def _dry_run(
    args: argparse.Namespace,
    device: torch.device,
    hardware: Hardware,
    items: tuple[LabelledProblem, ...],
    path: Path,
) -> int:
    """Say which problems would be tuned, with how many candidates, and where the profile would go."""
    from tabulate import tabulate

    from tuner.space import Space

    spaces = [Space(item.problem, device, hardware.shared_memory_bytes) for item in items]
    rows: list[dict[str, Any]] = [
        {
            "operation": item.problem.operation,
            "problem": item.label,
            "backends": [kernel.backend for kernel in space.kernels],
            "candidates": len(space.candidates),
            "declared": space.size,
        }
        for item, space in zip(items, spaces, strict=True)
    ]
    if args.json:
        print(json.dumps({"device": hardware.as_dict(), "profile": str(path), "problems": rows}, indent=2))
    else:
        flat = [{**row, "backends": ", ".join(row["backends"])} for row in rows]
        print(f"device:  {hardware.name}\nprofile: {path} (not written)\n")
        print(tabulate(flat, headers="keys"))
    return 0


def _list(args: argparse.Namespace) -> int:
    """What there is: workloads, operations, backends and why one is unavailable."""
    from chipmunk_kernels.problem import OPERATIONS
    from chipmunk_kernels.registry import BACKENDS
    from tuner.hardware import resolve_device
    from tuner.space import unavailable_reason
    from tuner.workload import load_workload, names

    device = resolve_device(args.gpu)
    workloads: dict[str, str] = {name: load_workload(name).description for name in names()}
    backends = {backend: unavailable_reason(backend, device) for backend in BACKENDS}
    if args.json:
        found: dict[str, Any] = {"workloads": workloads, "operations": list(OPERATIONS), "backends": backends}
        print(json.dumps({"device": str(device), **found}, indent=2))
        return 0
    print("workloads:")
    print("\n".join(f"  {name:16} {text}" for name, text in workloads.items()))
    print(f"\noperations:\n  {', '.join(OPERATIONS)}")
    print(f"\nbackends on {device}:")
    print("\n".join(f"  {name:16} {why or 'available'}" for name, why in backends.items()))
    return 0


def _add_policies(writer: Any, names: tuple[str, ...]) -> None:
    """The model's built-in policies, so that the profile is all that a runner or an export needs."""
    from chipmunk_kernels.delta.policies import load_policy

    for name in names:
        writer.add_policy(name, load_policy(name).as_dict())


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _say(message: str) -> None:
    print(f"chipmunk-tune: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

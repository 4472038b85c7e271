"""`pytest suites/benchmarks`: benchmarks on, saved per device, problems from a workload."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.utils import get_machine_id
from tabulate import tabulate

from chipmunk_kernels.profiles import slug
from suites.benchmarks.bars.run import hopeless
from suites.benchmarks.bench import Bench, Choice, Machine, backends, choose, make_timer
from tuner.cli import DEFAULT_SUITE
from tuner.hardware import (
    Ceilings,
    HardwareError,
    detect,
    measure_ceilings,
    native_dtype,
    resolve_device,
    toolchain,
)
from tuner.workload import LabelledProblem, Workload, WorkloadError, load_workload

COLUMNS = ["median", "iqr", "min", "rounds"]
FOUND = pytest.StashKey[list[dict[str, Any]]]()
PLUGIN_STORAGE = "file://./.benchmarks"
"""pytest-benchmark's own default: still there means that nobody chose another place."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this suite, beside pytest-benchmark's own."""
    group = parser.getgroup("chipmunk benchmarks")
    group.addoption("--workload", help="name or YAML path (default: laptop on a CPU, flux-dev on a GPU)")
    group.addoption("--gpu", default="auto", help="auto, cpu, cuda:1 or a short name such as h100")
    group.addoption(
        "--backend",
        action="append",
        default=[],
        help="torch, triton, triton_hopper, cupy, cupy_hopper (repeatable) or all; default: as dispatch",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before pytest-benchmark reads its options: on, saved automatically, in this device's folder.

    pyproject.toml switches benchmarks off for the tests; here only a typed `--benchmark-disable` counts.
    """
    options, workload = config.option, _workload(config).name
    if "--benchmark-disable" not in config.invocation_params.args:
        options.benchmark_enable = True
    if options.benchmark_storage == PLUGIN_STORAGE:
        folder = config.rootpath / "results" / "benchmarks" / slug(detect(_device(config)).name)
        options.benchmark_storage = f"file://{folder}"
    if not (options.benchmark_save or options.benchmark_autosave):
        options.benchmark_autosave = workload
    if options.benchmark_compare is True:
        options.benchmark_compare = _last_run(options.benchmark_storage, workload)
    options.benchmark_columns = options.benchmark_columns or COLUMNS


def _last_run(storage: str, workload: str) -> str:
    """The last saved run of this workload: with one of another nothing would be compared, and all pass.

    Where there is none, a name that matches no file: pytest-benchmark then says so.
    """
    name = f"[0-9]*_{workload}.json"
    runs = sorted((Path(storage.removeprefix("file://")) / get_machine_id()).glob(name))
    return str(runs[-1]) if runs else name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One `bench` per problem of the workload that the test file is about, one `choice` per backend."""
    if "bench" in metafunc.fixturenames:
        labels = list(_problems(metafunc.config, metafunc.module.OPERATIONS))
        metafunc.parametrize("bench", labels, indirect=True, scope="module")
    if "choice" in metafunc.fixturenames:
        try:
            found = backends(metafunc.config.getoption("--backend"), _device(metafunc.config))
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
        metafunc.parametrize("choice", found, indirect=True)


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Machine:
    """The device, its timer and its measured ceilings."""
    device = _device(request.config)
    hardware = detect(device)
    return Machine(
        device, hardware, _ceilings(device, _workload(request.config)), make_timer(device, hardware)
    )


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, machine: Machine) -> Bench:
    """One problem. Its inputs are dropped before the next problem's are made."""
    return Bench(_problems(request.config, request.module.OPERATIONS)[request.param], machine)


@pytest.fixture
def choice(request: pytest.FixtureRequest, bench: Bench, machine: Machine) -> Choice:
    """A contender. Skipped, saying why, where it cannot run the problem or would take for ever."""
    try:
        found = choose(bench.problem, machine.device, request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    reason = hopeless(bench.problem, found.kernel.backend, machine.device)
    if reason is not None:
        pytest.skip(reason)
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Keep what a benchmark found, for the summary."""
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if benchmark is not None and "speedup" in benchmark.extra_info:
        found = {"operation: problem": benchmark.group, **benchmark.extra_info}
        item.config.stash.setdefault(FOUND, []).append(found)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line an operation, below pytest-benchmark's tables: speedup, and share of the ideal time."""
    found = config.stash.get(FOUND, [])
    if found:
        shown = ("operation: problem", "backend", "median_ms", "baseline_ms", "speedup", "share_of_ideal")
        rows = [[row[name] for name in shown] for row in found]
        terminalreporter.section("speedup over the dense baseline")
        terminalreporter.write_line(tabulate(rows, shown, floatfmt=("", "", ".3f", ".3f", ".2f", ".1%")))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Say which device and toolchain the numbers belong to; the host's own name is nobody's business."""
    machine_info.pop("node", None)
    machine_info["device"] = detect(_device(config)).as_dict()
    machine_info["toolchain"] = toolchain()


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_compare_machine_info(
    benchmarksession: Any, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    """Warn of another device or toolchain, fact by fact.

    The plugin's own check, which runs next, dumps both machines whole when a clock rate differs, and crashes
    if the storage lies outside the working directory. It is shown what it wants to see.
    """
    saved = compared_benchmark["machine_info"]
    changed = [
        f"{part}.{key}: {saved.get(part, {}).get(key)} then, {value} now"
        for part in ("device", "toolchain")
        for key, value in machine_info[part].items()
        if saved.get(part, {}).get(key) != value
    ]
    if changed:
        benchmarksession.logger.warning(f"compared with another machine or toolchain: {'; '.join(changed)}")
    compared_benchmark["machine_info"] = machine_info


def _device(config: pytest.Config) -> torch.device:
    try:
        return resolve_device(config.getoption("--gpu"))
    except HardwareError as error:
        raise pytest.UsageError(str(error)) from error


def _workload(config: pytest.Config) -> Workload:
    device = _device(config)
    name = config.getoption("--workload") or DEFAULT_SUITE[device.type]
    try:
        return load_workload(name, native_dtype(device))
    except WorkloadError as error:
        raise pytest.UsageError(f"--workload: {error}") from error


def _problems(config: pytest.Config, operations: tuple[str, ...]) -> dict[str, LabelledProblem]:
    """Label → problem; the problem's key where two share a label."""
    found: dict[str, LabelledProblem] = {}
    for item in _workload(config).problems:
        if item.problem.operation in operations:
            found[item.problem.key if item.label in found else item.label] = item
    return found


@functools.cache
def _ceilings(device: torch.device, workload: Workload) -> Ceilings:
    return measure_ceilings(device, {item.problem.dtype for item in workload.problems})

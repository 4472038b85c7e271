"""The benchmark suite run as a person runs it, on a workload of milliseconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from chipmunk_kernels.problem import Problem
from chipmunk_kernels.profiles import device_identity, slug
from suites.benchmarks import bench as bench_module
from suites.benchmarks import conftest
from suites.benchmarks.bench import CLOCK, DISPATCH, Bench, Machine, SampleClock, backends, choose
from tuner.baselines import Baseline, work_of
from tuner.hardware import Ceilings, detect
from tuner.workload import LabelledProblem

ROOT = Path(__file__).resolve().parents[2]
PROBLEMS = [
    {"label": "half kept", "operation": "sparse_attention", "rows": 192, "columns": 192, "width": 64},
    {"label": "half kept", "operation": "sparse_mlp", "rows": 128, "columns": 256, "width": 64},
    {"label": "half kept", "operation": "gather_columns", "rows": 128, "columns": 128, "width": 64},
    {"label": "half kept", "operation": "topk_columns", "rows": 128, "columns": 128, "width": 64},
]


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workload") / "tiny.yaml"
    common = {"dtype": "float32", "density": 0.5, "group_size": 64}
    problems = [{**common, **item} for item in PROBLEMS]
    path.write_text(yaml.safe_dump({"name": "tiny", "problems": problems}))
    return path


def run(workload: Path | str, storage: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`pytest suites/benchmarks` from the repository root, with the numbers kept out of it."""
    command = [sys.executable, "-m", "pytest", "suites/benchmarks", "--gpu", "cpu"]
    command += ["--workload", str(workload), "--benchmark-storage", f"file://{storage}"]
    command += ["--benchmark-max-time", "0.02", "--benchmark-min-rounds", "3", "-p", "no:cacheprovider"]
    # A run that takes itself for a worker of pytest-xdist would measure nothing.
    environment = {name: value for name, value in os.environ.items() if "PYTEST_XDIST" not in name}
    return subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)


def runs(storage: Path) -> list[Path]:
    return sorted(storage.rglob("*.json"))


@pytest.fixture(scope="module")
def first_run(workload: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where a first run was saved, and what it printed."""
    storage = tmp_path_factory.mktemp("storage")
    done = run(workload, storage)
    assert done.returncode == 0, done.stdout + done.stderr
    return storage, done.stdout


def test_every_operation_is_saved_with_its_speedup(first_run: tuple[Path, str]) -> None:
    (path,) = runs(first_run[0])
    assert path.name == "0001_tiny.json"
    saved = json.loads(path.read_text())["benchmarks"]
    by_group: dict[str, list[dict[str, Any]]] = {}
    for row in saved:
        by_group.setdefault(row["group"], []).append(row)
    assert {group.split(":")[0] for group in by_group} == {item["operation"] for item in PROBLEMS}
    for rows in by_group.values():
        baseline, operation = rows
        assert baseline["name"].startswith("test_baseline[")
        info = operation["extra_info"]
        assert info["baseline"] == baseline["extra_info"]["baseline"]
        # The speedup is that of the two medians saved beside each other, nothing remembered or made up.
        ratio = baseline["stats"]["median"] / operation["stats"]["median"]
        assert info["speedup"] == pytest.approx(ratio)
        assert info["share_of_ideal"] == pytest.approx(info["ideal_ms"] / info["median_ms"])
        assert info["ideal_ms"] > 0
        assert info["backend"] == "torch" and "cold cache" in info["timing"]


def test_the_machine_is_told_but_not_its_name(first_run: tuple[Path, str]) -> None:
    (path,) = runs(first_run[0])
    machine = json.loads(path.read_text())["machine_info"]
    identity = device_identity("cpu")
    assert {key: machine["device"][key] for key in identity} == identity
    assert {"torch", "triton", "cuda", "python"} <= set(machine["toolchain"])
    assert "node" not in machine


def test_the_summary_shows_speedups(first_run: tuple[Path, str]) -> None:
    summary = first_run[1].split("speedup over the dense baseline")[1]
    for item in PROBLEMS:
        assert f"{item['operation']}: {item['label']}" in summary


def planted(first: Path, folder: Path, factor: float) -> Path:
    """A storage: first this workload's run, `factor` times as fast, then one of another workload."""
    (path,) = runs(first)
    document = json.loads(path.read_text())
    for row in document["benchmarks"]:
        for key in ("min", "max", "mean", "median", "q1", "q3", "iqr", "stddev", "ld15iqr", "hd15iqr"):
            row["stats"][key] /= factor
    target = folder / path.parent.name
    target.mkdir(parents=True)
    (target / path.name).write_text(json.dumps(document))
    document["benchmarks"] = []
    (target / "0002_other.json").write_text(json.dumps(document))
    return folder


COMPARE = ("--benchmark-compare", "--benchmark-compare-fail=median:50%")


@pytest.mark.slow
def test_a_regression_fails_the_comparison(
    first_run: tuple[Path, str], workload: Path, tmp_path: Path
) -> None:
    storage = planted(first_run[0], tmp_path / "faster", 1e3)
    done = run(workload, storage, "-k", "attention", *COMPARE)
    assert done.returncode != 0
    assert "Performance has regressed" in done.stderr + done.stdout
    assert "test_attention[half kept-dispatch]" in done.stderr + done.stdout
    assert len(runs(storage)) == 3  # the slow run is kept as well


@pytest.mark.slow
def test_no_regression_passes_the_comparison(
    first_run: tuple[Path, str], workload: Path, tmp_path: Path
) -> None:
    storage = planted(first_run[0], tmp_path / "slower", 1e-3)
    done = run(workload, storage, "-k", "attention", *COMPARE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(0001_tiny)" in done.stdout


def configured(workload: Path, *typed: str, **options: Any) -> SimpleNamespace:
    """The options as the suite leaves them for pytest-benchmark."""
    values = {
        "benchmark_disable": True,  # as pyproject.toml has it
        "benchmark_enable": False,
        "benchmark_storage": conftest.PLUGIN_STORAGE,
        "benchmark_save": None,
        "benchmark_autosave": None,
        "benchmark_compare": [],
        "benchmark_columns": None,
        **options,
    }
    config = SimpleNamespace(
        option=SimpleNamespace(**values),
        invocation_params=SimpleNamespace(args=typed),
        rootpath=ROOT,
        getoption={"--workload": str(workload), "--gpu": "cpu"}.get,
    )
    conftest.pytest_configure(config)  # type: ignore[arg-type]
    return config.option


def test_results_go_to_the_devices_folder(workload: Path) -> None:
    folder = ROOT / "results" / "benchmarks" / slug(device_identity("cpu")["name"])
    options = configured(workload)
    assert options.benchmark_storage == f"file://{folder}"
    assert options.benchmark_enable and options.benchmark_autosave == "tiny"
    assert not configured(workload, "--benchmark-disable").benchmark_enable


def test_a_comparison_takes_the_last_run_of_the_same_workload(
    first_run: tuple[Path, str], workload: Path, tmp_path: Path
) -> None:
    storage = planted(first_run[0], tmp_path, 1.0)
    chosen = configured(workload, benchmark_storage=f"file://{storage}", benchmark_compare=True)
    assert Path(chosen.benchmark_compare).name == "0001_tiny.json"
    # Where there is none, pytest-benchmark must find none either, and say so.
    nothing = configured(workload, benchmark_storage=f"file://{tmp_path}/empty", benchmark_compare=True)
    assert not list(Path(storage).rglob(nothing.benchmark_compare + "*.json"))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"--workload": "lapdog", "--gpu": "cpu"}, "unknown workload 'lapdog'"),
        ({"--workload": "tiny", "--gpu": "no-such-gpu"}, "unknown GPU 'no-such-gpu'"),
    ],
)
def test_an_unknown_workload_or_gpu_is_refused(chosen: dict[str, str], message: str) -> None:
    config = SimpleNamespace(option=SimpleNamespace(), getoption=chosen.get)
    with pytest.raises(pytest.UsageError, match=message):
        conftest._device(config)  # type: ignore[arg-type]
        conftest._workload(config)  # type: ignore[arg-type]


def test_contenders_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert backends([], device) == [DISPATCH]
    assert backends(["triton", "cupy_hopper", "triton"], device) == ["triton", "cupy_hopper"]
    assert backends(["all"], device) == ["torch"]
    monkeypatch.setattr(bench_module, "unavailable_reason", lambda name, device: None)
    assert backends(["all"], device) == ["torch", "triton", "triton_hopper", "cupy", "cupy_hopper"]
    with pytest.raises(ValueError, match="got 'cuda'"):
        backends(["cuda"], device)


@pytest.mark.slow
def test_every_backend_asked_for_is_a_benchmark_or_says_why_not(workload: Path, tmp_path: Path) -> None:
    done = run(workload, tmp_path, "--backend", "torch", "--backend", "cupy_hopper", "-k", "gather", "-rs")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = runs(tmp_path)
    names = [row["name"] for row in json.loads(path.read_text())["benchmarks"]]
    assert names == ["test_baseline[half kept]", "test_gather[half kept-torch]"]
    assert "cupy needs an NVIDIA GPU" in done.stdout


def test_what_a_person_chose_stays(workload: Path, tmp_path: Path) -> None:
    chosen = {
        "benchmark_storage": f"file://{tmp_path}",
        "benchmark_save": "mine",
        "benchmark_compare": "0003",
    }
    options = configured(workload, **chosen)
    assert {name: getattr(options, name) for name in chosen} == chosen
    assert options.benchmark_autosave is None


class Recorder:
    """What pytest-benchmark's fixture does with a clock, as far as the suite uses it."""

    enabled, _min_rounds, _max_time = True, 3, 0.01

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group = ""

    def pedantic(self, target: Any, args: Any, rounds: int, iterations: int) -> None:
        durations = []
        for _ in range(rounds):
            before = CLOCK.seconds()
            target(*args)
            durations.append(CLOCK.seconds() - before)
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=median(durations)))


class Steady:
    """Every call of the baseline takes 6 ms, every call of a kernel 2 ms."""

    name = "steady"

    def sample(self, work: Any) -> float:
        work.call()
        return 6.0 if isinstance(work, Baseline) else 2.0


@pytest.mark.parametrize("baseline_too", [True, False])
def test_speedup_with_and_without_the_baseline_selected(baseline_too: bool) -> None:
    problem = Problem("sparse_mlp", rows=64, columns=128, width=32, dtype="float32", density=0.5)
    device = torch.device("cpu")
    machine = Machine(device, detect(device), Ceilings(10.0, {"float32": 0.1}), Steady())
    bench, choice = Bench(LabelledProblem("small", problem), machine), choose(problem, device, "torch")
    if baseline_too:
        bench.time_baseline(Recorder())
    recorder = Recorder()
    bench.time_operation(recorder, choice)
    assert recorder.group == "sparse_mlp: small"
    assert recorder.extra_info["speedup"] == pytest.approx(3.0)
    assert recorder.extra_info["median_ms"] == pytest.approx(2.0)
    assert recorder.extra_info["problem"] == problem.key
    ideal_ms = work_of(problem).ideal_ms(0.1, 10.0)
    assert recorder.extra_info["share_of_ideal"] == pytest.approx(ideal_ms / 2.0)


def test_the_clock_moves_by_what_the_timer_says() -> None:
    class Timer:
        name = "two milliseconds, whatever runs"

        def sample(self, work: Any) -> float:
            work()
            return 2.0

    clock, called = SampleClock(), []
    clock.sample(Timer(), lambda: called.append(1))  # type: ignore[arg-type]
    clock.sample(Timer(), lambda: called.append(1))  # type: ignore[arg-type]
    assert clock.seconds() == pytest.approx(4e-3) and len(called) == 2

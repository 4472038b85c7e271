"""`python -m suites.benchmarks.bars`: as a person runs it, and what it makes of what can happen."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from chipmunk_kernels import registry
from chipmunk_kernels.problem import Problem
from suites.benchmarks.bars import run as run_module
from suites.benchmarks.bars import tasks
from suites.benchmarks.bars.__main__ import main
from suites.benchmarks.bars.costs import (
    LEAST_BATCHES,
    WARM_UP,
    extra_mib,
    fastest_us,
    launch_us,
    quickest_core,
    smallest,
)
from suites.benchmarks.bars.run import Plan, hopeless, run
from suites.benchmarks.bars.tasks import DENSE, Row, Task
from tests.benchmarks.cases import RIGHT, attention, timed
from tuner.baselines import Baseline, work_of
from tuner.problem import make_case
from tuner.store import Outcome
from tuner.verify import Check
from tuner.workload import Bar, LabelledProblem, load_workload

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


class FakeBuilder:
    """Answers tasks from a table; `ran` lists what it was asked for."""

    def __init__(self, answers: dict[tuple[str, str], Any], default: Any, ran: list[tuple[str, str]]) -> None:
        self._answers, self._default, self._ran = answers, default, ran

    def run(self, tasks: Sequence[Task], limit_s: float) -> Iterator[tuple[int, Any]]:
        for index, task in enumerate(tasks):
            key = (task.item.label, task.backend)
            self._ran.append(key)
            yield index, self._answers.get(key) or self._default(task)

    def close(self) -> None:
        """Nothing to end."""


class World:
    """Both phases faked: what preparing and measuring answer, and what they were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checks: dict[tuple[str, str], Any] = {}
        self.rows: dict[tuple[str, str], Any] = {}
        self.prepared: list[tuple[str, str]] = []
        self.measured: list[tuple[str, str]] = []
        monkeypatch.setattr(run_module, "_builder", self._builder)
        monkeypatch.setattr(run_module, "why_not", lambda problem, backend, device: None)
        kernel = registry.kernel("sparse_attention", "torch")
        monkeypatch.setattr(run_module, "chosen", lambda task: (kernel, kernel.settings()))

    def _builder(self, function: Any, device: torch.device, width: int) -> FakeBuilder:
        if function is tasks.prepare:
            return FakeBuilder(self.checks, lambda task: RIGHT, self.prepared)
        return FakeBuilder(self.rows, lambda task: timed(task.item, task.backend, 1.0), self.measured)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_what_fails_in_preparation_is_a_row_and_is_not_measured(world: World) -> None:
    item = attention("a")
    world.checks = {
        ("a", "cupy_hopper"): Outcome("timeout", "took longer"),
        ("a", "triton"): Check(2.0, 1.0, "small case, out"),
    }
    world.rows = {("a", "cupy"): Outcome("crashed", "SIGSEGV")}
    rows = {row.backend: row for row in run(Plan([item], registry.BACKENDS, CPU, 100.0))}
    assert {backend: row.status for backend, row in rows.items()} == {
        "cupy_hopper": "timeout",
        "triton_hopper": "ok",
        "triton": "wrong",
        "cupy": "crashed",
        "torch": "ok",
    }
    assert "small case, out" in rows["triton"].reason and rows["cupy"].reason == "SIGSEGV"
    assert world.measured == [("a", "triton_hopper"), ("a", "cupy"), ("a", "torch")]


def test_a_kernel_is_prepared_once_for_problems_that_compile_alike(world: World) -> None:
    items = [attention("a"), attention("b", rows=2000, columns=2000), attention("c", width=64)]
    list(run(Plan(items, ["triton"], CPU, 100.0)))
    assert world.prepared == [("a", "triton"), ("c", "triton")]
    assert [label for label, _ in world.measured] == ["a", "b", "c"]


def test_on_a_gpu_compiled_baselines_are_prepared_too(world: World) -> None:
    items = [attention("a"), attention("b", density=0.2), attention("c", rows=2000)]
    list(run(Plan(items, ["triton"], torch.device("cuda:0"), 100.0)))
    assert [key for key in world.prepared if key[1] == DENSE] == [("a", DENSE), ("c", DENSE)]
    world.prepared.clear()
    list(run(Plan(items, ["triton"], torch.device("cuda:0"), 100.0, compiled=False)))
    assert all(backend == "triton" for _, backend in world.prepared)


@pytest.mark.parametrize(
    ("seconds", "reasons"),
    [(6.5, ["", "", "--seconds"]), (3.5, ["", "within the seconds", "within the seconds"])],
)
def test_when_the_seconds_are_up_the_rest_is_not_reached(
    world: World, seconds: float, reasons: list[str]
) -> None:
    """A clock that a second passes on whenever somebody looks: once at the start, once for the limit, once
    after each of three preparations, once before each measurement."""
    now = iter(float(second) for second in range(100))
    items = [attention(label, width=width) for label, width in (("a", 64), ("b", 128), ("c", 32))]
    rows = list(run(Plan(items, ["triton"], CPU, seconds), clock=lambda: next(now)))
    assert [row.item.label for row in rows] == ["a", "b", "c"]
    for row, reason in zip(rows, reasons, strict=True):
        assert row.status == ("not reached" if reason else "ok") and reason in row.reason
    assert len(world.measured) == reasons.count("")


@pytest.mark.parametrize("selected", [["layer", "selection"], ["selection"]])
def test_a_baseline_that_another_bar_counts_on_is_measured_once(world: World, selected: list[str]) -> None:
    known = [attention("layer"), attention("selection", Bar("time_of_dense", 0.03, dense="layer"))]
    items = [item for item in known if item.label in selected]
    list(run(Plan(items, ["triton"], CPU, 100.0, known=known)))
    assert world.measured.count(("layer", DENSE)) == 1


def test_what_is_hopeless_is_left_out() -> None:
    cuda = torch.device("cuda:0")
    sizes = {item.label: item.problem for item in load_workload("h200").problems}
    video, flux = sizes["Hunyuan 118656, 93 % sparse"], sizes["FLUX 4352, 93 % sparse"]
    assert hopeless(video, "torch", cuda) and not hopeless(flux, "torch", cuda)
    assert not hopeless(video, "triton", cuda) and not hopeless(video, "torch", CPU)
    assert hopeless(sizes["Hunyuan selection, 5 % + 1 % random + text"], "torch", cuda)


def test_a_wrong_kernel_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    item = LabelledProblem("means", Problem("group_mean", 300, 8, 8, dtype="float32", group_size=64))
    right = registry.kernel("group_mean", "torch")

    def spoiled(x: torch.Tensor, group_size: int, settings: Any) -> torch.Tensor:
        means = right.run(x, group_size, settings)
        means[:, -1] *= 1.01
        return means

    wrong = dataclasses.replace(right, run=spoiled)
    monkeypatch.setattr(tasks, "chosen", lambda task: (wrong, wrong.settings()))
    task = Task(item, "torch", "cpu", max_seconds=0.05)
    assert not tasks.prepare(task).ok
    row = tasks.measure(task)
    assert row.status == "wrong" and row.time is None and "full size" in row.reason
    monkeypatch.setattr(tasks, "chosen", lambda task: (right, right.settings()))
    row = tasks.measure(task)
    assert row.status == "ok" and row.time is not None and row.speedup is not None and row.dense is not None
    assert row.speedup.median == pytest.approx(row.dense.median / row.time.median, rel=0.5)


def test_a_kernel_that_fails_at_the_models_size_fails_in_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a crash costs a worker; it must not wait for the measurement."""
    item = LabelledProblem("means", Problem("group_mean", 4096, 8, 8, dtype="float32", group_size=64))
    right = registry.kernel("group_mean", "torch")

    def limited(x: torch.Tensor, group_size: int, settings: Any) -> torch.Tensor:
        if x.shape[1] >= 4096:
            raise RuntimeError("too many rows")
        return right.run(x, group_size, settings)

    kernel = dataclasses.replace(right, run=limited)
    monkeypatch.setattr(tasks, "chosen", lambda task: (kernel, kernel.settings()))
    with pytest.raises(RuntimeError, match="too many rows"):
        tasks.prepare(Task(item, "torch", "cpu"))


class ScriptedTimer:
    """The n-th sample of a baseline takes what its name lists; `taken` counts them."""

    name = "scripted"

    def __init__(self) -> None:
        self.taken: dict[str, int] = {}

    def sample(self, work: Any) -> float:
        number = self.taken[work.name] = self.taken.get(work.name, 0) + 1
        times = [float(text) for text in work.name.split()]
        return times[min(number, len(times)) - 1]


def test_the_fastest_baseline_is_found_without_waiting_for_the_slow_ones() -> None:
    timer = ScriptedTimer()
    slow, unlucky, lucky = (Baseline(name, lambda: None) for name in ("900", "120 90", "100"))
    assert tasks._fastest([slow, unlucky, lucky], timer) is unlucky
    assert timer.taken["900"] == 1 and timer.taken["100"] > 2


def test_problems_of_one_dense_computation_share_its_baseline() -> None:
    first, denser = attention("a"), attention("b", density=0.5, group_size=192)
    mass = Problem("colsum_attention", 1000, 1000, 100)
    shapes = {tasks.dense_shape(problem) for problem in (first.problem, denser.problem, mass)}
    assert len(shapes) == 1
    gather = Problem("gather_columns", 1000, 1000, 100, density=0.1)
    assert tasks.dense_shape(gather) != tasks.dense_shape(dataclasses.replace(gather, density=0.2))


def test_costs_are_counted_where_they_can_be() -> None:
    case = make_case(attention("a", width=64).problem, CPU, 0)
    kernel = registry.kernel("sparse_attention", "torch")
    assert extra_mib(case, kernel, kernel.settings()) is None
    assert launch_us(case, kernel, kernel.settings()) is None
    for item in load_workload("h200").problems:
        small = smallest(item.problem)
        assert (small.heads, small.groups) == (1, 1) and small.columns <= 256
        assert (small.width, small.group_size) == (item.problem.width, item.problem.group_size)


def test_a_launch_costs_what_it_does_on_an_undisturbed_host() -> None:
    """One batch in ten is undisturbed, the others take twice as long; both calls feel that alike."""
    now = [0.0]
    pauses: list[float] = []
    drained: list[float] = []
    collecting: list[bool] = []

    def lasting(us: float) -> Callable[[], None]:
        def call() -> None:
            collecting.append(gc.isenabled())
            now[0] += us * 1e-6 * (1.0 if len(pauses) % 10 == 0 else 2.0)

        return call

    ours, torchs = fastest_us(
        [lasting(12.0), lasting(4.0)], lambda: drained.append(now[0]), pauses.append, lambda: now[0]
    )
    assert (ours, torchs) == (pytest.approx(12.0), pytest.approx(4.0))
    assert len(pauses) >= 20 and len(drained) == 2 * len(pauses)
    each = len(collecting) // len(drained)
    assert each < 100 and gc.isenabled()
    batches = [collecting[start : start + each] for start in range(0, len(collecting), each)]
    assert all(batch[0] and not any(batch[WARM_UP:]) for batch in batches), "garbage waits for a batch's end"


def test_a_launch_is_timed_on_the_quickest_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Core 5 is quickest. All cores are allowed again afterwards, also where what was timed fails."""
    now, cores = [0.0], [{3, 5, 9}]

    def call() -> None:
        (core,) = cores[-1]
        now[0] += {3: 8e-6, 5: 5e-6, 9: 6e-6}[core]

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores[0], raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, chosen: cores.append(chosen), raising=False)
    with quickest_core(call, lambda: None, lambda: now[0]):
        assert cores[-1] == {5}
    assert cores[-1] == {3, 5, 9}
    with pytest.raises(RuntimeError, match="no launch"), quickest_core(call, lambda: None, lambda: now[0]):
        raise RuntimeError("no launch")
    assert cores[-1] == {3, 5, 9}

    def forbid(pid: int, chosen: set[int]) -> None:
        raise PermissionError(1, "Operation not permitted")

    timed: list[str] = []
    monkeypatch.setattr(os, "sched_setaffinity", forbid)
    with quickest_core(call, lambda: None):
        timed.append("on any core")
    monkeypatch.delattr(os, "sched_setaffinity")
    with quickest_core(call, lambda: None):
        timed.append("on any core")
    assert len(timed) == 2


def test_a_slow_call_is_timed_in_fewer_batches() -> None:
    now, pauses = [0.0], list[float]()

    def call() -> None:
        now[0] += 0.002

    (us,) = fastest_us([call], lambda: None, pauses.append, lambda: now[0])
    assert us == pytest.approx(2000.0)
    assert len(pauses) == LEAST_BATCHES


def test_a_call_that_fails_leaves_garbage_collection_as_it_was() -> None:
    calls: list[bool] = []

    def fail() -> None:
        calls.append(gc.isenabled())
        if not calls[-1]:
            raise RuntimeError("no launch")

    with pytest.raises(RuntimeError, match="no launch"):
        fastest_us([fail], lambda: None, lambda seconds: None)
    assert gc.isenabled()


@pytest.mark.parametrize("operation", ["gather_columns", "scatter_columns"])
def test_a_copy_of_its_size_is_timed_beside_what_moves_columns(operation: str) -> None:
    shape = {"rows": 300, "columns": 400, "width": 128, "dtype": "float32", "density": 0.2}
    problem = Problem(operation, **shape)  # type: ignore[arg-type]
    copy = tasks.plain_copy(make_case(problem, CPU, 0))
    assert copy is not None
    assert 2 * copy.call().nbytes == pytest.approx(work_of(problem).bytes, abs=8)
    row = tasks.measure(Task(LabelledProblem("moved", problem), "torch", "cpu", max_seconds=0.05))
    assert row.copy is not None and row.time is not None and row.share_of_copy is not None
    assert row.share_of_copy.median == pytest.approx(row.copy.median / row.time.median, rel=0.7)


def test_no_copy_is_timed_beside_what_computes() -> None:
    assert tasks.plain_copy(make_case(attention("a", width=64).problem, CPU, 0)) is None


@pytest.mark.gpu
def test_memory_and_launches_on_a_gpu() -> None:
    problem = Problem("gather_columns", 4352, 4352, 128, heads=4, density=0.2)
    case = make_case(problem, "cuda", 0)
    kernel = registry.kernel("gather_columns", "triton")
    memory, launch = extra_mib(case, kernel, kernel.settings()), launch_us(case, kernel, kernel.settings())
    assert memory is not None and 0 <= memory < 1
    assert launch is not None and 1 < launch.torch_us < launch.us < 1000
    peer = registry.kernel("gather_columns", "torch")
    more = extra_mib(case, peer, peer.settings())
    assert more is not None and more > memory


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    full = [sys.executable, "-m", "suites.benchmarks.bars", "--gpu", "cpu", *arguments]
    return subprocess.run(full, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_whole_command_on_small_shapes(tmp_path: Path) -> None:
    output, profile = tmp_path / "new" / "bars.json", tmp_path / "mine.yaml"
    entry = {
        "operation": "gather_columns",
        "problem": {"rows": 300, "columns": 600, "width": 128, "dtype": "float32"},
        "backend": "torch",
        "settings": {},
    }
    kernels = [entry, {**entry, "problem": {**entry["problem"], "dtype": "bfloat16"}}]
    profile.write_text(yaml.safe_dump({"schema": 1, "device": {"kind": "cpu"}, "kernels": kernels}))
    done = command(
        "--tiny", "--only", "selection", "--only", "FLUX keys", "--json", "--seconds", "60",
        "--output", str(output), "--profile", str(profile),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads(output.read_text())
    rows = {(row["label"], row["backend"]): row for row in document["rows"]}
    keys = rows["FLUX keys, 16.5 % kept", "torch"]
    assert keys["status"] == "ok" and keys["correctness"]["error"] == 0.0
    assert (
        keys["gbs"] > 0
        and 0 < keys["share_of_floor"] < 2
        and keys["dense_baseline"]["name"] == "torch.gather"
    )
    assert rows["FLUX keys, 16.5 % kept", "cupy_hopper"]["status"] == "missing"
    assert rows["Hunyuan 119056, 93 % sparse", "dense"]["dense_baseline"]["median_ms"] > 0
    assert document["profile"] == {"rung": "explicit path", "path": "mine.yaml"}
    bars = {bar["label"]: bar for bar in document["bars"]}
    selection = bars["Hunyuan selection, 5 % + 1 % random + text"]
    median_ms = rows[selection["label"], "torch"]["time"]["median_ms"]
    layer_ms = rows["Hunyuan 119056, 93 % sparse", "dense"]["dense_baseline"]["median_ms"]
    assert selection["reached"] == pytest.approx(median_ms / layer_ms, rel=1e-3)
    # Every row was said as it came, and nothing else is on stdout.
    assert "FLUX keys, 16.5 % kept | torch: median" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--tiny"),
        (["--tiny", "--only", "nothing"], "no problem of h200 has it"),
        (["--tiny", "--backend", "tritn"], "did you mean 'triton'"),
        (["--tiny", "--workload", "h20"], "did you mean 'h200'"),
        (["--tiny", "--profile", "nowhere.yaml"], "no such profile"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--gpu", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_interrupt_keeps_what_was_measured(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(task: Task) -> Row:
        if len(world.measured) > 2:
            raise KeyboardInterrupt
        return timed(task.item, task.backend, 1.0)

    monkeypatch.setattr(
        world, "_builder", lambda function, device, width: FakeBuilder(
            {}, interrupted if function is tasks.measure else lambda task: RIGHT, world.measured
            if function is tasks.measure else world.prepared
        )
    )  # fmt: skip
    monkeypatch.setattr(run_module, "_builder", world._builder)
    output = tmp_path / "bars.json"
    code = main(["--gpu", "cpu", "--tiny", "--backend", "torch", "--output", str(output)])
    assert code == 130
    assert len(json.loads(output.read_text())["rows"]) == 2
    assert "interrupted" in capsys.readouterr().err


HELP = """
import sys, runpy
sys.argv = ["bars", "--help"]
try:
    runpy.run_module("suites.benchmarks.bars", run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0
assert "torch" not in sys.modules, "--help imported torch"
"""


def test_help_needs_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--tiny" in done.stdout

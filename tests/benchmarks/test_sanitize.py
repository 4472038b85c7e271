"""`python -m suites.benchmarks.sanitize` without a GPU: its cases on the torch backend, and its driver with a
sanitizer that only pretends."""

from __future__ import annotations

import dataclasses
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from chipmunk_kernels import registry
from suites.benchmarks import sanitize
from suites.benchmarks.sanitize import Trial, check, judge, lines, main, trials

CPU = torch.device("cpu")
CLEAN = "ok error 0 (cupy case)\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize("trial", trials(), ids=lambda trial: trial.name)
def test_every_case_is_one_that_the_reference_takes(trial: Trial) -> None:
    kernel = registry.kernel(trial.problem.operation, "torch")
    found = check(trial, kernel, CPU)
    assert found.ok, found.explain()


def test_every_kernel_of_cuda_has_cases_with_each_width_and_group_size() -> None:
    def seen(operation: str, field: str) -> set[int]:
        return {getattr(t.problem, field) for t in trials() if t.problem.operation == operation}

    covered = {trial.problem.operation for trial in trials()}
    for backend in sanitize.CUDA:
        assert set(registry.kernels(backend)) - {"coverage_columns", "columns_from_mask"} <= covered
    for operation in ("sparse_attention", "colsum_attention", "sparse_mlp", "scatter_columns"):
        assert seen(operation, "group_size") == {64, 128, 192}
    for operation in ("sparse_attention", "colsum_attention", "dense_attention"):
        assert seen(operation, "width") == {64, 128}


def test_a_wrong_kernel_and_one_that_fails_have_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    right = registry.kernel("gather_columns", "torch")

    def spoiled(x: torch.Tensor, *others: Any) -> torch.Tensor:
        if others[1]:
            raise RuntimeError("an illegal address")
        return right.run(x, *others) + 1

    wrong = dataclasses.replace(right, run=spoiled)
    monkeypatch.setattr(sanitize.registry, "kernels", lambda backend: {"gather_columns": wrong})
    found = list(lines("torch", CPU))
    assert [line.split()[0] for line in found] == ["WRONG", "WRONG", "FAILED", "FAILED", "FAILED"]
    assert "an illegal address" in found[2]
    refused = dataclasses.replace(right, unsupported=lambda dtype, width: "too odd")
    monkeypatch.setattr(sanitize.registry, "kernels", lambda backend: {"gather_columns": refused})
    assert all(line.startswith("skipped too odd") for line in lines("torch", CPU))


@pytest.mark.parametrize(
    ("output", "code", "findings", "outcome"),
    [
        (CLEAN, 0, 0, "clean"),
        (CLEAN.replace("0 errors", "1 error"), 9, 1, "findings"),
        (
            "ok x\n========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)",
            9,
            3,
            "findings",
        ),
        ("ok x\nWRONG y\n========= ERROR SUMMARY: 0 errors", 1, 0, "wrong results, exit code 1"),
        ("skipped x\n========= ERROR SUMMARY: 0 errors", 0, 0, "nothing ran, exit code 0"),
        ("ok x\nsegmentation fault", -11, None, "no summary, exit code -11"),
        ("ok x\nok y", None, None, "time was up"),
    ],
)
def test_only_an_end_with_right_results_and_no_findings_is_clean(
    output: str, code: int | None, findings: int | None, outcome: str
) -> None:
    found = judge("memcheck", "cupy", output, code)
    assert (found.findings, found.outcome, found.clean) == (findings, outcome, outcome == "clean")


def pretended(folder: Path, body: str) -> str:
    """A program that gets a sanitizer's arguments and runs `body`."""
    path = folder / "compute-sanitizer"
    path.write_text(f"#!{sys.executable}\nimport os, sys, time\narguments = sys.argv[1:]\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize.registry, "unavailable", lambda backend, device: None)


@pytest.mark.usefixtures("with_gpu")
def test_each_tool_runs_over_each_backend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = f"""
tool, backend = arguments[1], arguments[arguments.index("--backend") + 1]
assert arguments[2:4] == ["--error-exitcode", "9"] and arguments[-2:] == ["--only", "w64"]
assert arguments[arguments.index("-m") - 1] == {sys.executable!r}
bad = (tool, backend) == ("racecheck", "cupy_hopper")
assert os.environ["CHIPMUNK_RACECHECK"] == str(int(tool == "racecheck"))
print("ok first")
print("========= hazard between two writes" if bad else "fine")
print("========= %s SUMMARY: %d" % ("RACECHECK" if tool == "racecheck" else "ERROR", 2 * bad))
sys.exit(9 * bad)
"""
    logs = tmp_path / "logs"
    code = main(["--under", pretended(tmp_path, body), "--only", "w64", "--logs", str(logs)])
    said = capsys.readouterr()
    assert code == 1
    rows = [line.split() for line in said.out.splitlines()[2:]]
    assert rows == [
        ["memcheck", "cupy", "1", "of", "1", "0", "clean"],
        ["memcheck", "cupy_hopper", "1", "of", "1", "0", "clean"],
        ["racecheck", "cupy", "1", "of", "1", "0", "clean"],
        ["racecheck", "cupy_hopper", "1", "of", "1", "2", "findings"],
    ]
    assert "racecheck of cupy_hopper: findings" in said.err and "hazard between two writes" in said.err
    assert len(list(logs.iterdir())) == 4
    assert main(["--under", str(tmp_path / "compute-sanitizer"), "--only", "w64", "--tool", "memcheck"]) == 0


@pytest.mark.usefixtures("with_gpu")
def test_one_that_hangs_is_ended_with_what_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pid, under = tmp_path / "pid", tmp_path / "hangs"
    # A shell, which has started long before the seconds are up, however busy the machine is.
    under.write_text(f"#!/bin/sh\necho ok first\nsleep 600 &\necho $! > {pid}\nwait\n")
    under.chmod(0o755)
    assert main(["--under", str(under), "--tool", "memcheck", "--backend", "cupy", "--seconds", "3"]) == 1
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row == ["memcheck", "cupy", "1", "of", "1", "-", "time", "was", "up"]
    deadline = time.monotonic() + 20
    while alive(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(pid.read_text()))


def alive(pid: int) -> bool:
    """Whether a process runs: one that was killed may wait to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_cannot_be_done_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    reasons = {"cupy": "needs an NVIDIA GPU"}
    monkeypatch.setattr(sanitize.registry, "unavailable", lambda backend, device: reasons.get(backend))
    assert main(["--backend", "cupy"]) == 2
    assert "cupy left out: needs an NVIDIA GPU" in capsys.readouterr().err
    assert main(["--under", str(tmp_path / "nowhere")]) == 2
    assert "it comes with the CUDA toolkit" in capsys.readouterr().err


def test_the_command_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING", "")
    monkeypatch.setattr(sanitize.registry, "unavailable", lambda backend, device: None)
    monkeypatch.setattr(sanitize, "DEVICE", CPU)
    assert main(["--backend", "torch", "--only", "gather_columns"]) == 0
    assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert capsys.readouterr().out.count("ok error 0.0e+00") == 5
    assert main(["--backend", "torch", "--only", "nothing"]) == 2
    assert "no case of torch has nothing" in capsys.readouterr().err

"""The command as people run it: exit codes, what it prints, and a kill in mid-search."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from chipmunk_kernels import profiles
from tuner import profile_writer
from tuner.build import DeviceLost
from tuner.cli import MAX_RESTARTS, RESTARTS, main

ROOT = Path(__file__).resolve().parents[2]
SUITE = """
description: two small problems, one with a choice of settings
problems:
  - {label: tokens, operation: group_mean, rows: 300, columns: 64, width: 64, dtype: float32, group_size: 64}
  - {label: columns, operation: topk_columns, rows: 256, columns: 256, width: 1, dtype: float32, density: 0.1}
"""


@pytest.fixture
def suite(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(SUITE)
    return str(path)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def tune(*arguments: str, suite: str, folder: Path) -> list[str]:
    return ["--suite", suite, "--output", str(folder / "out"), "--budget", "4", *arguments]


@pytest.mark.slow
def test_a_run_ends_with_a_profile_and_a_table(
    suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tune(suite=suite, folder=tmp_path)) == 0
    out = capsys.readouterr().out
    for heading in (
        "operation",
        "problem",
        "winner",
        "median",
        "dense baseline",
        "speedup",
        "share of ideal",
    ):
        assert heading in out
    assert "Tensor.mean" in out and "torch.topk" in out
    name = profiles.slug(profiles.device_identity("cpu")["name"])
    profile = profiles.load(tmp_path / "out" / f"{name}.yaml")
    assert {entry.problem.operation for entry in profile.entries} == {"group_mean", "topk_columns"}
    assert profile.toolchain["kernel_sources"] and profile.device["kind"] == "cpu"

    # The same command again takes everything from the record.
    assert main(tune("--json", suite=suite, folder=tmp_path)) == 0
    document = json.loads(capsys.readouterr().out)
    assert [problem["label"] for problem in document["problems"]] == ["tokens", "columns"]
    assert any(problem["reused"] for problem in document["problems"])
    assert all(problem["entry"]["evidence"]["verdict"] for problem in document["problems"])


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tune("--dry-run", "--json", suite=suite, folder=tmp_path)) == 0
    document = json.loads(capsys.readouterr().out)
    counts = {row["problem"]: row["candidates"] for row in document["problems"]}
    assert counts["tokens"] >= 1 and counts["columns"] > 1
    assert main(tune("--dry-run", suite=suite, folder=tmp_path)) == 0
    assert "not written" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_list_has_workloads_operations_and_why_a_backend_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    assert "flux-dev" in text and "sparse_mlp" in text and "laptop" in text
    assert main(["--list", "--json"]) == 0
    backends = json.loads(capsys.readouterr().out)["backends"]
    assert backends["torch"] is None and backends["triton"] and backends["cupy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h100"], "this machine has none"),
        (["--gpu", "h10o"], "did you mean 'h100'"),
        (["--suite", "flux-dve"], "did you mean 'flux-dev'"),
        (["--op", "sparse_atention"], "did you mean 'sparse_attention'"),
        (["--suite", "hunyuan-video", "--op", "group_mean"], "has no problem of group_mean"),
    ],
)
def test_what_cannot_be_done_ends_with_2_and_a_reason(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--budget", "0"], ["--budget", "nan"], ["--trials", "0"], ["--resume", "--fresh"], ["--colour"]],
)
def test_a_wrong_argument_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_a_read_only_output_folder_is_refused_before_any_tuning(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    # A mode that forbids writing would not stop the root user, who runs tests in containers.
    monkeypatch.setattr(profile_writer.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr("tuner.bench.open_bench", lambda *arguments: pytest.fail("tuning began"))
    assert main(tune(suite=suite, folder=tmp_path)) == 2
    message = capsys.readouterr().err
    assert "Permission denied" in message and "--output" in message


def test_a_storage_file_that_is_none_is_refused(
    suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "trials.db"
    storage.write_text("no database " * 100)
    assert main(tune("--storage", str(storage), suite=suite, folder=tmp_path)) == 2
    assert "--storage" in capsys.readouterr().err
    assert storage.read_text() == "no database " * 100


def command(suite: str, folder: Path) -> list[str]:
    arguments = ["--suite", suite, "--output", str(folder), "--op", "topk_columns", "--budget", "6"]
    return [sys.executable, "-m", "tuner.cli", "--gpu", "cpu", "--json", *arguments]


def finished_trials(storage: Path) -> dict[str, tuple[str, float, int]]:
    """Settings → (when it finished, its median, attempts), as recorded now."""
    if not storage.exists():
        return {}
    query = (
        "SELECT json_extract(fields, '$.settings'), finished, median_ms, attempts "
        "FROM outcomes WHERE status IS NOT NULL"
    )
    try:
        with sqlite3.connect(f"file:{storage}?mode=ro", uri=True) as db:
            return {row[0]: row[1:] for row in db.execute(query)}
    except sqlite3.OperationalError:  # not there yet
        return {}


def wait_for_a_trial(process: subprocess.Popen[str], storage: Path) -> None:
    deadline = time.monotonic() + 60
    while not finished_trials(storage):
        assert process.poll() is None and time.monotonic() < deadline, "no trial was ever recorded"
        time.sleep(0.005)


def hear_interrupts() -> None:
    """A job that a shell runs in the background ignores SIGINT, and so would every process it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_search_resumes_without_losing_or_repeating_a_trial(
    suite: str, tmp_path: Path, how: signal.Signals
) -> None:
    folder = tmp_path / "out"
    name = profiles.slug(profiles.device_identity("cpu")["name"])
    storage = folder / f"{name}.db"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "env": environment, "text": True}
    process = subprocess.Popen(
        command(suite, folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=hear_interrupts,
        **options,
    )  # type: ignore[call-overload]
    wait_for_a_trial(process, storage)
    process.send_signal(how)
    code = process.wait(30)
    assert code == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    before = finished_trials(storage)
    assert before

    done = subprocess.run(command(suite, folder), capture_output=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    after = finished_trials(storage)
    assert {key: after[key] for key in before} == before
    (problem,) = json.loads(done.stdout)["problems"]
    assert sum(problem["candidates"].values()) == len(after) > len(before)
    assert all(attempts == 1 for _, _, attempts in (after[key] for key in before))
    assert profiles.load(folder / f"{name}.yaml").entries


def test_a_lost_device_goes_on_in_a_new_process_without_forgetting(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def lose(session: object, items: object) -> None:
        raise DeviceLost("triton {}: an illegal memory access")

    def replace_process(path: str, arguments: list[str]) -> None:
        commands.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr("tuner.session.Session.run", lose)
    monkeypatch.setattr(os, "execv", replace_process)
    monkeypatch.setenv(RESTARTS, "0")
    arguments = tune("--fresh", suite=suite, folder=tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    (command_line,) = commands
    assert command_line[1:3] == ["-m", "tuner.cli"] and "--fresh" not in command_line
    assert float(command_line[-1]) <= 4.0 and command_line[-2] == "--budget"
    assert os.environ[RESTARTS] == "1"

    monkeypatch.setenv(RESTARTS, str(MAX_RESTARTS))
    assert main(arguments) == 3
    assert "given up" in capsys.readouterr().err

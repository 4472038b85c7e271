"""Building: failures become data, and a worker that dies or hangs takes nothing with it."""

from __future__ import annotations

import time

import pytest

from chipmunk_kernels import registry
from tests.tuner.fakes import PROBLEM, CompilationError, fake_kernels, misbehave
from tuner.build import InlineBuilder, PoolBuilder, Task, check
from tuner.errors import failure, wall_limit
from tuner.store import Outcome
from tuner.verify import Check


def task(backend: str = "torch", **settings: object) -> Task:
    return Task(PROBLEM, backend, {"speed": 8, "fault": "none", **settings}, "cpu", 1)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (TimeoutError("took long"), "timeout", "took long"),
        (MemoryError("no room"), "out_of_resources", "no room"),
        (CompilationError("source\nline 3: what is wrong"), "compile_error", "line 3: what is wrong"),
        (RuntimeError("first\nsecond"), "error", "RuntimeError: first"),
        (ValueError(), "error", "ValueError"),
    ],
)
def test_whatever_is_thrown_has_a_status_and_a_reason(error: Exception, status: str, reason: str) -> None:
    outcome = failure(error)
    assert outcome.status == status and reason in outcome.reason and "\n" not in outcome.reason


class NVRTCError(RuntimeError):
    """Stands for the class of that name in CuPy."""


NVRTC_LOG = """attention.cu does not compile with --gpu-architecture=sm_90a: NVRTC_ERROR_COMPILATION (6)
attention.cu(31): warning #177-D: variable "tile" was declared but never referenced
attention.cu(42): error: identifier "wgmma" is undefined
1 error detected in the compilation of "attention.cu"."""
PTXAS_LOG = """attention.cu does not compile with --gpu-architecture=sm_90a: NVRTC_ERROR_COMPILATION (6)
ptxas error   : Entry function 'attend' uses too much shared data (0x40000 bytes, 0x38c00 max)"""


@pytest.mark.parametrize(
    ("log", "complaint"),
    [(NVRTC_LOG, 'attention.cu(42): error: identifier "wgmma"'), (PTXAS_LOG, "uses too much shared data")],
)
def test_a_cuda_source_that_does_not_compile_says_its_first_error(log: str, complaint: str) -> None:
    try:
        raise RuntimeError(log) from NVRTCError("NVRTC_ERROR_COMPILATION (6)")
    except RuntimeError as error:
        outcome = failure(error)
    assert outcome.status == "compile_error" and complaint in outcome.reason


def test_tritons_out_of_resources_is_known_by_name() -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    assert failure(errors.OutOfResources(300000, 232448, "shared memory")).status == "out_of_resources"


def test_a_wall_limit_interrupts_and_leaves_no_alarm_behind() -> None:
    with pytest.raises(TimeoutError, match="longer"), wall_limit(0.05):
        time.sleep(5)
    with wall_limit(0.05):
        pass
    time.sleep(0.1)


def test_inline_building_answers_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "kernels", fake_kernels)
    faults = ("none", "wrong", "unwritten", "raise", "memory", "compile")
    answers = dict(InlineBuilder(check).run([task(fault=fault) for fault in faults], limit_s=30))
    assert isinstance(answers[0], Check) and answers[0].ok
    assert answers[0].seconds > 0 and answers[3].build_s > 0  # type: ignore[union-attr]
    for index in (1, 2):
        wrong = answers[index]
        assert isinstance(wrong, Check) and not wrong.ok
    assert [getattr(answers[index], "status", None) for index in (3, 4, 5)] == [
        "error",
        "out_of_resources",
        "compile_error",
    ]


def test_check_rejects_settings_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "kernels", fake_kernels)
    with pytest.raises(ValueError, match="unknown settings"):
        check(task(colour="red"))


@pytest.mark.slow
def test_a_pool_survives_workers_that_die_hang_and_raise() -> None:
    pool = PoolBuilder(2, misbehave)
    try:
        names = ["dies", "fine", "hangs", "raises", "fine", "fine"]
        answers = dict(pool.run([task(name) for name in names], limit_s=1.0))
        # The replacements serve a second batch.
        later = dict(pool.run([task("fine"), task("fine")], limit_s=30.0))
    finally:
        pool.close()
    assert sorted(answers) == list(range(6))
    died, hung, raised = answers[0], answers[2], answers[3]
    assert isinstance(died, Outcome) and died.status == "crashed" and "SIGSEGV" in died.reason
    assert isinstance(hung, Outcome) and hung.status == "timeout"
    assert isinstance(raised, Outcome) and raised.status == "out_of_resources"
    assert all(isinstance(answers[index], Check) for index in (1, 4, 5))
    assert all(isinstance(answer, Check) for answer in later.values())

"""Every Triton kernel compiled for three GPU generations, with no GPU: it fits, and nothing spills."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence

import pytest

from chipmunk_kernels.backends.triton import resources
from tests.compiling import compiling

TARGETS = ("sm_80", "sm_90", "sm_100")
KERNELS = (
    "dense_attention",
    "colsum_attention",
    "sparse_attention",
    "topk_columns",
    "coverage_columns",
    "columns_from_mask",
    "gather_columns",
    "scatter_columns",
    "sparse_mlp",
    "group_mean",
    "bias_gelu",
)
STACK_BYTES_ALLOWED = 32
"""A few registers saved around a loop cost nothing; on sm_80 the dense kernel is 8 bytes short."""

FULL_BLOCK_STACK_BYTES_ALLOWED = 192
"""The largest contests of the selection run 1024 threads, which leaves a thread 64 registers. What they keep
on the stack is set up once a row, outside of their loops."""

Row = dict[str, object]

pytestmark = [pytest.mark.compile_only, pytest.mark.slow]


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the report."""
    return compiling("-m", "chipmunk_kernels.backends.triton.resources", *arguments)


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    """The report for every kernel and target (about 20 s of compiling, once a session)."""
    done = report("--json", "--targets", *TARGETS)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def of(rows: Sequence[Row], kernel: str, target: str) -> list[Row]:
    """The cases of one operation, whose names start with it."""
    found = [r for r in rows if str(r["kernel"]).startswith(kernel) and r["target"] == target]
    assert found, f"the report has no case of {kernel} for {target}"
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_and_fits(rows: list[Row], kernel: str, target: str) -> None:
    for row in of(rows, kernel, target):
        assert row["error"] is None, row
        assert 0 < int(str(row["registers"])) <= 255, row
        full = row["num_warps"] == 32
        allowed = FULL_BLOCK_STACK_BYTES_ALLOWED if full else STACK_BYTES_ALLOWED
        assert int(str(row["stack_bytes"])) <= allowed, f"registers spill: {row}"
        assert int(str(row["shared_bytes"])) <= int(str(row["shared_limit_bytes"])), f"does not fit: {row}"


def test_attention_fits_the_smallest_gpus(rows: list[Row]) -> None:
    """The defaults stay within the 99 KiB of sm_86, sm_89 and sm_120, which pipeline as sm_80 does."""
    for kernel in KERNELS[:3]:
        assert all(int(str(row["shared_bytes"])) <= 99 * 1024 for row in of(rows, kernel, "sm_80"))


def test_what_is_written_for_hopper_is_compiled_for_hopper(rows: list[Row]) -> None:
    targets = {row["target"] for row in rows if str(row["kernel"]).endswith("Hopper")}
    assert targets == {"sm_90"}


def test_wrong_arguments_say_what_is_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for arguments, message in (
        (["--targets", "h100"], "expected names such as sm_90, got h100"),
        ([], "unset it"),
    ):
        with pytest.raises(SystemExit) as stop:
            resources.main(arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_table_of_one_kernel() -> None:
    done = report("--targets", "sm_90", "--kernels", "group_mean")
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert header.split()[:2] == ["kernel", "target"]
    assert [line.split()[:2] for line in lines] == [["group_mean", "sm_90"]]


STAMP = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tuner.sm_clock import stamp_kernel
for capability in (80, 90, 100):
    source = ASTSource(stamp_kernel, {"stamps": "*i64"}, {})
    target = GPUTarget("cuda", capability, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": 1}).asm["ptx"]
    print(capability, ptx.count("%clock64"), ptx.count("%globaltimer"), ptx.count("%smid"))
"""


def test_the_clock_stamp_reads_all_three_registers_on_every_target() -> None:
    done = compiling("-c", STAMP)
    assert done.stdout.split("\n")[:3] == ["80 1 1 1", "90 1 1 1", "100 1 1 1"], done.stderr

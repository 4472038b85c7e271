"""What the compiler makes of the Gluon kernels, with no GPU: they fit, and nothing waits that need not.

The kernels' speed rests on two products in flight at once. A compiler that takes one thing after
another computes the same.
"""

from __future__ import annotations

import json
import re

import pytest

from chipmunk_kernels.backends import triton_hopper
from chipmunk_kernels.problem import Problem
from tests.compiling import compiling

if reason := triton_hopper.without_gluon():
    pytest.skip(reason, allow_module_level=True)
from chipmunk_kernels.backends.triton_hopper.sparse_attention import (
    REGISTERS,
    SHARED_BYTES,
    SparseAttentionSettings,
    shared_bytes,
    warpgroups,
)

pytestmark = [pytest.mark.compile_only, pytest.mark.slow]

PROGRAM = """
import json, subprocess, sys, tempfile
from pathlib import Path
import triton
from chipmunk_kernels.backends.triton.resources import _compile, _usage
from chipmunk_kernels.backends.triton_hopper.sparse_attention import SparseAttentionSettings, compile_case
ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
for group_size, width, block_n, stages, base, dtype in json.loads(sys.argv[1]):
    case = compile_case(group_size, width, SparseAttentionSettings(block_n, stages))
    _, kernel, types, constants, warps, _ = case
    types = {name: kind.replace("bf16", dtype) for name, kind in types.items()}
    if not base:
        types["base"], constants["base"] = "constexpr", None
    binary = _compile(kernel, types, constants, 90, warps, stages)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(binary.asm["ptx"])
        command = [ptxas, "-v", "--gpu-name=sm_90a", source, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    print(json.dumps([binary.asm["ptx"], said, *_usage(binary.asm["cubin"]), binary.metadata.shared]))
"""

Case = tuple[int, int, int, int, bool, str]
"""Rows of a group, head width, columns at a time, stages, whether there is a base, dtype."""
CASES: list[Case] = [
    (128, 128, 64, 4, True, "bf16"),
    (128, 128, 64, 4, False, "fp16"),
    (128, 128, 128, 2, True, "bf16"),
    (192, 128, 64, 5, True, "fp16"),
    (64, 128, 128, 2, True, "bf16"),
    (128, 64, 64, 4, True, "bf16"),
    (192, 64, 32, 5, False, "bf16"),
]
STACK_BYTES_ALLOWED = {1: 0, 2: 0, 3: 32}
"""By warpgroups that compute. With three, a thread has 152 registers, and a few numbers do not fit."""


@pytest.fixture(scope="module")
def compiled_cases() -> list[str]:
    """A line a case, from one process: to start one takes longer than to compile."""
    done = compiling("-c", PROGRAM, json.dumps(CASES))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_fits_and_keeps_two_products_in_flight(compiled_cases: list[str], number: int) -> None:
    group_size, width, block_n, stages, base, _ = CASES[number]
    ptx, said, _, stack, shared = json.loads(compiled_cases[number])
    consumers = warpgroups(group_size)
    assert stack <= STACK_BYTES_ALLOWED[consumers], said
    assert "serializ" not in said, said  # what ptxas says of products that it makes wait for each other

    expected = shared_bytes(width, consumers, SparseAttentionSettings(block_n, stages))
    assert shared <= expected <= SHARED_BYTES and expected - shared < 4096, (shared, expected)

    # Of each computing partition: the first logits, those of the loop, its values, the
    # last values.
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)
    assert waits == ["0", "1", "0", "0"] * consumers
    # Lanes ask each other for two rows' maxima, in the first tile and the loop, and for sums at the end.
    assert ptx.count("shfl.sync.bfly") == consumers * 3 * 4
    # Gathers land by themselves: nobody waits for them but through the tiles' barriers.
    assert ptx.count("cp.async.mbarrier.arrive.noinc") == 2
    taken = {int(count) for count in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)}
    assert set(REGISTERS[consumers]) <= taken or consumers == 1  # who has registers enough as it is launched
    # 16 bytes an access, of the base and of the output: as few as there can be.
    per_thread = 64 * width * 2 // 16 // 128
    assert ptx.count("st.global.v4.b32") == consumers * per_thread
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == (2 * consumers * per_thread if base else 0)


@pytest.mark.parametrize("consumers", REGISTERS)
def test_registers_are_what_a_multiprocessor_has(consumers: int) -> None:
    compute, fetch = REGISTERS[consumers]
    assert 128 * (consumers * compute + fetch) <= 65536
    assert compute % 8 == fetch % 8 == 0 and compute <= 255


@pytest.mark.parametrize("field", ["block_n", "num_stages"])
def test_every_value_of_the_space_can_win(field: str) -> None:
    for value in SparseAttentionSettings.space()[field]:
        tried = [
            SparseAttentionSettings.from_mapping({**others, field: value}).misfit(flux(128), 227 * 1024)
            for others in ({}, {"num_stages": 2})
        ]
        assert None in tried, f"{field}={value}: {tried}"


def flux(group_size: int) -> Problem:
    return Problem(
        "sparse_attention", rows=4352, columns=4352, width=128, heads=24, group_size=group_size, density=0.07
    )


def test_the_default_suits_every_group() -> None:
    for group_size in (1, 64, 128, 192, 256, 384, 500):
        assert SparseAttentionSettings().misfit(flux(group_size), 227 * 1024) is None
        for preset in SparseAttentionSettings.presets():
            fits = preset.block_n < 128 or warpgroups(group_size) < 3
            assert (preset.misfit(flux(group_size), 227 * 1024) is None) == fits


def test_misfit_names_the_reason() -> None:
    assert "of a thread's 152 registers" in (SparseAttentionSettings(128, 2).misfit(flux(192)) or "")
    assert "shared memory" in (SparseAttentionSettings(128, 4).misfit(flux(128)) or "")
    assert "the device has 101376" in (SparseAttentionSettings().misfit(flux(128), 99 * 1024) or "")

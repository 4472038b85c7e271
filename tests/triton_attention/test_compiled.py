"""What the compiler makes of the overlapped kernels for Hopper, with no GPU.

The kernels' speed rests on the compiler leaving two things in flight: gathers for tiles ahead, and a tile's
product with its values during the next tile's softmax. A compiler that stops doing so computes the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from tests.compiling import compiling

pytestmark = [pytest.mark.compile_only, pytest.mark.slow]

PROGRAM = """
import importlib, json, sys
from chipmunk_kernels.backends.triton.resources import _compile, _usage
for operation, stages, warps, changes in json.loads(sys.argv[1]):
    file = importlib.import_module(f"chipmunk_kernels.backends.triton.{operation}")
    _, kernel, signature, constexprs, _, _ = file.COMPILE_CASES[0]
    binary = _compile(kernel, signature, constexprs | changes, 90, warps, stages)
    print(json.dumps([binary.asm["ttgir"], *_usage(binary.asm["cubin"]), binary.metadata.shared]))
"""

# Operation, stages, warps, and constants in the place of those of the operation's compile case.
Case = tuple[str, int, int, dict[str, int]]
OVERLAPPED: list[Case] = [
    ("sparse_attention", stages, 8, {"BLOCK_N": block_n, "OVERLAP": True, "PEEL_TAIL": True})
    for block_n, stages in ((64, 3), (128, 2), (128, 3))
] + [("dense_attention", stages, 8, {"BLOCK_N": 128, "OVERLAP": True}) for stages in (2, 3)]
IN_ORDER: Case = ("sparse_attention", 3, 8, {"BLOCK_N": 64, "OVERLAP": False})
MASKED_TAIL: Case = ("sparse_attention", 2, 8, {"BLOCK_N": 32, "OVERLAP": False, "PEEL_TAIL": False})
COLUMN_SUMS: list[Case] = [("colsum_attention", 2, 4, {"REST_Q": rest}) for rest in (0, 64, 128)]
CASES = [*OVERLAPPED, IN_ORDER, MASKED_TAIL, *COLUMN_SUMS]

Compiled = tuple[str, int, int, int]
"""The loop with products in Triton's GPU dialect, and registers, stack and shared bytes, for sm_90."""


@pytest.fixture(scope="module")
def answers() -> list[str]:
    """A line a case, from one process: to start one takes longer than to compile."""
    done = compiling("-c", PROGRAM, json.dumps(CASES))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def loop_of(answers: list[str]) -> Callable[[Case], Compiled]:
    def of(case: Case) -> Compiled:
        text, registers, stack, shared = json.loads(answers[CASES.index(case)])
        loops = [
            found[1]
            for found in re.findall(r"^( *)(\S[^\n]*scf\.for .*?)^\1\}", text, re.DOTALL | re.MULTILINE)
        ]
        main = [loop for loop in loops if "ttng.warp_group_dot " in loop]
        assert len(main) == 1, f"{len(main)} loops with products"
        return main[0], registers, stack, shared

    return of


@pytest.mark.parametrize("case", OVERLAPPED, ids=str)
def test_what_is_in_flight(case: Case, loop_of: Callable[[Case], Compiled]) -> None:
    loop, registers, stack, shared = loop_of(case)
    stages = case[1]
    assert stack == 0, f"{stack} bytes spill beside {registers} registers"
    assert shared <= 227 * 1024
    # The logits are waited for, the product with the values is not: softmax comes between it and the end.
    product = loop.rindex("ttng.warp_group_dot ")
    assert loop.count("ttng.warp_group_dot_wait") == 1 and loop.index("ttng.warp_group_dot_wait") < product
    assert product < loop.index("math.exp2", product)
    # Keys and values of (stages − 2) tiles may be on their way while one is worked on.
    pending = re.findall(r"ttg\.async_wait .*?num = (\d+)", loop)
    assert pending == [str(2 * (stages - 2))], pending
    assert loop.count("ttg.async_copy_global_to_local") == 2


def test_in_order_waits_for_nothing_but_its_own(loop_of: Callable[[Case], Compiled]) -> None:
    """Without overlap the product comes last, and the gathers still run ahead."""
    loop, _, stack, _ = loop_of(IN_ORDER)
    assert stack == 0
    assert loop.rindex("math.exp2") < loop.rindex("ttng.warp_group_dot ")
    assert re.findall(r"ttg\.async_wait .*?num = (\d+)", loop) == ["3", "2"], "keys, then values"


def test_a_masked_tail_costs_full_tiles_a_branch(loop_of: Callable[[Case], Compiled]) -> None:
    """The mask of the last tile stands in a branch of its own, and gathers need none."""
    loop, _, _, _ = loop_of(MASKED_TAIL)
    assert loop.index("ttng.warp_group_dot ") < loop.index("scf.if") < loop.index("math.exp2")


@pytest.mark.parametrize("case", COLUMN_SUMS, ids=str)
def test_column_sums_stay_in_a_thread_and_its_neighbours(
    case: Case, loop_of: Callable[[Case], Compiled]
) -> None:
    """No sum over queries passes through shared memory, and none spills."""
    loop, _, stack, shared = loop_of(case)
    assert stack == 0
    assert shared <= 227 * 1024
    assert loop.count('"tt.reduce"') == (2 if case[3]["REST_Q"] else 1)
    assert "ttg.local_store" not in loop

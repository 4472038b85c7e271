"""Triton's kernels as racecheck is shown them: barriers of all warps twice, and no trace left behind."""

from __future__ import annotations

import json

import pytest

from chipmunk_kernels.backends import triton_hopper
from suites.benchmarks.racecheck import twice
from tests.compiling import compiling

PROGRAM = """
import json, os
os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # a cached build may name another checkout's files
from chipmunk_kernels.backends.triton.resources import _compile
from chipmunk_kernels.backends.triton_hopper.sparse_attention import SparseAttentionSettings, compile_case
from suites.benchmarks.racecheck import handing_out_twice
from triton import knobs
_, *case, warps, stages = compile_case(64, 64, SparseAttentionSettings())
built = lambda: _compile(*case, 90, warps, stages).asm["ptx"]
before = built()
home, variable = knobs.cache.dir, os.environ.get("TRITON_CACHE_DIR")
with handing_out_twice():
    folder = knobs.cache.dir
    assert folder != home and not os.listdir(folder)
    within = built()
    assert os.listdir(folder)
assert not os.path.exists(folder)
assert knobs.cache.dir == home and os.environ.get("TRITON_CACHE_DIR") == variable
assert knobs.runtime.add_stages_inspection_hook is None
print(json.dumps([before, within, built()]))
"""


def test_only_barriers_of_all_are_doubled() -> None:
    store, partial = "\tst.shared.b8 [%r1], 0;", "\tbar.sync \t0, 128;"
    barrier = "\tbarrier.sync \t1;"
    lines = [barrier, store, partial, barrier, "\tret;"]
    found = [line.strip() for line in twice("\n".join(lines)).splitlines()]
    barrier, store, partial = barrier.strip(), store.strip(), partial.strip()
    assert found == [barrier, barrier, store, partial, barrier, barrier, "ret;"]
    assert twice("\tbar.sync \t0;\n\tbarrier.sync \t11;") == "\tbar.sync \t0;\n\tbarrier.sync \t11;"


@pytest.mark.compile_only
@pytest.mark.slow
def test_triton_builds_them_so_within_and_as_ever_after() -> None:
    if reason := triton_hopper.without_gluon():
        pytest.skip(reason)
    done = compiling("-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    before, within, after = json.loads(done.stdout.splitlines()[-1])
    assert before == after and before.count("barrier.sync") >= 5
    assert within.count("barrier.sync") == 2 * before.count("barrier.sync")
    assert [line for line in within.splitlines() if "barrier.sync" not in line] == [
        line for line in before.splitlines() if "barrier.sync" not in line
    ]

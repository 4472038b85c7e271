"""The instructions that the portable kernels come to: tensor cores, ldmatrix, copies past the registers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from chipmunk_kernels.backends.cupy import mlp, sparse_attention
from chipmunk_kernels.backends.cupy.module import Source
from chipmunk_kernels.backends.triton.resources import cuobjdump
from tests.cupy_backend.nvrtc import compile_for

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([\w.]+)", re.MULTILINE)

pytestmark = pytest.mark.compile_only


def instructions(source: Source, architecture: str, folder: Path) -> list[str]:
    """Names with their modifiers, such as "HMMA.16816.F32.BF16", of all kernels of a source."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compile_for(source, architecture))
    command = [cuobjdump(), "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _INSTRUCTION.findall(text)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_120"])
@pytest.mark.parametrize("source", [sparse_attention.SOURCES[0], mlp.SOURCES[0]], ids=lambda s: s.file)
def test_made_of_the_fast_instructions(source: Source, architecture: str, tmp_path: Path) -> None:
    found = instructions(source, architecture, tmp_path)

    def count(*parts: str) -> int:
        return sum(all(part in name for part in parts) for name in found)

    products = count("HMMA.16816.F32.BF16")
    assert products >= 256
    assert count("HMMA") == products, "no smaller product"
    assert count("LDSM.16.M88.4") > 0
    assert count("LDSM.16.MT88.4") > 0
    assert count("LDSM") <= products / 3, "each pair of matrices serves several products"
    assert count("LDGSTS", "BYPASS", "128") > 0
    assert count("LDL") == count("STL") == 0

"""Every .cu file compiles for every GPU we support, and spills nothing."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from chipmunk_kernels.backends import cupy, cupy_hopper
from chipmunk_kernels.backends.cupy import gather, module
from chipmunk_kernels.backends.cupy.module import Source
from tests.cupy_backend.nvrtc import compile_for, usage

pytestmark = pytest.mark.compile_only

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")


def sources(package: ModuleType) -> list[Source]:
    files = [importlib.import_module(f"{package.__name__}.{file}") for file in package.FILES]
    return [source for file in files for source in file.SOURCES]


MAIN = ("sm_80", "sm_90a")


def cases() -> list[tuple[Source, str]]:
    """Each file for each architecture; its other variants, which differ in constants, for the main ones."""
    found: list[tuple[Source, str]] = []
    for source in sources(cupy):
        first = all(source.file != other.file for other, _ in found)
        found += [(source, target) for target in (ARCHITECTURES if first else MAIN)]
    return found + [(source, "sm_90a") for source in sources(cupy_hopper)]


def named(case: Source | str) -> str:
    if isinstance(case, str):
        return case
    return f"{case.folder.name}-{case.file}-{'-'.join(str(value) for _, value in case.defines)}"


@pytest.mark.parametrize(("package", "folder"), [(cupy, module.FOLDER), (cupy_hopper, cupy_hopper.FOLDER)])
def test_every_source_file_is_covered(package: ModuleType, folder: Path) -> None:
    assert {path.name for path in folder.glob("*.cu")} == {source.file for source in sources(package)}
    assert {source.folder for source in sources(package)} <= {folder}


@pytest.mark.parametrize(("source", "architecture"), cases(), ids=named)
def test_compiles_without_spills(source: Source, architecture: str, tmp_path: Path) -> None:
    kernels = usage(compile_for(source, architecture), tmp_path)
    assert kernels
    for name, used in kernels.items():
        assert used.stack_bytes == used.local_bytes == 0, f"{name} spills: {used}"
        assert used.registers > 0, f"{name}: {used}"


@pytest.mark.parametrize("vector_bytes", [2, 4, 8])
def test_narrow_vectors_compile(vector_bytes: int, tmp_path: Path) -> None:
    import torch

    source = gather.source(torch.bfloat16, 193, 2, gather.GatherSettings())
    if vector_bytes > 2:
        source = gather.source(torch.bfloat16, 60, vector_bytes, gather.GatherSettings(in_flight=8))
    kernels = usage(compile_for(source, "sm_90a"), tmp_path)
    assert set(kernels) == {"gather_rows", "gather_groups", "scatter_assign", "scatter_add"}
    assert all(used.stack_bytes == 0 for used in kernels.values())


def test_portable_ptx_for_a_gpu_that_nvrtc_does_not_know() -> None:
    ptx = compile_for(gather.SOURCES[0], "compute_90").decode()
    assert ".target sm_90" in ptx
    assert "gather_rows" in ptx

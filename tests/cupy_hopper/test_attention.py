"""The Hopper column-sparse attention kernel without a GPU: run by fibers, compiled, and its settings."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch

from chipmunk_kernels.backends.cupy_hopper import sparse_attention as kernel
from chipmunk_kernels.backends.cupy_hopper.sparse_attention import SparseAttentionSettings
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.problem import Problem
from tests.cupy_backend import nvrtc
from tests.cupy_backend.emulate import COMPILER
from tests.cupy_hopper.emulate import Emulator
from tests.factories import attention_inputs, randn, scattered_columns
from tests.triton_attention.cases import check_sparse, run

BF16, FP16 = torch.bfloat16, torch.float16
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, blocks: int, seed: int = 0) -> None:
    """Launches go to the host, `blocks` at a time."""
    emulator = Emulator(folder, blocks, seed)
    monkeypatch.setattr(kernel, "load", emulator.load)
    monkeypatch.setattr(kernel, "launch", emulator.launch)
    monkeypatch.setattr(
        kernel,
        "_kernel",
        lambda dtype, width, settings, device: (
            emulator.load(kernel.source(dtype, width, settings), "sparse_attention", device),
            blocks,
        ),
    )


CASES = [
    # settings, (batch, heads, rows, columns, group), width, dtype, density, logits up to
    (SparseAttentionSettings(3, 80, 3), (1, 2, 385, 300, 192), 128, BF16, 0.4, 3),
    (SparseAttentionSettings(3, 80, 3, ping_pong=True), (2, 1, 193, 400, 192), 64, FP16, 0.7, 3),
    (SparseAttentionSettings(3, 128, 2, overlap=False), (1, 2, 400, 500, 192), 128, BF16, 0.6, 3),
    (SparseAttentionSettings(2, 176, 2, ping_pong=True), (2, 1, 130, 700, 128), 128, BF16, 0.8, 3),
    (SparseAttentionSettings(2, 128, 3), (1, 2, 257, 600, 256), 128, FP16, 0.7, 200),
    (SparseAttentionSettings(1, 64, 2, blocks=2), (2, 2, 191, 300, 192), 128, BF16, 0.5, 3),
    (SparseAttentionSettings(1, 48, 4), (3, 1, 63, 91, 50), 64, BF16, 0.1, 3),
]


@needs_compiler
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
@pytest.mark.parametrize(("settings", "shape", "width", "dtype", "density", "logits"), CASES)
def test_equals_the_reference(
    settings: SparseAttentionSettings,
    shape: tuple[int, int, int, int, int],
    width: int,
    dtype: torch.dtype,
    density: float,
    logits: float,
    strided: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ragged rows and counts, an empty group, a full one; fewer blocks than tiles, threads in any order."""
    batch, heads, rows, keys, group_size = shape
    install(monkeypatch, folder, blocks=3, seed=int(strided))
    q, k, v = attention_inputs(batch, heads, rows, keys, width, dtype=dtype, strided=strided)
    columns = scattered_columns(batch, heads, rows, keys, group_size, density)
    base = randn(*q.shape, dtype=dtype, seed=7) if strided else None
    scale = logits / float((q.float() @ k.float().transpose(-1, -2)).abs().max())
    got = run(kernel.sparse_attention, q, k, v, columns, base, -1, scale, settings)
    check_sparse(got, q, k, v, columns, base, -1, scale)
    assert bool(got[0].isfinite().all())


@needs_compiler
@pytest.mark.parametrize("count", [0, 1, 47, 48, 49, 96, 145])
def test_any_count(count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, folder, blocks=1)
    q, k, v = attention_inputs(1, 1, 64, 145, 64, dtype=BF16)
    columns = ColumnSet.from_lists([[[torch.randperm(145)[:count].tolist()]]], 64)
    got = run(kernel.sparse_attention, q, k, v, columns, None, 1, 0.1, SparseAttentionSettings(1, 48, 2))
    check_sparse(got, q, k, v, columns, None, 1, 0.1)


@needs_compiler
@pytest.mark.parametrize("scale", [0.0, -0.1])
def test_any_scale(scale: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, folder, blocks=2)
    q, k, v = attention_inputs(1, 2, 100, 200, 64, dtype=BF16)
    columns = scattered_columns(1, 2, 100, 200, 64)
    got = run(kernel.sparse_attention, q, k, v, columns, q, 1, scale, SparseAttentionSettings(1, 48, 2))
    check_sparse(got, q, k, v, columns, q, 1, scale)


@needs_compiler
def test_rows_that_start_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices whose rows are not 16-byte aligned, and a base of another dtype, are copied."""
    install(monkeypatch, folder, blocks=2)
    wide = randn(1, 2, 100, 70, dtype=BF16)
    q, k, v = wide[..., :64], wide[..., 3:67], wide[..., 5:69]
    columns = scattered_columns(1, 2, 100, 100, 64)
    got = run(kernel.sparse_attention, q, k, v, columns, q.float(), 1, 0.1, SparseAttentionSettings(1, 48, 2))
    check_sparse(got, q, k, v, columns, q, 1, 0.1)


def problem(group_size: int, width: int = 128) -> Problem:
    return Problem("sparse_attention", 4352, 4352, width, heads=24, group_size=group_size, density=0.1)


def fitting(group_size: int, width: int = 128) -> list[SparseAttentionSettings]:
    space = SparseAttentionSettings.space().values()
    every = [SparseAttentionSettings(*values) for values in itertools.product(*space)]
    return [each for each in every if each.misfit(problem(group_size, width)) is None]


@pytest.mark.parametrize("group_size", [64, 128, 192, 256])
def test_each_group_size_has_candidates(group_size: int) -> None:
    assert len(fitting(group_size)) > 20
    consumers = {each.fitted(group_size).consumers for each in fitting(group_size)}
    assert consumers == {64: {1}, 192: {1, 3}}.get(group_size, {1, 2})


def test_misfits() -> None:
    """What needs more registers or shared memory than there is, or leaves a warpgroup idle."""
    for settings, reason in (
        (SparseAttentionSettings(3, 96, 3), "registers"),
        (SparseAttentionSettings(3, 128, 3, overlap=False), "shared memory"),
        (SparseAttentionSettings(2), "idle"),
        (SparseAttentionSettings(3, 112, 3, overlap=False, ping_pong=True), "turns"),
    ):
        assert reason in str(settings.misfit(problem(192)))
    assert "more than 128 rows need" in str(SparseAttentionSettings(3).misfit(problem(128)))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("group_size", [1, 64, 100, 128, 192, 256, 320, 448, 1000])
def test_the_defaults_fit_every_group(group_size: int, width: int) -> None:
    assert SparseAttentionSettings().misfit(problem(group_size, width)) is None


def test_warpgroups_are_cut_to_the_group() -> None:
    assert SparseAttentionSettings(3, ping_pong=True).fitted(50).consumers == 1
    assert not SparseAttentionSettings(3, ping_pong=True).fitted(50).ping_pong
    assert SparseAttentionSettings(3).fitted(128).consumers == 2
    assert SparseAttentionSettings(2).fitted(1000) == SparseAttentionSettings(2)


@pytest.mark.parametrize(
    ("group_size", "consumers"), [(1, 1), (64, 1), (65, 2), (128, 2), (192, 3), (256, 2), (320, 3), (448, 2)]
)
def test_warpgroups_chosen_for_the_group(group_size: int, consumers: int) -> None:
    """As many as share a row without idling much."""
    assert SparseAttentionSettings().fitted(group_size).consumers == consumers


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_refuses_other_types_and_widths(dtype: torch.dtype) -> None:
    refuse = kernel.KERNELS[0].unsupported
    assert "float16 and bfloat16" in str(refuse(dtype, 128))
    assert "64 and 128" in str(refuse(BF16, 96))
    assert refuse(BF16, 128) is None


COMPILED = [
    (settings, dtype, width)
    for settings, dtype, width in (
        (SparseAttentionSettings().fitted(192), BF16, 128),
        (SparseAttentionSettings(3, 128, 2, overlap=False), FP16, 128),
        (SparseAttentionSettings(2, 176, 2, ping_pong=True), BF16, 128),
        (SparseAttentionSettings(1, 64, 2, blocks=2), BF16, 128),
        (SparseAttentionSettings(3, 128, 3), FP16, 64),
    )
]


@pytest.mark.compile_only
@pytest.mark.parametrize(("settings", "dtype", "width"), COMPILED)
def test_products_stay_asynchronous(
    settings: SparseAttentionSettings, dtype: torch.dtype, width: int, tmp_path: Path
) -> None:
    """No spills; all launch registers are there to share out; no wait between a group's products.

    The assembler, where it cannot prove that registers are left alone, waits after every single product.
    """
    binary = nvrtc.compile_for(kernel.source(dtype, width, settings), "sm_90a")
    used = nvrtc.usage(binary, tmp_path)["sparse_attention"]
    assert used.stack_bytes == used.local_bytes == 0
    assert used.registers == kernel.launch_registers(settings)
    (tmp_path / "kernel.cubin").write_bytes(binary)
    command = [nvrtc.cuobjdump(), "--dump-sass", str(tmp_path / "kernel.cubin")]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    products = len(re.findall(r"\bHGMMA\.", sass))
    assert products == 2 * (width // 16 + settings.block_columns // 16)
    assert len(re.findall(r"WARPGROUP\.DEPBAR", sass)) <= 6
    assert len(re.findall(r"WARPGROUP\.ARRIVE", sass)) <= 5

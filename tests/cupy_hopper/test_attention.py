"""The Hopper column-sparse attention kernel without a GPU: run by fibers, compiled, and its settings."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

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
def folder(compiled: Path) -> Path:
    return compiled


class FewBlocks(Emulator):
    """No more blocks than the launch asks for: this kernel's find work for each."""

    def launch(
        self,
        kernel: Any,
        device: torch.device,
        blocks: int,
        threads: int,
        *arguments: Any,
        shared_bytes: int = 0,
    ) -> None:
        few = Emulator(self.folder, min(blocks, self.blocks), self.seed)
        few.launch(kernel, device, blocks, threads, *arguments, shared_bytes=shared_bytes)


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, blocks: int, seed: int = 0) -> None:
    """Launches go to the host, `blocks` at a time."""
    emulator = FewBlocks(folder, blocks, seed)
    monkeypatch.setattr(kernel, "load", emulator.load)
    monkeypatch.setattr(kernel, "prepared", emulator.prepared)
    kernel._plan.cache_clear()
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
    # A tile left over for one or two of three blocks: cut by warpgroups, of which some have no row.
    (SparseAttentionSettings(3, 80, 4), (1, 2, 384, 300, 192), 128, BF16, 0.4, 3),
    (SparseAttentionSettings(3, 80, 3, ping_pong=True), (1, 1, 700, 300, 192), 64, FP16, 0.5, 3),
    (SparseAttentionSettings(2, 80, 4), (1, 5, 190, 300, 256), 64, BF16, 0.5, 3),
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


@needs_compiler
def test_calls_that_differ_take_turns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of one kernel: other addresses, with a base and without, other scales, signs and strides."""
    install(monkeypatch, folder, blocks=2)
    settings = SparseAttentionSettings(1, 48, 2)
    columns = scattered_columns(1, 2, 100, 200, 64)
    for strided in (False, True, False):
        for seed in (1, 2):
            q, k, v = attention_inputs(1, 2, 100, 200, 64, dtype=BF16, strided=strided, seed=seed)
            for base, sign, scale in ((None, 1, 0.1), (q, -1, 0.1), (None, -1, 0.2), (k[:, :, :100], 1, 0.2)):
                got = run(kernel.sparse_attention, q, k, v, columns, base, sign, scale, settings)
                check_sparse(got, q, k, v, columns, base, sign, scale)
    assert kernel._plan.cache_info().misses == 8
    assert kernel._plan.cache_info().hits == 16


@needs_compiler
def test_copies_keep_the_order_of_the_queries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, folder, blocks=2)
    q, k, v = (randn(1, 100, 2, 70, dtype=BF16, seed=i).transpose(1, 2)[..., 3:67] for i in range(3))
    columns = scattered_columns(1, 2, 100, 100, 64)
    got = run(kernel.sparse_attention, q, k, v, columns, None, 1, 0.1, SparseAttentionSettings(1, 48, 2))
    check_sparse(got, q, k, v, columns, None, 1, 0.1)
    assert got[0].stride() == (12800, 64, 128, 1)


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


@pytest.mark.parametrize("rows", [1, 64, 128, 191, 192, 193, 4352, 4480])
@pytest.mark.parametrize("group_size", [64, 100, 128, 192, 256])
@pytest.mark.parametrize("pairs", [1, 5, 24])
def test_shares_cover_every_row_once(rows: int, group_size: int, pairs: int) -> None:
    """The kernel's arithmetic of units; no more parts with rows than blocks among the tiles left over."""
    for consumers, blocks in ((1, 7), (2, 5), (3, 4), (2, 132), (3, 132)):
        tiles = -(-group_size // (64 * consumers))
        groups = -(-rows // group_size)
        total = pairs * groups * tiles
        whole, units = kernel.share_out(pairs, groups * tiles, rows, tiles, group_size, consumers, blocks)
        assert whole == units == total or whole == total - total % blocks
        seen = torch.zeros(pairs, rows, dtype=torch.int32)
        late: dict[int, int] = {}
        for unit in range(units):
            pair, first, limit = place(unit, whole, total, pairs, groups, tiles, rows, group_size, consumers)
            seen[pair, first:limit] += 1
            if unit >= whole and first < limit:
                late[unit % blocks] = late.get(unit % blocks, 0) + 1
        assert bool((seen == 1).all())
        assert units - whole <= blocks or sum(late.values()) <= blocks


def place(
    unit: int, whole: int, total: int, pairs: int, groups: int, tiles: int, rows: int, group_size: int,
    consumers: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Pair, first row and limit of a unit, as `Place` has them."""
    tile, part, tall = unit, 0, 64 * consumers
    if unit >= whole:
        part, tile = divmod(unit - whole, total - whole)
        tile, tall = tile + whole, 64
    others = groups * tiles - 1
    pair, rest = tile - pairs * others, others
    if pair < 0:
        pair, rest = divmod(tile, others)
    group = rest // tiles
    first = group * group_size + rest % tiles * 64 * consumers + part * 64
    return pair, first, min((group + 1) * group_size, rows, first + tall)


def test_what_is_left_over_of_short_problems_is_cut() -> None:
    """24 heads on 132 multiprocessors: 4352 rows leave 24 tiles of 128 rows, 4480 24 whole ones besides."""
    assert kernel.share_out(24, 23, 4352, 1, 192, 3, 132) == (528, 528 + 3 * 24)
    assert kernel.share_out(24, 24, 4480, 1, 192, 3, 132) == (528, 528 + 3 * 48)
    assert kernel.share_out(24, 34, 4352, 1, 128, 2, 132) == (792, 792 + 2 * 24)
    assert kernel.share_out(24, 618, 118656, 1, 192, 3, 132) == (14832, 14832), "no room for 144 parts"


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

"""colsum_attention.cu and its host code, run on the host, against the float64 reference.

Its blocks run as they would on a device, down to fragments, swizzles, barrier phases and the order in which
the helper adds up; copies and products are carried out as late, and in as random an order, as they may.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy.module import Source
from chipmunk_kernels.backends.cupy_hopper import colsum_attention as hopper
from chipmunk_kernels.backends.cupy_hopper import dense_attention as dense
from chipmunk_kernels.backends.cupy_hopper import tensor_maps
from chipmunk_kernels.backends.cupy_hopper.colsum_attention import ColsumAttentionSettings
from chipmunk_kernels.backends.cupy_hopper.dense_attention import DenseAttentionSettings
from chipmunk_kernels.problem import Problem
from reference import attention as truth
from tests.cupy_backend.emulate import COMPILER
from tests.cupy_hopper.emulate import HEADER, Emulator
from tests.factories import attention_inputs
from tests.triton_attention.cases import check, run

MORE = Path(__file__).parent / "colsum_on_host.h"
FAST = ColsumAttentionSettings()
NARROW = ColsumAttentionSettings(64, 4, True)


class AttentionEmulator(Emulator):
    """For a kernel with one argument, a struct by value; all blocks run at once."""

    def launch(
        self,
        kernel: Any,
        device: torch.device,
        blocks: int,
        threads: int,
        *arguments: Any,
        shared_bytes: int = 0,
    ) -> None:
        packed = ctypes.create_string_buffer(arguments[0], len(arguments[0]))
        address = (ctypes.c_longlong * 1)(ctypes.addressof(packed))
        seed = ctypes.c_ulonglong(self.seed + 1)
        stuck = kernel(address, blocks, threads, shared_bytes, seed)
        assert not stuck, f"deadlock with seed {self.seed}"

    def _code(self, source: Source, name: str) -> str:
        text = (source.folder / source.file).read_text(encoding="utf-8")
        text = text.replace('#include "hopper.cuh"', HEADER.read_text() + MORE.read_text())
        shared = "extern __shared__ __align__(ATOM_BYTES) unsigned char memory[];"
        assert shared in text
        text = text.replace(shared, "unsigned char* memory = here().memory.data();")
        return f"""{text}
            static Arguments given;
            extern "C" int run_{name}(
                const long long* address, int count, int threads, int bytes, unsigned long long seed) {{
                std::memcpy(&given, reinterpret_cast<const void*>(address[0]), sizeof given);
                return run_blocks([] {{ {name}(given); }}, count, threads, bytes, seed);
            }}
        """


def host_map(
    address: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], box_rows: int
) -> bytes:
    """What the driver's encoder is asked for, as colsum_on_host.h reads it."""
    assert all(0 < stride < 2**40 and stride % 16 == 0 for stride in strides) and address % 16 == 0
    assert all(0 < size < 2**32 for size in sizes) and 0 < box_rows <= 256
    return struct.pack("<Q4Q3QI60x", address, *sizes, *strides, box_rows)


@pytest.fixture(scope="module")
def folder(compiled: Path) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler on PATH")
    return compiled


@pytest.fixture(autouse=True)
def _on_the_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = AttentionEmulator(folder, 0)
    monkeypatch.setattr(hopper, "load", emulator.load)
    monkeypatch.setattr(hopper, "prepared", emulator.prepared)
    hopper._plan.cache_clear()
    monkeypatch.setattr(tensor_maps, "_encode", host_map)
    tensor_maps._map.cache_clear()
    hopper._kernel.cache_clear()


def check_colsum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    key_length: int | Tensor | None = None,
    scale: float = 0.1,
    settings: ColsumAttentionSettings = FAST,
    drift: float = 0.25,
) -> None:
    """Against normalisers `drift` off the true ones; keys and values past the key length may be NaN."""
    k0, v0 = k.nan_to_num(), v.nan_to_num()
    prev = truth.dense_attention(q.double(), k0.double(), v0.double(), None, scale)[1].float() + drift
    got = run(hopper.colsum_attention, q, k, v, prev, group_size, key_length, scale, settings)
    arguments = prev, group_size, key_length, scale
    exact = truth.colsum_attention(q.double(), k0.double(), v0.double(), *arguments)
    check(got, exact, truth.colsum_attention(q, k0, v0, *arguments), q.dtype)


def check_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_length: int | None,
    settings: DenseAttentionSettings,
    scale: float = 0.1,
) -> None:
    got = run(dense.dense_attention, q, k, v, key_length, scale, settings)
    exact = truth.dense_attention(q.double(), k.double(), v.double(), key_length, scale)
    check(got, exact, truth.dense_attention(q, k, v, key_length, scale), q.dtype)


@pytest.mark.parametrize(
    ("group_size", "rows", "columns", "settings"),
    [
        (192, 230, 150, FAST),  # a ragged group, a ragged tile
        (192, 192, 256, NARROW),
        (192, 100, 200, ColsumAttentionSettings(96, 2, True)),
        (192, 192, 130, ColsumAttentionSettings(64, 4, False)),
        (128, 130, 200, FAST),  # two warpgroups
        (128, 100, 129, ColsumAttentionSettings(128, 2, False)),
        (128, 128, 196, ColsumAttentionSettings(96, 2, True)),
        (64, 130, 70, NARROW),  # three groups in a block, the last of them ragged
        (256, 256, 140, FAST),  # two chunks of a group: sums are added to what the first left
        (100, 150, 65, FAST),  # a group that ends inside a warpgroup's rows
    ],
    ids=str,
)
def test_groups_and_tiles(
    group_size: int, rows: int, columns: int, settings: ColsumAttentionSettings
) -> None:
    q, k, v = attention_inputs(1, 1, rows, columns, 128, dtype=torch.bfloat16)
    check_colsum(q, k, v, group_size, settings=settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("drift", [0.25, 60.0, -60.0])
def test_normalisers_far_off(dtype: torch.dtype, drift: float) -> None:
    """Weights against them leave the range: the groups are done again with running maxima."""
    q, k, v = attention_inputs(1, 1, 140, 130, 64, dtype=dtype)
    check_colsum(q, k, v, 64, drift=drift, settings=NARROW)
    check_colsum(q, k, v, 128, drift=drift)


def test_a_group_of_two_chunks_done_again() -> None:
    """Sums that the first attempt has left are replaced, not added to."""
    q, k, v = attention_inputs(1, 1, 256, 70, 64, dtype=torch.bfloat16)
    check_colsum(q, k, v, 256, drift=60.0)


def test_lengths_batches_and_strides() -> None:
    """Key lengths on the device, none among them, over keys and values that are NaN past them."""
    q, k, v = attention_inputs(3, 2, 70, 140, 64, dtype=torch.bfloat16, strided=True)
    lengths = torch.tensor([140, 0, 77], dtype=torch.int32)
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    check_colsum(q, k, v, 128, lengths)
    check_colsum(q, k, v, 64, lengths, settings=NARROW)


@pytest.mark.parametrize("scale", [-0.1, 0.0, 2.5])
def test_any_scale(scale: float) -> None:
    q, k, v = attention_inputs(1, 1, 65, 66, 64, dtype=torch.float16)
    check_colsum(q, k, v, 64, 60, scale)


def test_rows_that_a_map_cannot_describe() -> None:
    """Rows 2 bytes off alignment, and one key row for all: copied first."""
    q, k, v = attention_inputs(1, 1, 66, 67, 64, dtype=torch.bfloat16)
    odd = torch.cat([q.new_zeros(1, 1, 66, 1), q], 3)[..., 1:]
    check_colsum(odd, k[:, :, :1].expand_as(k), v, 64)


@pytest.mark.parametrize("key_length", [None, 0, 130])
@pytest.mark.parametrize(
    "settings", [DenseAttentionSettings(), DenseAttentionSettings(3, 96, 2, False)], ids=["two", "three"]
)
def test_dense(settings: DenseAttentionSettings, key_length: int | None) -> None:
    q, k, v = attention_inputs(1, 2, 140, 200, 128, dtype=torch.bfloat16)
    check_dense(q, k, v, key_length, settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dense_logits_that_outgrow_the_first_tile(dtype: torch.dtype) -> None:
    """The last columns are taken first; those before them are 100 times as large."""
    q, k, v = attention_inputs(1, 1, 70, 140, 64, dtype=dtype)
    k[:, :, :64] *= 100
    check_dense(q, k, v, None, DenseAttentionSettings())


def test_calls_that_differ_take_turns() -> None:
    """Plans of one kernel: other addresses, key lengths, scales and group sizes."""
    lengths = torch.tensor([50], dtype=torch.int32)
    for _ in range(2):
        for seed in (1, 2):
            q, k, v = attention_inputs(1, 1, 70, 90, 64, dtype=torch.bfloat16, seed=seed)
            check_colsum(q, k, v, 64, settings=NARROW)
            check_colsum(q, k, v, 64, 33, settings=NARROW)
            check_colsum(q, k, v, 64, lengths, 0.2, settings=NARROW)
            check_colsum(q, k, v, 60, 33, settings=NARROW)
    assert hopper._plan.cache_info().misses == 4


def test_nothing_to_attend_to() -> None:
    q, k, v = attention_inputs(1, 2, 70, 90, 64, dtype=torch.bfloat16)
    check_colsum(q, k[:, :, :0], v[:, :, :0], 64, settings=NARROW)
    none = q[:, :, :0]
    out, lse, mass = hopper.colsum_attention(none, k, v, torch.zeros(1, 2, 0), 64, None, 0.1, NARROW)
    assert out.shape == none.shape
    assert lse.shape == (1, 2, 0)
    assert mass.shape == (1, 2, 0, 90)


def same_bits(call: Callable[[], tuple[Tensor, ...]], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    first = call()
    for seed in (1, 2):
        emulator = AttentionEmulator(folder, 0, seed)
        monkeypatch.setattr(hopper, "prepared", emulator.prepared)
        hopper._plan.cache_clear()
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


@pytest.mark.parametrize("settings", [FAST, NARROW], ids=["in turn", "overlapped"])
@pytest.mark.parametrize("group_size", [192, 128])
def test_same_bits_in_any_order(
    group_size: int, settings: ColsumAttentionSettings, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    q, k, v = attention_inputs(1, 1, 192, 400, 64, dtype=torch.bfloat16)
    prev = torch.full((1, 1, 192), 6.5)
    same_bits(
        lambda: hopper.colsum_attention(q, k, v, prev, group_size, None, 0.1, settings), monkeypatch, folder
    )


def test_every_lane_may_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """As racecheck has it: the same bits as of one lane for its warp."""
    q, k, v = attention_inputs(1, 1, 192, 300, 128, dtype=torch.bfloat16)
    lse = truth.dense_attention(q.float(), k.float(), v.float())[1]
    by_one = hopper.colsum_attention(q, k, v, lse, 192, None, 0.1, FAST)
    monkeypatch.setenv("CHIPMUNK_RACECHECK", "1")
    hopper._plan.cache_clear()
    hopper._kernel.cache_clear()
    assert dict(hopper.source(torch.bfloat16, 128, FAST.shape(192)).defines)["EVERY_LANE"] == 1
    by_all = hopper.colsum_attention(q, k, v, lse, 192, None, 0.1, FAST)
    assert all(torch.equal(a, b) for a, b in zip(by_one, by_all, strict=True))


def test_settings_say_what_does_not_fit() -> None:
    problem = Problem("colsum_attention", rows=4480, columns=4480, width=128, heads=24, group_size=192)
    assert FAST.misfit(problem) is None
    assert "nothing overlaps" in str(replace(FAST, overlap=False).misfit(problem))
    assert replace(FAST, overlap=False).misfit(replace(problem, group_size=128)) is None
    assert "shared memory" in str(replace(FAST, stages=4).misfit(problem))
    dense_problem = replace(problem, operation="dense_attention")
    assert DenseAttentionSettings().misfit(dense_problem) is None
    assert "registers" in str(DenseAttentionSettings(3, 128, 2, False).misfit(dense_problem))
    assert "registers" in str(DenseAttentionSettings(3, 96, 2, True).misfit(dense_problem))
    assert hopper.unsupported(torch.bfloat16, 128) is None
    assert "32" in str(hopper.unsupported(torch.float16, 32))
    assert "float32" in str(hopper.unsupported(torch.float32, 64))

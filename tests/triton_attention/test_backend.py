"""The Triton backend as dispatch and the tuner see it: availability, registry, settings, public operators."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

import chipmunk_kernels as ck
from chipmunk_kernels.backends import triton as backend
from chipmunk_kernels.backends.triton.colsum_attention import ColsumAttentionSettings
from chipmunk_kernels.backends.triton.dense_attention import DenseAttentionSettings
from chipmunk_kernels.backends.triton.launch import tile_rows, tile_warps, unsupported_attention
from chipmunk_kernels.backends.triton.sparse_attention import SparseAttentionSettings, launches
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.settings import LaunchSettings
from reference import attention as truth
from tests.factories import attention_inputs, randn, scattered_columns
from tests.triton_attention.cases import DEVICE, EXACT, check, check_sparse

SETTINGS: dict[str, type[LaunchSettings]] = {
    "dense_attention": DenseAttentionSettings,
    "colsum_attention": ColsumAttentionSettings,
    "sparse_attention": SparseAttentionSettings,
}


def flux(operation: str, group_size: int = 128) -> Problem:
    return Problem(
        operation, rows=4352, columns=4352, width=128, heads=24, group_size=group_size, density=0.165
    )


def test_every_file_is_found_by_operation() -> None:
    found = backend.kernels()
    assert set(SETTINGS) < set(found)
    for operation, kernel in found.items():
        assert (kernel.operation, kernel.backend) == (operation, "triton")
    for operation, settings in SETTINGS.items():
        assert found[operation].settings is settings


def test_says_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.unavailable(cpu) is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "NVIDIA GPU" in (backend.unavailable(cpu) or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "Tesla T4 has 7.5" in (backend.unavailable(cuda) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert backend.unavailable(cuda) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees none" in (backend.unavailable(cuda) or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in (backend.unavailable(cuda) or "")


def test_float32_is_for_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unsupported_attention(torch.bfloat16, 128) is None
    assert "head dimensions" in (unsupported_attention(torch.bfloat16, 96) or "")
    assert "float64" in (unsupported_attention(torch.float64, 64) or "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert unsupported_attention(torch.float32, 64) is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "float32" in (unsupported_attention(torch.float32, 64) or "")


@pytest.mark.parametrize("operation", SETTINGS)
def test_the_default_fits_and_every_value_can_win(operation: str) -> None:
    """The default runs in the 99 KiB of the smallest GPUs; every value of the space fits with some others."""
    settings = SETTINGS[operation]
    assert settings().misfit(flux(operation), 99 * 1024) is None
    for field, values in settings.space().items():
        for value in values:
            tried = [
                settings.from_mapping({**others, field: value}).misfit(flux(operation, 256), 227 * 1024)
                for others in (
                    {},
                    {"overlap": False},
                    {"max_registers": 0},
                    {"num_warps": 4, "block_m": 64},
                    {"mass_keys": 128},
                )
                if set(others) <= set(settings.space())
            ]
            assert None in tried, f"{field}={value}: {tried}"


def test_misfit_names_the_reason() -> None:
    problem = flux("sparse_attention")
    big = SparseAttentionSettings(block_n=128, num_stages=5, max_registers=0)
    assert "shared memory" in (big.misfit(problem, 99 * 1024) or "")
    assert big.misfit(problem) is None, "nothing known of the device: nothing to hold against it"
    assert "taller" in (SparseAttentionSettings().misfit(flux("sparse_attention", 64)) or "")
    assert "warps" in (SparseAttentionSettings(block_m=64, num_warps=8).misfit(problem) or "")
    assert "of a thread's 255 registers" in (
        SparseAttentionSettings(block_n=128, num_warps=4, max_registers=0).misfit(problem) or ""
    )
    assert "of a thread's 128 registers" in (
        SparseAttentionSettings(block_n=128, max_registers=128).misfit(problem) or ""
    )
    tall = SparseAttentionSettings(block_m=256, max_registers=0, overlap=True)
    assert "in 224 of a thread's 255" in (tall.misfit(flux("sparse_attention", 192)) or ""), "weights wait"
    assert replace(tall, overlap=False).misfit(flux("sparse_attention", 192)) is None
    assert DenseAttentionSettings().misfit(flux("dense_attention", 1)) is None, "dense has no groups"


def test_tiles_shrink_to_their_rows() -> None:
    assert [tile_rows(128, rows) for rows in (1, 16, 17, 64, 65, 128, 129)] == [16, 16, 32, 64, 128, 128, 128]
    assert [tile_warps(8, rows) for rows in (16, 32, 64, 128)] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("group_size", "plan"),
    [
        (128, [(0, 1, 128, 64)]),
        (192, [(0, 1, 128, 64), (128, 1, 64, 32)]),
        (256, [(0, 2, 128, 64)]),
        (48, [(0, 1, 64, 32)]),
        (300, [(0, 2, 128, 64), (256, 1, 64, 32)]),
    ],
)
def test_every_row_of_a_group_has_its_tile(group_size: int, plan: list[tuple[int, int, int, int]]) -> None:
    assert launches(group_size, SparseAttentionSettings(block_m=128, block_n=64)) == plan


def test_public_operators_reach_the_kernels() -> None:
    q, k, v = attention_inputs(1, 2, 70, width=64, dtype=EXACT, device=DEVICE, strided=True)
    exact = truth.dense_attention(q.double(), k.double(), v.double(), 50)
    dense = ck.dense_attention(q, k, v, key_length=50, backend="triton")
    check(dense, exact, truth.dense_attention(q, k, v, 50), EXACT)

    prev = dense[1]
    got = ck.colsum_attention(q, k, v, prev, 64, backend="triton")
    masses = truth.colsum_attention(q.double(), k.double(), v.double(), prev.double(), 64)
    check(got, masses, truth.colsum_attention(q, k, v, prev, 64), EXACT)

    columns = scattered_columns(1, 2, 70, 70, 64, device=DEVICE)
    base = randn(1, 2, 70, 64, dtype=EXACT, device=DEVICE)
    settings = SparseAttentionSettings(block_m=64, block_n=32, num_warps=4)
    out = ck.sparse_attention(
        q, k, v, columns, base=base, sign=-1, return_lse=True, backend="triton", settings=settings
    )
    assert isinstance(out, tuple)
    check_sparse(out, q, k, v, columns, base, -1, 64**-0.5)

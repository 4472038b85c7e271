"""Hopper's dense attention and column sums on a GPU: real tiles, ragged shapes, streams, graphs, devices."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import chipmunk_kernels as ck
from chipmunk_kernels import registry
from chipmunk_kernels.backends.cupy_hopper.colsum_attention import ColsumAttentionSettings, colsum_attention
from chipmunk_kernels.backends.cupy_hopper.dense_attention import DenseAttentionSettings
from suites.benchmarks.bars.costs import launch_cost
from tests.cupy_hopper.test_colsum import check_colsum, check_dense
from tests.factories import attention_inputs
from tests.triton_attention.cases import fused_qkv
from tests.triton_mlp.cases import on_side_stream, replay

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")
HALVES = (torch.bfloat16, torch.float16)
DEFAULT = ColsumAttentionSettings()
SETTINGS = (
    ColsumAttentionSettings(128, 2, False),
    ColsumAttentionSettings(96, 2, True),
    ColsumAttentionSettings(64, 4, True),
    ColsumAttentionSettings(64, 2, False),
)
DENSE_SETTINGS = (
    DenseAttentionSettings(2, 128, 2, False),
    DenseAttentionSettings(3, 96, 2, False),
    DenseAttentionSettings(3, 64, 4, True),
)

Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    reason = registry.unavailable("cupy_hopper", CUDA)
    if reason is not None:
        pytest.skip(reason)


def calls(lse_prev: Tensor, group_size: int = 192) -> dict[str, Call]:
    """Each operation through its public operator, as a function of q, k and v alone."""
    hopper = "cupy_hopper"
    return {
        "dense": lambda q, k, v: ck.dense_attention(q, k, v, backend=hopper),
        "colsum": lambda q, k, v: ck.colsum_attention(q, k, v, lse_prev, group_size, backend=hopper),
    }


def flux_inputs(seed: int = 0, heads: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = attention_inputs(1, heads, 700, width=128, dtype=torch.bfloat16, device=CUDA, seed=seed)
    return q, k, v, torch.full((1, heads, 700), 7.0, device=CUDA)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("group_size", [64, 100, 128, 192, 256])
def test_over_sizes(group_size: int, width: int, dtype: torch.dtype) -> None:
    for rows, batch in itertools.product((1, 63, 64, 191, 193, 300), (1, 3)):
        q, k, v = attention_inputs(batch, 2, rows, rows + 9, width, dtype=dtype, device=CUDA, seed=rows)
        check_colsum(q, k, v, group_size)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.as_dict().values())))
@pytest.mark.parametrize("group_size", [128, 192])
def test_any_settings(group_size: int, settings: ColsumAttentionSettings) -> None:
    q, k, v = attention_inputs(1, 2, 700, 1001, 128, dtype=torch.bfloat16, device=CUDA)
    check_colsum(q, k, v, group_size, settings=settings)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_dense_over_sizes(width: int, dtype: torch.dtype) -> None:
    for rows, length in itertools.product((1, 63, 64, 191, 193), (None, 0, 1)):
        q, k, v = attention_inputs(2, 2, rows, width=width, dtype=dtype, device=CUDA, seed=rows)
        check_dense(q, k, v, length, DenseAttentionSettings())


@pytest.mark.parametrize("settings", DENSE_SETTINGS, ids=lambda s: "-".join(map(str, s.as_dict().values())))
def test_any_dense_settings(settings: DenseAttentionSettings) -> None:
    q, k, v = attention_inputs(1, 2, 700, 1001, 128, dtype=torch.bfloat16, device=CUDA)
    check_dense(q, k, v, None, settings)


@pytest.mark.parametrize("rows", [4352, 4480])
@pytest.mark.parametrize("group_size", [128, 192])
def test_flux_sized(group_size: int, rows: int) -> None:
    q, k, v = attention_inputs(1, 2, rows, width=128, dtype=torch.bfloat16, device=CUDA, strided=True)
    check_colsum(q, k, v, group_size, scale=128**-0.5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("drift", [0.25, 8.0, -8.0, 60.0, -60.0])
def test_normalisers_far_off(drift: float, dtype: torch.dtype) -> None:
    """Groups are done again with running maxima where weights leave the range, also in several chunks."""
    q, k, v = attention_inputs(1, 2, 600, 700, 128, dtype=dtype, device=CUDA)
    for group_size in (128, 192, 256):
        check_colsum(q, k, v, group_size, drift=drift)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_large_logits_stay_finite(dtype: torch.dtype) -> None:
    """Logits to ±200."""
    q, k, v = attention_inputs(1, 2, 300, width=128, dtype=dtype, device=CUDA)
    scale = 200.0 / float((q.float() @ k.float().transpose(-1, -2)).abs().max())
    check_colsum(q, k, v, 192, scale=scale)
    check_dense(q, k, v, None, DenseAttentionSettings(), scale)


def test_lengths_on_the_device_and_nan_past_them() -> None:
    q, k, v = fused_qkv(3, 2, 333, 128, torch.bfloat16)
    lengths = torch.tensor([333, 0, 77], dtype=torch.int32, device=CUDA)
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    check_colsum(q, k, v, 192, lengths)


@pytest.mark.parametrize("name", ["dense", "colsum"])
def test_same_bits_every_time(name: str) -> None:
    q, k, v = attention_inputs(1, 4, 4352, width=128, dtype=torch.bfloat16, device=CUDA)
    call = calls(torch.full((1, 4, 4352), 9.0, device=CUDA))[name]
    first = call(q, k, v)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, call(q, k, v), strict=True))


@pytest.mark.parametrize("name", ["dense", "colsum"])
def test_runs_on_the_current_stream(name: str) -> None:
    q, k, v, prev = flux_inputs()
    call = calls(prev)[name]
    expected = call(q, k, v)
    late = torch.full_like(q, torch.nan)
    got: list[Tensor] = []

    def fill_then_run() -> None:
        late.copy_(q)
        got.extend(call(late, k, v))

    on_side_stream(fill_then_run)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["dense", "colsum"])
def test_graph_replay_equals_eager(name: str) -> None:
    q, k, v, prev = flux_inputs()
    call = calls(prev)[name]
    expected = call(q, k, v)
    captured: list[Tensor] = []

    def run() -> None:
        captured[:] = call(q, k, v)

    replay(run)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_the_second_gpu_while_the_first_is_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v, prev = flux_inputs()
    here = colsum_attention(q, k, v, prev, 192, None, 0.1, DEFAULT)
    moved = [x.to("cuda:1") for x in (q, k, v, prev)]
    there = colsum_attention(moved[0], moved[1], moved[2], moved[3], 192, None, 0.1, DEFAULT)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(here, there, strict=True))


def test_a_launch_costs_little() -> None:
    """Host time of a call, kernel left running."""
    q, k, v = attention_inputs(1, 1, 64, width=64, dtype=torch.bfloat16, device=CUDA)
    prev = torch.zeros(1, 1, 64, device=CUDA)
    colsum_attention(q, k, v, prev, 64, None, 0.1, DEFAULT)
    cost = launch_cost(lambda: colsum_attention(q, k, v, prev, 64, None, 0.1, DEFAULT), q.device)
    assert cost.us < 100, cost

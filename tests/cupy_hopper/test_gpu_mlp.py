"""Hopper's sparse MLP on a GPU: ragged and real sizes, repeats, graphs, streams, launch cost."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from chipmunk_kernels import registry
from chipmunk_kernels.backends.cupy_hopper import mlp, tensor_maps
from chipmunk_kernels.backends.cupy_hopper.mlp import SparseMlpSettings
from suites.benchmarks.bars.costs import launch_cost
from tests.cupy_hopper.test_mlp import caches, call
from tests.factories import MlpInputs, assert_within_budget, mlp_inputs
from tests.triton_mlp.cases import HALVES, on_side_stream, poisoned_memory, replay
from tests.triton_mlp.test_gpu import masked_dense

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda:0")
DEFAULT = SparseMlpSettings()
BF16, FP16 = torch.bfloat16, torch.float16
LAUNCH_US, TORCH_LAUNCH_US = 15.0, 6.1
"""On a host that takes no longer than that for a launch of torch's own; others are slower at both."""


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    reason = registry.unavailable("cupy_hopper", GPU)
    if reason is not None:
        pytest.skip(reason)


def run(inputs: MlpInputs, settings: SparseMlpSettings = DEFAULT) -> tuple[Tensor, Tensor]:
    results = caches(inputs)
    with poisoned_memory():
        call(inputs, *results, settings)
    return results


def check(inputs: MlpInputs, settings: SparseMlpSettings = DEFAULT) -> None:
    got = run(inputs, settings)
    exact, peer = masked_dense(inputs, torch.float64), masked_dense(inputs, inputs.x.dtype)
    for name, actual, wanted, other in zip(("activations", "output"), got, exact, peer, strict=True):
        assert_within_budget(actual, wanted, other, name, inputs.x.dtype)


SHAPES: tuple[dict[str, Any], ...] = (
    {"batch": 1, "tokens": 1, "width": 8, "neurons": 16, "group_size": 128},
    {"batch": 1, "tokens": 63, "width": 64, "neurons": 300, "group_size": 128},
    {"batch": 3, "tokens": 193, "width": 72, "neurons": 640, "width_out": 200, "group_size": 64},
    {"batch": 2, "tokens": 1001, "width": 520, "neurons": 1500, "width_out": 712, "group_size": 128},
    {"batch": 1, "tokens": 777, "width": 320, "neurons": 999, "width_out": 1000, "group_size": 192},
    {"batch": 1, "tokens": 600, "width": 256, "neurons": 1024, "group_size": 256, "density": 1.0},
    {"batch": 2, "tokens": 300, "width": 128, "neurons": 512, "group_size": 100},
)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_sizes(shape: dict[str, Any], dtype: torch.dtype) -> None:
    check(mlp_inputs(**shape, dtype=dtype, device=GPU))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "width", "neurons", "group_size"),
    [(3840, 3072, 12288, 128), (4357, 3072, 12288, 128), (1000, 5120, 13824, 192)],
)
def test_real_sizes(tokens: int, width: int, neurons: int, group_size: int, dtype: torch.dtype) -> None:
    check(mlp_inputs(1, tokens, width, neurons, None, group_size, dtype=dtype, device=GPU))


@pytest.mark.parametrize(
    "settings",
    [
        SparseMlpSettings(width=128, stages=6, band=1, lead_waves=1),
        SparseMlpSettings(width=192, band=16, lead_waves=3),
        SparseMlpSettings(band=32, lead_waves=1, adds_in_l2=0),
        SparseMlpSettings(1, 2, 128, 4),
        SparseMlpSettings(width=128, stages=3),
    ],
    ids=str,
)
def test_any_settings(settings: SparseMlpSettings) -> None:
    check(mlp_inputs(2, 1500, 256, 1024, 384, 128, dtype=BF16, device=GPU), settings)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_wide_output_and_no_bias(dtype: torch.dtype) -> None:
    inputs = mlp_inputs(2, 1001, 512, 2048, 520, 128, dtype=dtype, device=GPU)
    plain = dataclasses.replace(inputs, b1=torch.zeros_like(inputs.w1[:, 0]))
    ours = dataclasses.replace(inputs, b1=None, output_cache=inputs.output_cache.float())
    got = run(ours)
    exact = masked_dense(plain, torch.float64)
    peer = masked_dense(plain, dtype)
    assert_within_budget(got[0], exact[0], peer[0], "activations", dtype)
    assert_within_budget(got[1], exact[1], peer[1], "output", dtype)


def test_strides_of_a_larger_tensor() -> None:
    inputs = mlp_inputs(2, 1000, 512, 2048, 512, 128, dtype=BF16, device=GPU)

    def inside(tensor: Tensor) -> Tensor:
        """The same values as a view: one more row, eight more in a row."""
        shape = [*tensor.shape[:-2], tensor.shape[-2] + 1, tensor.shape[-1] + 8]
        larger = torch.full(shape, float("nan"), dtype=tensor.dtype, device=GPU)
        view = larger[..., : tensor.shape[-2], : tensor.shape[-1]]
        return view.copy_(tensor)

    expected = run(inputs)
    strided = dataclasses.replace(
        inputs, x=inside(inputs.x), w1=inside(inputs.w1), w2_by_neuron=inside(inputs.w2_by_neuron)
    )
    results = inside(inputs.activation_cache), inside(inputs.output_cache)
    call(strided, *results, DEFAULT)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


def test_repeats_graphs_and_streams_are_bit_identical() -> None:
    inputs = mlp_inputs(1, 3000, 512, 2048, dtype=BF16, group_size=128, device=GPU)
    first = run(inputs)
    for _ in range(3):
        again = run(inputs)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])

    captured = caches(inputs)

    def refresh_and_call() -> None:
        captured[0].copy_(inputs.activation_cache)
        captured[1].copy_(inputs.output_cache)
        call(inputs, *captured, DEFAULT)

    replay(refresh_and_call)
    assert torch.equal(first[0], captured[0])
    assert torch.equal(first[1], captured[1])

    late = dataclasses.replace(inputs, x=torch.full_like(inputs.x, float("nan")))
    aside = caches(inputs)

    def fill_then_call() -> None:
        late.x.copy_(inputs.x)
        call(late, *aside, DEFAULT)

    on_side_stream(fill_then_call)
    assert torch.equal(first[0], aside[0])
    assert torch.equal(first[1], aside[1])


def test_mostly_empty_groups() -> None:
    """Groups that share a place in the ring with nothing but empty ones between them, at work at once."""
    inputs = mlp_inputs(1, 128 * 400, 256, 2048, dtype=BF16, group_size=128, device=GPU)
    columns = inputs.columns
    ring = mlp.order(DEFAULT, 400, columns.capacity, 256, 128, mlp._multiprocessors(GPU)).ring
    assert 2 * ring < 400
    some = torch.arange(400, device=GPU) % (2 * ring) == 1
    counts = torch.where(some, columns.counts, 0)
    check(dataclasses.replace(inputs, columns=dataclasses.replace(columns, counts=counts)))


def test_a_thread_that_has_not_used_the_device() -> None:
    inputs = mlp_inputs(1, 300, 256, 1024, dtype=BF16, group_size=128, device=GPU)
    expected = run(inputs)
    results = caches(inputs)
    mlp._plan.cache_clear()
    tensor_maps._map.cache_clear()
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call, inputs, *results, DEFAULT).result()
    torch.cuda.synchronize()
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


def test_shapes_take_turns_on_a_stream() -> None:
    """Each finds its counters as the launch before left them."""
    shapes = (1000, 1500, 1000, 300)
    inputs = [mlp_inputs(1, tokens, 256, 1024, dtype=BF16, group_size=128, device=GPU) for tokens in shapes]
    expected = [run(each) for each in inputs]
    for _ in range(3):
        for each, (activations, output) in zip(inputs, expected, strict=True):
            got = run(each)
            assert torch.equal(got[0], activations)
            assert torch.equal(got[1], output)


def test_two_at_once_share_the_multiprocessors() -> None:
    """Blocks wait for tiles of others: launches that take turns on the device must still all end."""
    inputs = mlp_inputs(1, 3000, 512, 2048, dtype=BF16, group_size=128, device=GPU)
    expected = run(inputs)
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = [caches(inputs) for _ in streams]
    torch.cuda.synchronize()
    for stream, result in zip(streams, results, strict=True):
        with torch.cuda.stream(stream):
            call(inputs, *result, DEFAULT)
    torch.cuda.synchronize()
    for result in results:
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1])


def test_launch_costs_little() -> None:
    inputs = mlp_inputs(1, 256, 64, 128, dtype=BF16, group_size=128, device=GPU)
    results = caches(inputs)
    call(inputs, *results, DEFAULT)
    cost = launch_cost(lambda: call(inputs, *results, DEFAULT), GPU)
    assert cost.us <= LAUNCH_US * max(1.0, cost.torch_us / TORCH_LAUNCH_US), cost
    assert mlp._plan.cache_info().hits > 0

"""The MLP and gather kernels on a GPU: real sizes, repeats, graphs, streams."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from chipmunk_kernels.backends.torch import gather as peer
from chipmunk_kernels.backends.torch import mlp as peer_mlp
from chipmunk_kernels.backends.triton.bias_gelu import BiasGeluSettings, bias_gelu
from chipmunk_kernels.backends.triton.gather import (
    GatherSettings,
    GroupMeanSettings,
    gather_columns,
    group_mean,
    scatter_columns,
)
from chipmunk_kernels.backends.triton.mlp import SparseMlpSettings, sparse_mlp
from reference.mlp import bias_gelu as true_bias_gelu
from tests.factories import MlpInputs, assert_within_budget, mlp_inputs, randn, scattered_columns
from tests.triton_mlp.cases import HALVES, on_side_stream, poisoned_memory, replay
from tests.triton_mlp.test_mlp import check

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
DEFAULT = SparseMlpSettings()


def caches(inputs: MlpInputs) -> tuple[Tensor, Tensor]:
    return inputs.activation_cache.clone(), inputs.output_cache.clone()


def call(
    inputs: MlpInputs, activations: Tensor, output: Tensor, settings: SparseMlpSettings = DEFAULT
) -> None:
    sparse_mlp(
        inputs.x,
        inputs.w1,
        inputs.b1,
        inputs.w2_by_neuron,
        inputs.columns,
        activations,
        output,
        "gelu_tanh",
        settings,
    )


def masked_dense(inputs: MlpInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The reference's mathematics in whole-tensor operations: its loops would take minutes at this size."""
    x, w1, b1, w2 = (t.to(dtype) for t in (inputs.x, inputs.w1, inputs.b1, inputs.w2_by_neuron))
    fresh = torch.nn.functional.gelu(torch.nn.functional.linear(x, w1, b1), approximate="tanh").transpose(
        1, 2
    )
    mask = inputs.columns.to_mask(w1.shape[0])[:, 0].repeat_interleave(inputs.columns.group_size, dim=1)
    mask = mask[:, : x.shape[1]].transpose(1, 2)
    old = inputs.activation_cache.to(dtype)
    delta = torch.where(mask, fresh - old, 0)
    return torch.where(mask, fresh, old), inputs.output_cache.to(dtype) + delta.transpose(1, 2) @ w2


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "width", "neurons", "group_size"),
    [(3840, 3072, 12288, 128), (4357, 3072, 12288, 128), (1000, 5120, 13824, 192)],
)
def test_real_sizes(tokens: int, width: int, neurons: int, group_size: int, dtype: torch.dtype) -> None:
    inputs = mlp_inputs(1, tokens, width, neurons, None, group_size, dtype=dtype, device=GPU)
    activations, output = caches(inputs)
    with poisoned_memory():
        call(inputs, activations, output)
    exact, plain = masked_dense(inputs, torch.float64), masked_dense(inputs, dtype)
    assert_within_budget(activations, exact[0], plain[0], "activations")
    assert_within_budget(output, exact[1], plain[1], "output")


@pytest.mark.parametrize(
    "settings",
    [
        SparseMlpSettings(up_columns=256, down_width=256, band=8),
        SparseMlpSettings(up_columns=256, up_stages=4, down_width=256, down_stages=4, prefetch=1, halve=0),
        SparseMlpSettings(up_registers=128, up_stages=4, down_stages=4, band=128),
        SparseMlpSettings(
            up_columns=64, up_depth=128, up_warps=4, up_stages=2, down_depth=32, down_tokens=64, down_warps=4
        ),
    ],
    ids=str,
)
def test_any_settings(settings: SparseMlpSettings) -> None:
    check(mlp_inputs(2, 300, 256, 1024, 384, 128, dtype=torch.bfloat16, device=GPU), settings)


@pytest.mark.parametrize("width", [100, 257])
def test_unaligned_widths(width: int) -> None:
    check(mlp_inputs(1, 131, width, 500, width + 3, 100, dtype=torch.bfloat16, device=GPU), DEFAULT)


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("halve", [0, 1])
def test_halved_tiles_of_a_short_last_wave(columns: int, halve: int) -> None:
    shape = (1, 3840, 256, 4096, 256, 128, 5 * columns / 4096)  # 150 tiles: 18 in the second wave of an H200
    inputs = mlp_inputs(*shape, uniform=True, dtype=torch.bfloat16, device=GPU)
    activations, output = caches(inputs)
    call(inputs, activations, output, SparseMlpSettings(up_columns=columns, halve=halve, prefetch=1))
    exact, plain = masked_dense(inputs, torch.float64), masked_dense(inputs, torch.bfloat16)
    assert_within_budget(activations, exact[0], plain[0], "activations")
    assert_within_budget(output, exact[1], plain[1], "output")


def test_agrees_with_the_torch_backend() -> None:
    inputs = mlp_inputs(2, 1000, 512, 2048, dtype=torch.bfloat16, group_size=128, device=GPU)
    ours, theirs = caches(inputs), caches(inputs)
    call(inputs, *ours)
    peer_mlp.sparse_mlp(
        inputs.x, inputs.w1, inputs.b1, inputs.w2_by_neuron, inputs.columns, *theirs, "gelu_tanh",
        peer_mlp.SparseMlpSettings(),
    )  # fmt: skip
    exact = masked_dense(inputs, torch.float64)
    assert_within_budget(ours[0], exact[0], theirs[0], "activations")
    assert_within_budget(ours[1], exact[1], theirs[1], "output")


def test_repeats_graphs_and_streams_are_bit_identical() -> None:
    inputs = mlp_inputs(1, 1000, 512, 2048, dtype=torch.bfloat16, group_size=128, device=GPU)
    first = caches(inputs)
    call(inputs, *first)
    again = caches(inputs)
    call(inputs, *again)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])

    captured = caches(inputs)

    def refresh_and_call() -> None:
        captured[0].copy_(inputs.activation_cache)
        captured[1].copy_(inputs.output_cache)
        call(inputs, *captured)

    replay(refresh_and_call)
    assert torch.equal(first[0], captured[0])
    assert torch.equal(first[1], captured[1])

    late = dataclasses.replace(inputs, x=torch.full_like(inputs.x, float("nan")))
    aside = caches(inputs)

    def fill_then_call() -> None:
        late.x.copy_(inputs.x)
        call(late, *aside)

    on_side_stream(fill_then_call)
    assert torch.equal(first[0], aside[0])
    assert torch.equal(first[1], aside[1])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gather_and_scatter_at_real_sizes(dtype: torch.dtype) -> None:
    keys = randn(1, 4352, 24, 128, dtype=dtype, device=GPU).transpose(1, 2)
    columns = scattered_columns(1, 24, 4352, 4352, 128, 0.165, uniform=True, device=GPU)
    packed = gather_columns(keys, columns, False, GatherSettings())
    assert torch.equal(packed, peer.gather_columns(keys, columns, False, peer.GatherSettings()))
    table = randn(1, 1, 12288, 3901, dtype=dtype, device=GPU)
    columns = scattered_columns(1, 1, 3901, 12288, 128, device=GPU)
    packed = gather_columns(table, columns, True, GatherSettings())
    assert torch.equal(packed, peer.gather_columns(table, columns, True, peer.GatherSettings()))
    for accumulate in (False, True):
        ours, theirs = table.clone(), table.clone()
        scatter_columns(packed, columns, ours, accumulate, GatherSettings())
        peer.scatter_columns(packed, columns, theirs, accumulate, peer.ScatterSettings())
        assert torch.equal(ours, theirs)


def test_group_mean_at_real_size() -> None:
    x = randn(1, 3901, 3072, dtype=torch.bfloat16, device=GPU)
    mean = group_mean(x, 128, GroupMeanSettings())
    exact = torch.stack([rows.double().mean(1) for rows in x.split(128, dim=1)], dim=1)
    plain = torch.stack([rows.mean(1) for rows in x.split(128, dim=1)], dim=1)
    assert_within_budget(mean, exact, plain)
    assert torch.equal(mean, group_mean(x, 128, GroupMeanSettings()))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", [3840, 3901, 119056])
def test_bias_and_gelu_at_real_sizes(tokens: int, dtype: torch.dtype) -> None:
    """More than 2³¹ elements at the last: offsets are 64 bits wide."""
    neurons = 12288 if tokens < 10_000 else 20_000
    mid = torch.randn(1, neurons, tokens, dtype=dtype, device=GPU)
    bias = randn(neurons, dtype=dtype, device=GPU, seed=1)
    rows = torch.tensor([0, 1, neurons // 2, neurons - 1], device=GPU)
    some, chosen = mid[:, rows], bias[rows]
    bias_gelu(mid, bias, BiasGeluSettings())
    assert_within_budget(
        mid[:, rows], true_bias_gelu(some.double(), chosen.double()), true_bias_gelu(some, chosen)
    )
    assert bool(mid.isfinite().all())

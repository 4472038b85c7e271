"""The sparse MLP, the group mean, and bias with GELU, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chipmunk_kernels import ColumnSet, bias_gelu, group_mean, sparse_mlp
from reference import group_mean as mean_reference
from reference import mlp as reference
from tests.factories import MlpInputs, assert_within_budget, mlp_inputs, randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Supported = Callable[[str, torch.dtype, int], None]


def run_reference(m: MlpInputs, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The reference on the same inputs, in `dtype` or in their own."""

    def cast(x: Tensor) -> Tensor:
        return x if dtype is None else x.to(dtype)

    return reference.sparse_mlp(
        cast(m.x),
        cast(m.w1),
        cast(m.b1),
        cast(m.w2_by_neuron),
        m.columns.indices,
        m.columns.counts,
        m.columns.group_size,
        cast(m.activation_cache),
        cast(m.output_cache),
    )


def run(m: MlpInputs, backend: str) -> tuple[Tensor, Tensor]:
    """The operation on copies of the caches: new activations, new output."""
    activations, output = m.activation_cache.clone(), m.output_cache.clone()
    returned = sparse_mlp(m.x, m.w1, m.b1, m.w2_by_neuron, m.columns, activations, output, backend=backend)
    assert returned is output
    return activations, output


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 63, 64, 191, 193])
@pytest.mark.parametrize("uniform", [True, False])
def test_kept_neurons_are_recomputed_and_their_change_added(
    tokens: int, uniform: bool, dtype: torch.dtype, device: torch.device, backend: str, supported: Supported
) -> None:
    supported("sparse_mlp", dtype, 64)
    m = mlp_inputs(2, tokens, 64, 200, 96, uniform=uniform, dtype=dtype, device=device, seed=tokens)
    truth, peer = run_reference(m, torch.float64), run_reference(m)
    activations, output = run(m, backend)
    assert_within_budget(activations, truth[0], peer[0], "activation cache")
    assert_within_budget(output, truth[1], peer[1], "output cache")


def test_what_is_not_kept_stays_untouched(device: torch.device, backend: str) -> None:
    m = mlp_inputs(2, 130, 64, 200, dtype=torch.float16, device=device)
    activations, output = run(m, backend)
    owner = torch.arange(130, device=device) // 64
    kept = m.columns.to_mask(200)[:, 0, owner].transpose(1, 2)
    assert torch.equal(activations[~kept], m.activation_cache[~kept])
    assert not torch.equal(activations[kept], m.activation_cache[kept])
    empty = m.columns.counts[:, 0, owner] == 0
    assert bool(empty.any()) and torch.equal(output[empty], m.output_cache[empty])


def test_a_float32_output_cache_is_accepted(device: torch.device, backend: str) -> None:
    m = mlp_inputs(1, 130, 64, 200, dtype=torch.bfloat16, device=device)
    m = replace(m, output_cache=m.output_cache.float())
    truth, peer = run_reference(m, torch.float64), run_reference(m)
    _, output = run(m, backend)
    assert output.dtype == torch.float32
    assert_within_budget(output, truth[1], peer[1], dtype=torch.bfloat16)


def test_no_bias(device: torch.device, backend: str) -> None:
    m = mlp_inputs(1, 70, 64, 200, dtype=torch.float16, device=device)
    biased = replace(m, b1=torch.zeros_like(m.b1))
    activations, output = m.activation_cache.clone(), m.output_cache.clone()
    sparse_mlp(m.x, m.w1, None, m.w2_by_neuron, m.columns, activations, output, backend=backend)
    expected = run(biased, backend)
    torch.testing.assert_close(activations, expected[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(output, expected[1], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_kept_on_empty_caches_is_the_dense_mlp(
    dtype: torch.dtype, device: torch.device, backend: str, supported: Supported
) -> None:
    supported("sparse_mlp", dtype, 64)
    m = mlp_inputs(2, 130, 64, 200, dtype=dtype, device=device)
    full = ColumnSet.full(2, 1, 130, 200, 64, device)
    m = replace(
        m,
        columns=full,
        activation_cache=torch.zeros_like(m.activation_cache),
        output_cache=torch.zeros_like(m.output_cache),
    )

    def dense(dtype: torch.dtype) -> Tensor:
        x, w1, b1, w2 = (t.to(dtype) for t in (m.x, m.w1, m.b1, m.w2_by_neuron))
        return F.gelu(F.linear(x, w1, b1), approximate="tanh") @ w2

    first = run(m, backend)
    assert_within_budget(first[1], dense(torch.float64), dense(dtype))
    # A second evaluation finds its own activations in the cache, and so changes nothing.
    again = run(replace(m, activation_cache=first[0], output_cache=first[1]), backend)
    assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


def test_strided_tokens_and_caches(device: torch.device, backend: str) -> None:
    """A slice of a fused projection as x, caches that are slices of larger ones."""
    m = mlp_inputs(2, 130, 64, 200, dtype=torch.float16, device=device)
    activations = torch.cat([m.activation_cache, m.activation_cache], dim=2)[:, :, :130]
    output = torch.cat([m.output_cache, m.output_cache], dim=2)[:, :, :64]
    x = torch.cat([m.x, m.x], dim=2)[:, :, :64]
    sparse_mlp(x, m.w1, m.b1, m.w2_by_neuron, m.columns, activations, output, backend=backend)
    expected = run(m, backend)
    assert torch.equal(activations, expected[0]) and torch.equal(output, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 63, 64, 191, 193])
def test_group_mean_averages_the_rows_there_are(
    tokens: int, dtype: torch.dtype, device: torch.device, backend: str, supported: Supported
) -> None:
    supported("group_mean", dtype, 96)
    x = randn(3, tokens, 192, dtype=dtype, device=device)[:, :, :96] + 1
    means = group_mean(x, 64, backend=backend)
    truth, peer = mean_reference.group_mean(x.double(), 64), mean_reference.group_mean(x, 64)
    assert means.dtype == dtype
    assert_within_budget(means, truth, peer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 63, 64, 193])
@pytest.mark.parametrize("biased", [True, False])
def test_bias_and_gelu_in_place(
    tokens: int, biased: bool, dtype: torch.dtype, device: torch.device, backend: str, supported: Supported
) -> None:
    """On a slice of rows that are further apart: what lies beside it stays."""
    supported("bias_gelu", dtype, 70)
    wide = 4 * randn(2, 70, 2 * tokens, dtype=dtype, device=device)
    bias = randn(140, dtype=dtype, device=device, seed=1)[::2] if biased else None
    mid, before = wide[..., :tokens], wide.clone()
    truth, peer = (
        reference.bias_gelu(mid.to(kind), None if bias is None else bias.to(kind))
        for kind in (torch.float64, dtype)
    )
    assert bias_gelu(mid, bias, backend=backend) is mid
    assert_within_budget(mid, truth, peer)
    assert torch.equal(wide[..., tokens:], before[..., tokens:])

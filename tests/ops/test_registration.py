"""Every operation is a `torch.library` operator that PyTorch's checks accept and `torch.compile` traces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import chipmunk_kernels as ck
from tests.factories import attention_inputs, mlp_inputs, randn, scattered_columns


def arguments(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Operator name → arguments, with everything that is optional present."""
    half = torch.float16
    q, k, v = attention_inputs(1, 2, 100, 130, dtype=half, device=device, strided=True)
    columns = scattered_columns(1, 2, 100, 130, device=device)
    chosen = (columns.indices, columns.counts, 64)
    lengths = torch.tensor([99], dtype=torch.int32, device=device)
    scores = torch.rand(1, 2, 2, 130, device=device)
    select = (64, [0, 5], 3, 7, 1, 120, 100)
    m = mlp_inputs(1, 100, 64, 130, dtype=half, device=device)
    mlp_chosen = (m.columns.indices, m.columns.counts, 64)
    packed = randn(1, 2, 2, columns.capacity, 64, dtype=half, device=device)
    caches = (m.activation_cache, m.output_cache)
    cases: dict[str, tuple[Any, ...]] = {
        "dense_attention": (q, k, v, 130, lengths, 0.1),
        "colsum_attention": (q, k, v, torch.zeros(1, 2, 100, device=device), 64, 100, None, 0.1),
        "sparse_attention": (q, k, v, *chosen, q.clone(), -1, 0.1),
        "topk_columns": (scores, 20, *select),
        "coverage_columns": (scores, 0.5, 64, 20, *select[1:]),
        "columns_from_mask": (scores > 0.5, 64, 100),
        "gather_columns": (k, *chosen, False),
        "scatter_columns": (packed, *chosen, randn(1, 2, 130, 100, dtype=half, device=device), True),
        "sparse_mlp": (m.x, m.w1, m.b1, m.w2_by_neuron, *mlp_chosen, *caches, "gelu_tanh"),
        "group_mean": (m.x, 64),
        "bias_gelu": (m.activation_cache, m.b1),
    }
    return {name: (*case, "", "") for name, case in cases.items()}


@pytest.mark.parametrize("name", sorted(arguments(torch.device("cpu"))))
def test_pytorch_accepts_the_registration(name: str, device: torch.device) -> None:
    """Schema, fake kernel (shapes, strides, dtypes), autograd registration, tracing with dynamic shapes."""
    operator = getattr(torch.ops.chipmunk, name).default
    torch.library.opcheck(operator, arguments(device)[name])


def test_a_backward_pass_says_that_there_is_none(device: torch.device) -> None:
    q, k, v = attention_inputs(1, 2, 100, 100, dtype=torch.float16, device=device)
    out, _ = ck.dense_attention(q.requires_grad_(), k, v)
    with pytest.warns(UserWarning, match="chipmunk::dense_attention"):
        out.sum().backward()
    assert q.grad is None


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_written_in_place_counts_as_changed(inference: bool, device: torch.device) -> None:
    with torch.inference_mode(inference):
        m = mlp_inputs(1, 100, 64, 130, dtype=torch.float16, device=device)
        caches = m.activation_cache, m.output_cache
        before = [0 if inference else each._version for each in caches]
        ck.sparse_mlp(m.x, m.w1, m.b1, m.w2_by_neuron, m.columns, *caches)
        if not inference:  # such tensors have no versions
            assert [each._version for each in caches] == [version + 1 for version in before]


def sparse_step(q: Tensor, k: Tensor, v: Tensor, base: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
    """A full step and the selection that follows it, as the delta engine strings them together."""
    dense, lse = ck.dense_attention(q, k, v)
    out, _, mass = ck.colsum_attention(q, k, v, lse, 64, key_length=90)
    columns = ck.topk_columns(mass, 20, group_size=64, keep=[(0, 5)], window=3, random=4)
    rest = ck.sparse_attention(q, k, v, columns, base=base, sign=-1)
    assert isinstance(rest, Tensor)
    covered = ck.coverage_columns(scores, 0.5, group_size=64, max_columns=30)
    packed = ck.gather_columns(k, ck.columns_from_mask(covered.to_mask(100), group_size=64, capacity=40))
    return dense + out, rest.transpose(1, 2).flatten(2), packed


def mlp_step(x: Tensor, m: Any, activations: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    means = ck.group_mean(x, 64)
    change = (means @ m.w1.t()).abs().unsqueeze(1)
    columns = ck.topk_columns(change, 40, group_size=64, random=5)
    activations = ck.bias_gelu(activations, m.b1)
    new = ck.sparse_mlp(x, m.w1, m.b1, m.w2_by_neuron, columns, activations, output)
    packed = ck.gather_columns(activations.unsqueeze(1), columns, per_group=True)
    ck.scatter_columns(packed, columns, activations.unsqueeze(1), accumulate=True)
    return new.sum(-1), activations


@pytest.mark.slow
def test_attention_compiles_as_one_graph(device: torch.device) -> None:
    q, k, v = attention_inputs(1, 2, 100, 100, dtype=torch.float16, device=device, strided=True)
    scores = torch.rand(1, 2, 2, 100, device=device)
    compiled = torch.compile(sparse_step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(q, k, v, q, scores), sparse_step(q, k, v, q, scores), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.slow
def test_the_mlp_compiles_as_one_graph_and_still_changes_its_caches(device: torch.device) -> None:
    m = mlp_inputs(1, 100, 64, 130, dtype=torch.float16, device=device)
    compiled = torch.compile(mlp_step, fullgraph=True, backend="aot_eager")
    caches = [m.activation_cache.clone(), m.output_cache.clone()]
    expected = [m.activation_cache.clone(), m.output_cache.clone()]
    ours, eager = compiled(m.x, m, *caches), mlp_step(m.x, m, *expected)
    assert torch.equal(ours[0], eager[0]) and torch.equal(caches[0], expected[0])
    assert torch.equal(caches[1], expected[1]) and not torch.equal(caches[1], m.output_cache)

"""On a CPU without 16-bit products all are made in float32: PyTorch's own would take 200 times as long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chipmunk_kernels.backends.torch import attention, mlp
from chipmunk_kernels.backends.torch.products import product_dtype
from tests.factories import attention_inputs, mlp_inputs, scattered_columns

HALVES = (torch.bfloat16, torch.float16)


class Products(TorchDispatchMode):
    """Collects the types of matrices that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in function.overloadpacket.__name__:
            self.dtypes |= {each.dtype for each in args if isinstance(each, Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=[False, True], ids=["own", "float32"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype | None]:
    """A CPU that multiplies 16-bit matrices, and one that does not: the type that the latter computes in."""
    wide = torch.float32 if request.param else None
    for module in (attention, mlp):
        monkeypatch.setattr(module, "product_dtype", lambda dtype, device: wide or dtype)
    yield wide


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("based", [False, True])
def test_attention(dtype: torch.dtype, based: bool, products: torch.dtype | None) -> None:
    q, k, v = attention_inputs(1, 2, 193, width=32, dtype=dtype)
    columns, base = scattered_columns(1, 2), torch.full_like(q, 2.0) if based else None

    def call(convert: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        below = None if base is None else convert(base)
        return attention.sparse_attention(
            convert(q), convert(k), convert(v), columns, below, 1, 0.2, attention.SparseSettings()
        )

    with Products() as seen:
        out, lse = call(lambda tensor: tensor)
        dense, _ = attention.dense_attention(q, k, v, 190, 0.2, attention.DenseSettings())
    assert seen.dtypes == {products or dtype}
    assert out.dtype == dense.dtype == dtype
    assert bool(dense.isfinite().all())
    if products is not None:
        exact_out, exact_lse = call(Tensor.float)
        assert torch.equal(out, exact_out.to(dtype))
        assert torch.equal(lse, exact_lse)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mlp(dtype: torch.dtype, products: torch.dtype | None) -> None:
    inputs = mlp_inputs(1, 193, 64, 256, dtype=dtype)
    caches = inputs.activation_cache.clone(), inputs.output_cache.clone()
    given = inputs.x, inputs.w1, inputs.b1, inputs.w2_by_neuron
    with Products() as seen:
        mlp.sparse_mlp(*given, inputs.columns, *caches, "gelu_tanh", mlp.SparseMlpSettings())
    assert seen.dtypes == {products or dtype}
    assert all(cache.dtype == dtype and bool(cache.isfinite().all()) for cache in caches)
    assert not torch.equal(caches[1], inputs.output_cache)
    if products is not None:  # the new activations are those of a float32 computation, rounded once
        wide = inputs.activation_cache.float(), inputs.output_cache.float()
        mlp.sparse_mlp(
            *(each.float() for each in given), inputs.columns, *wide, "gelu_tanh", mlp.SparseMlpSettings()
        )
        assert torch.equal(caches[0], wide[0].to(dtype))


def test_only_half_precision_on_a_cpu_is_computed_in_another_type() -> None:
    assert product_dtype(torch.float32, "cpu") == torch.float32
    assert product_dtype(torch.float64, "cpu") == torch.float64
    for dtype in HALVES:
        assert product_dtype(dtype, "cuda") == dtype
        assert product_dtype(dtype, "cpu") in (dtype, torch.float32)
